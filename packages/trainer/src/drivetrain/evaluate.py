"""Evaluation: validation inside a fit, and ``validate``, ``test`` and ``predict`` by themselves."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from drivetrain.seeding import rng_state, set_rng_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from drivetrain_interfaces import Accelerator, EvalStep
    from torch import nn

    from drivetrain.feeds import Feed
    from drivetrain.hooks import Hooks
    from drivetrain.metrics import Metrics
    from drivetrain.stopping import StopRequest
    from drivetrain.trainer import Trainer


@dataclass(slots=True)
class Evaluation:
    """Everything that one kind of evaluation needs, resolved once.

    Attributes:
        kind: ``"validation"``, ``"test"`` or ``"predict"``, as in the names of the hooks.
        feeds: The loaders.
        limits: Batches to take of each, or None for all.
        step: The strategy's evaluation step around the user's function.
        feed: Moves a batch to the device, with the user's transfer hooks.
        keep: Whether outputs are returned, as predictions are.
        cut_short: Whether a stop ended it before its last batch.
    """

    kind: str
    trainer: Trainer
    module: nn.Module
    hooks: Hooks
    feeds: list[Feed]
    limits: list[int | None]
    step: EvalStep
    metrics: Callable[[], Metrics]
    feed: Callable[[Any, int], Any]
    stop: StopRequest | None = None
    keep: bool = False
    cut_short: bool = False
    outputs: list[list[Any]] = field(default_factory=list)


def evaluate(
    run: Evaluation, *, quietly: bool = False, most: int | None = None
) -> dict[str, float]:
    """Run all loaders once; returns the metrics.

    Args:
        run: What to evaluate.
        quietly: Publish no metrics, as in the sanity check before training.
        most: The most batches to take of each loader.
    """
    kind, hooks, trainer = run.kind, run.hooks, run.trainer
    outer, metrics = trainer.metrics, run.metrics()
    trainer.metrics = metrics
    run.cut_short, run.outputs = False, [[] for _ in run.feeds]
    try:
        with _evaluating(run.module), run.step:
            hooks.call(f"on_{kind}_start")
            hooks.call(f"on_{kind}_epoch_start")
            if run.stop is not None:
                run.stop.begin_evaluation()
            for number in range(len(run.feeds)):
                _one_loader(run, number, metrics, most)
                if run.cut_short:
                    return {}
            if run.stop is not None and not run.stop.end_batches():
                run.cut_short = True
                return {}
            metrics.suffix = ""
            # Before the epoch-end hooks, so that they can read what the steps logged.
            found = _publish(run, metrics, quietly=quietly)
            metrics.between_batches = True
            hooks.call(f"on_{kind}_epoch_end")
            found.update(_publish(run, metrics, quietly=quietly))
            hooks.call(f"on_{kind}_end")
    finally:
        trainer.metrics = outer
    return found


def _one_loader(run: Evaluation, number: int, metrics: Metrics, most: int | None) -> None:
    starts = run.hooks.table(f"on_{run.kind}_batch_start", 3)
    ends = run.hooks.table(f"on_{run.kind}_batch_end", 4)
    if len(run.feeds) > 1:
        metrics.suffix = f"/dataloader_idx_{number}"
    limit = run.limits[number]
    if most is not None:
        limit = most if limit is None else min(limit, most)
    stream: Iterator[Any] = islice(run.feeds[number].open(run.trainer.current_epoch), limit)
    kept = run.outputs[number]
    for index, batch in enumerate(stream):
        if run.stop is not None and not run.stop.begin_batch():
            run.cut_short = True
            return
        metrics.batch = batch
        for call in starts:
            call(batch, index, number)
        output = run.step(run.feed(batch, number), index, number)
        for call in ends:
            call(output, batch, index, number)
        if run.keep:
            kept.append(output)


def _publish(run: Evaluation, metrics: Metrics, *, quietly: bool) -> dict[str, float]:
    logged = metrics.epoch_values()
    stepped = metrics.step_values()
    logged.everything.update(stepped.everything)
    logged.logger.update(stepped.logger)
    logged.prog_bar.update(stepped.prog_bar)
    if not quietly:
        run.trainer.publish(logged)
    return logged.everything


class _evaluating:  # noqa: N801 - used as a function
    """Every submodule in evaluation mode; afterwards each in the mode that it had."""

    def __init__(self, module: nn.Module) -> None:
        self._training = [each for each in module.modules() if each.training]
        self._module = module

    def __enter__(self) -> None:
        self._module.eval()

    def __exit__(self, *exc: object) -> None:
        for each in self._training:
            each.training = True


@contextmanager
def isolated(accelerator: Accelerator, device: torch.device) -> Iterator[None]:
    """Random numbers drawn inside, by any generator, have no effect outside."""
    before = rng_state(accelerator, device)
    try:
        yield
    finally:
        set_rng_state(before, accelerator, device)
