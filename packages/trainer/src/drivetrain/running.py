"""One run in one process, and what it leaves behind for the process that asked for it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from signal import Signals
from typing import TYPE_CHECKING, Any

from drivetrain import resuming
from drivetrain.seeding import host_rng_state, set_host_rng_state
from drivetrain.session import Session, determinism
from drivetrain.signals import SignalAction, SignalWatch

if TYPE_CHECKING:
    from drivetrain_interfaces import World

    from drivetrain.datamodule import DataModule
    from drivetrain.module import Module
    from drivetrain.runtime import Runtime
    from drivetrain.trainer import Trainer

log = logging.getLogger("drivetrain")


@dataclass(frozen=True)
class Job:
    """What one run is about; goes to every process."""

    stage: str
    module: Module
    datamodule: DataModule | None
    loaders: dict[str, Any]
    ckpt_path: str | None


@dataclass
class Fitted:
    """Where the last fit ended."""

    epoch: int = 0
    global_step: int = 0
    elapsed: float = 0.0


@dataclass
class Outcome:
    """What a run leaves behind, in a form that can travel from a child to its parent."""

    metrics: dict[str, float] = field(default_factory=dict)
    outputs: list[list[Any]] = field(default_factory=list)
    weights: dict[str, Any] = field(default_factory=dict)
    callbacks: list[dict[str, Any]] = field(default_factory=list)
    trainer: dict[str, Any] = field(default_factory=dict)
    world: World | None = None
    rng: dict[str, Any] = field(default_factory=dict)

    def apply(self, trainer: Trainer, module: Module) -> None:
        """Give the parent's objects the state that the child's ended with."""
        if self.world is not None:
            trainer.runtime.adopt(self.world)
        if self.weights:
            # What was built without memory got it in the child.
            bare = any(parameter.is_meta for parameter in module.parameters())
            module.load_state_dict(self.weights, **({"assign": True} if bare else {}))
        for each, state in zip(trainer.callbacks, self.callbacks, strict=True):
            if state:
                each.load_state_dict(state)
        for name, value in self.trainer.items():
            setattr(trainer, name, value)
        if self.rng:
            # What is drawn next, such as the seed of the next run, is what rank 0 would draw.
            set_host_rng_state(self.rng)


_TRAVELS = ("callback_metrics", "logged_metrics", "progress_bar_metrics", "should_stop")


def work(runtime: Runtime, trainer: Trainer, job: Job) -> Outcome:
    """One run in one process, with its signal handlers around all of it."""
    trainer.interrupted = trainer.stop_action = None
    with SignalWatch(trainer.signals) as signals:
        outcome = _work(runtime, trainer, job, signals)
    if signals.number and trainer.interrupted is None:
        # It came after the last boundary: the run is complete, and the process ends after it.
        trainer.interrupted = Signals(signals.number)
        trainer.stop_action = SignalAction.STOP
    if not runtime.in_place:
        outcome.trainer["interrupted"] = trainer.interrupted
        outcome.trainer["stop_action"] = trainer.stop_action
    return outcome


def _work(runtime: Runtime, trainer: Trainer, job: Job, signals: SignalWatch) -> Outcome:
    outcome = Outcome()
    module, stack = job.module, runtime.stack
    trainer.runtime, trainer.module = runtime, module
    trainer.should_stop = False
    trainer.limits = {}
    module.__dict__["_trainer"] = trainer
    session = Session(trainer, runtime, module, job.datamodule, job.stage, signals)
    status = "failed"
    if stack.world.is_main:
        for notice in runtime.plan.notices:
            log.warning("%s", notice)
    try:
        with session.watch, determinism(asked=trainer.deterministic):
            if stack.world.is_main:
                _prepare_loggers(trainer, job)
            found = resuming.find(trainer, job.ckpt_path, job.stage)
            session.prepare()
            tree = found.read(stack)
            if job.stage == "fit":
                session.fit(job.loaders, tree)
            else:
                outcome.metrics, outcome.outputs = session.evaluate(job.loaders, tree)
        status = "success" if trainer.interrupted is None else "interrupted"
        if not runtime.in_place:
            _pack(outcome, trainer, runtime)
    except BaseException as error:
        first = session.watch.failed(error)
        session.failed(first)
        if first is error:
            raise
        raise first from error
    finally:
        _finish(trainer, session, status)
    return outcome


def _prepare_loggers(trainer: Trainer, job: Job) -> None:
    for each in trainer.loggers:
        each.use_run_dir(trainer.run_dir)
        if job.stage == "fit":
            each.prepare()
            each.log_hyperparams(job.module.hparams)


def _pack(outcome: Outcome, trainer: Trainer, runtime: Runtime) -> None:
    state = runtime.stack.strategy.state()
    outcome.world = runtime.world
    outcome.weights = {name: value.cpu() for name, value in state.module.items()}
    outcome.callbacks = [each.state_dict() for each in trainer.callbacks]
    outcome.trainer = {name: getattr(trainer, name) for name in _TRAVELS}
    outcome.trainer["fitted"] = _fitted(trainer)
    outcome.rng = host_rng_state()


def _finish(trainer: Trainer, session: Session, status: str) -> None:
    try:
        session.teardown()
    finally:
        if session.stack.world.is_main:
            for each in trainer.loggers:
                each.finalize(status)
        trainer.fitted = _fitted(trainer)
        trainer.detach()
        session.module.__dict__["_trainer"] = None
        session.runtime.close()


def _fitted(trainer: Trainer) -> Fitted:
    return Fitted(trainer.current_epoch, trainer.global_step, trainer.elapsed)
