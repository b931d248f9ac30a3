"""A small trainer for callbacks: real files, real counters, ranks one after the other."""

from __future__ import annotations

import json
import os
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest
from drivetrain_interfaces import World

from drivetrain.callbacks.base import Callback, Moment


class FileIO:
    """Checkpoints as JSON files."""

    def __init__(self):
        self.removed = []

    def save(self, tree, path):
        with open(path, "w", encoding="utf-8") as file:
            json.dump(tree, file)

    def load(self, path):
        with open(path, encoding="utf-8") as file:
            return json.load(file)

    def exists(self, path):
        return os.path.exists(path)

    def remove(self, path):
        self.removed.append(path)
        if os.path.exists(path):
            os.remove(path)


class Relay:
    """What rank 0 broadcasts waits here until rank 1 asks for it."""

    def __init__(self, rank, line):
        self.rank = rank
        self.line = line
        self.count = 0

    def broadcast_object(self, value, source=0):
        self.count += 1
        if self.rank == 0:
            self.line.append(value)
            return value
        return self.line.popleft()


@dataclass
class FakeTrainer:
    """The part of a Trainer that callbacks read."""

    run_dir: str
    rank: int = 0
    line: deque = field(default_factory=deque)
    current_epoch: int = 0
    global_step: int = 0
    batch_idx: int = 0
    max_epochs: int | None = 2
    num_training_batches: float = 4
    num_val_batches: list = field(default_factory=list)
    num_test_batches: list = field(default_factory=list)
    num_predict_batches: list = field(default_factory=list)
    log_every_n_steps: int = 1
    should_stop: bool = False
    sanity_checking: bool = False
    callback_metrics: dict = field(default_factory=dict)
    progress_bar_metrics: dict = field(default_factory=dict)
    optimizers: list = field(default_factory=list)
    schedulers: list = field(default_factory=list)
    callbacks: list = field(default_factory=list)
    logged: list = field(default_factory=list)
    checkpoint_io: Any = field(default_factory=FileIO)
    saved: list = field(default_factory=list)
    failure: Exception | None = None

    def __post_init__(self):
        self.collectives = Relay(self.rank, self.line)
        self.world = World(
            rank=self.rank,
            size=self.rank + 1,
            local_rank=self.rank,
            local_size=self.rank + 1,
            address="localhost" if self.rank else "",
            port=self.rank,
        )

    @property
    def is_global_zero(self):
        return self.rank == 0

    def log_metrics(self, metrics, step=None):
        self.logged.append((self.global_step if step is None else step, dict(metrics)))

    def save_checkpoint(self, path, weights_only=False):
        if self.failure is not None:
            raise self.failure
        tree = {each.state_key: each.state_dict() for each in self.callbacks}
        self.saved.append((os.path.basename(path), weights_only))
        if self.is_global_zero:
            self.checkpoint_io.save(tree, path)

    # What the loop does, in its order
    def hook(self, name, *args):
        for each in sorted(self.callbacks, key=lambda callback: callback.saves_checkpoints):
            getattr(each, name)(self, None, *args)

    def start(self, *callbacks):
        """Set up and begin; ``tree`` of a checkpoint is restored as the trainer restores it."""
        self.callbacks = list(callbacks)
        self.hook("setup", "fit")
        self.hook("on_fit_start")
        return self

    def restore(self, path):
        tree = self.checkpoint_io.load(path)
        for each in self.callbacks:
            each.load_state_dict(tree[each.state_key])
        return self

    def train(self, epochs, steps=4, *, validation=None, training=None, validate_each=1):
        """Whole epochs; ``validation`` and ``training`` give the metrics of an epoch."""
        self.hook("on_train_start")
        for _ in range(epochs):
            self.hook("on_train_epoch_start")
            for index in range(steps):
                self.hook("on_train_batch_start", None, index)
                self.global_step += 1
                self.batch_idx = index + 1
                self.hook("on_train_batch_end", None, None, index)
                self.hook("on_save_opportunity", Moment.STEP)
            if validation is not None and (self.current_epoch + 1) % validate_each == 0:
                self.validate(validation(self.current_epoch))
            if training is not None:
                self.publish(training(self.current_epoch))
            self.hook("on_train_epoch_end")
            self.current_epoch += 1
            self.batch_idx = 0
            self.hook("on_save_opportunity", Moment.EPOCH)
            if self.should_stop:
                break
        return self

    def publish(self, metrics):
        self.callback_metrics.update(metrics)
        self.progress_bar_metrics.update(metrics)

    def validate(self, metrics):
        self.hook("on_validation_start")
        for index in range(sum(self.num_val_batches)):
            self.hook("on_validation_batch_end", None, None, index, 0)
        self.publish(metrics)
        self.hook("on_validation_end")
        self.hook("on_save_opportunity", Moment.VALIDATION)

    def end(self, moment=Moment.END):
        self.hook("on_save_opportunity", moment)
        self.hook("on_train_end")
        self.hook("teardown", "fit")
        return self


@pytest.fixture
def trainer(tmp_path):
    """One rank."""
    return FakeTrainer(str(tmp_path))


@pytest.fixture
def ranks(tmp_path):
    """Two ranks: run rank 0 first, and rank 1 then hears what it said."""
    line = deque()
    return FakeTrainer(str(tmp_path), 0, line), FakeTrainer(str(tmp_path), 1, line)


@pytest.fixture
def make_trainer(tmp_path):
    """Makes trainers of the same run directory, as a resumed run has."""
    return lambda **fields: FakeTrainer(str(tmp_path), **fields)


@pytest.fixture(autouse=True)
def _callback_signatures():
    """The hooks that ``FakeTrainer`` calls are those that callbacks have."""
    assert {"setup", "on_save_opportunity", "on_validation_start"} <= set(vars(Callback))
