"""The Trainer: the public face that wires a run together. The loop loops, the strategy steps."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any, TypeVar

from drivetrain_interfaces import (
    ConfigurationError,
    DrivetrainError,
    Feature,
    StorageError,
    UserCodeError,
    World,
)

from drivetrain import snapshot
from drivetrain.datamodule import DataModule
from drivetrain.defaults import default_callbacks, default_loggers
from drivetrain.hooks import Hooks
from drivetrain.module import Module
from drivetrain.optim import load_optimizers
from drivetrain.plan import Want
from drivetrain.resolve import check_wants
from drivetrain.running import Fitted, Job, Outcome, work
from drivetrain.runtime import Runtime
from drivetrain.settings import Settings
from drivetrain.signals import (
    Interrupted,
    SignalAction,
    check_saves,
    expect_the_end,
    policy_of,
    requeue,
)

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Mapping, Sequence
    from datetime import timedelta

    import torch
    from drivetrain_interfaces import CheckpointIO, Collectives, PendingSave

    from drivetrain.callbacks.base import Callback
    from drivetrain.loggers.base import Logger
    from drivetrain.loop import FitRun
    from drivetrain.manual import ManualOptimizer
    from drivetrain.metrics import Logged, Metrics
    from drivetrain.optim import Scheduled
    from drivetrain.plan import Plan

log = logging.getLogger("drivetrain")


class Trainer:
    """Fits, validates, tests and predicts with a ``Module`` on any installed backend.

    Args:
        accelerator: A backend's name, ``"auto"``, its spec, or an accelerator object.
        devices: How many devices, which ones, or ``"auto"``.
        num_nodes: Number of machines.
        strategy: A name, ``"auto"``, or a configured strategy object.
        precision: ``"32-true"``, ``"bf16-mixed"`` and so on, or a precision object.
        launcher: What starts the processes: a name, ``"auto"``, or a launcher object.
        plugins: Parts of any kind: strategy, precision, checkpoint IO, environment, launcher.
        max_epochs: Stop after so many epochs.
        max_steps: Stop after so many applied optimizer steps; -1 for no limit.
        max_time: Stop after this time, at a step boundary.
        limit_train_batches: Batches per epoch: a whole number, or a fraction from 0.0 to 1.0.
        limit_val_batches: The same for validation; 0 switches it off.
        limit_test_batches: The same for ``test``.
        limit_predict_batches: The same for ``predict``.
        fast_dev_run: Run one batch (or so many) of everything, without files.
        val_check_interval: Validate after so many batches, or this fraction of an epoch.
        check_val_every_n_epoch: Validate in every so many-th epoch.
        num_sanity_val_steps: Validation batches to try before training; -1 for all.
        accumulate_grad_batches: Batches per optimizer step.
        gradient_clip_val: Largest gradient norm or element, or None.
        gradient_clip_algorithm: ``"norm"`` or ``"value"``.
        deterministic: Use deterministic algorithms only; ``"warn"`` to be told where there is none.
        inference_mode: Evaluate under ``torch.inference_mode`` rather than ``no_grad``.
        use_distributed_sampler: Deal samples out to the ranks.
        sync_batchnorm: Take batch statistics over all processes.
        logger: A logger, several, True for CSV files, or False; None means CSV files if
            ``default_root_dir`` is set.
        log_every_n_steps: Optimizer steps between log points.
        callbacks: A callback or several.
        enable_checkpointing: Add a ``ModelCheckpoint`` if there is none; None means to do so if
            ``default_root_dir`` is set.
        enable_progress_bar: Show progress.
        enable_model_summary: Print a summary of the model.
        default_root_dir: Where files go. Without it nothing is written unless asked for.
        nan_loss: What a loss that is not finite does: ``"raise"``, ``"warn"`` or ``"ignore"``.
        cluster_environment: The cluster to read ranks from, ``"none"``, or ``"auto"``.
        hang_timeout: Seconds, or a ``timedelta``, in which no rank of several makes a step or
            evaluates a batch before the run counts as hanging; None for no such limit.
        signals: What signals do: a ``SignalPolicy``, actions by name of the signal, or ``"stop"``,
            ``"save"`` or ``"ignore"`` for SIGINT and SIGTERM. None stops and saves.
        gpus: Short form of ``devices`` on the best accelerator that is not the host.

    Raises:
        ConfigurationError: Arguments that cannot be met; the message lists all of them.
    """

    def __init__(
        self,
        *,
        accelerator: Any = "auto",
        devices: Any = "auto",
        num_nodes: int = 1,
        strategy: Any = "auto",
        precision: Any = None,
        launcher: Any = "auto",
        plugins: Any = None,
        max_epochs: int | None = None,
        max_steps: int = -1,
        max_time: timedelta | dict[str, float] | str | None = None,
        limit_train_batches: float | None = None,
        limit_val_batches: float | None = None,
        limit_test_batches: float | None = None,
        limit_predict_batches: float | None = None,
        fast_dev_run: int | bool = False,
        val_check_interval: float | None = None,
        check_val_every_n_epoch: int = 1,
        num_sanity_val_steps: int = 2,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str = "norm",
        deterministic: bool | str | None = None,
        inference_mode: bool = True,
        use_distributed_sampler: bool = True,
        sync_batchnorm: bool = False,
        logger: Any = None,
        log_every_n_steps: int = 50,
        callbacks: Any = None,
        enable_checkpointing: bool | None = None,
        enable_progress_bar: bool = True,
        enable_model_summary: bool = True,
        default_root_dir: str | os.PathLike[str] | None = None,
        nan_loss: str = "raise",
        cluster_environment: Any = "auto",
        hang_timeout: float | timedelta | None = 600.0,
        signals: Any = None,
        gpus: Any = None,
    ) -> None:
        problems: list[DrivetrainError] = []
        settings = _attempt(
            problems,
            Settings,
            max_epochs=1 if fast_dev_run else max_epochs,
            max_steps=max_steps,
            max_time=max_time,
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            limit_test_batches=limit_test_batches,
            limit_predict_batches=limit_predict_batches,
            fast_dev_run=fast_dev_run,
            val_check_interval=None if fast_dev_run else val_check_interval,
            check_val_every_n_epoch=1 if fast_dev_run else check_val_every_n_epoch,
            num_sanity_val_steps=0 if fast_dev_run else num_sanity_val_steps,
            accumulate_grad_batches=accumulate_grad_batches,
            gradient_clip_val=gradient_clip_val,
            gradient_clip_algorithm=gradient_clip_algorithm,
            inference_mode=inference_mode,
            use_distributed_sampler=use_distributed_sampler,
            log_every_n_steps=log_every_n_steps,
            nan_loss=nan_loss,
            hang_timeout=hang_timeout,
        )
        wants = settings.wants if settings else ()
        if deterministic is True:
            wants += (Want(Feature.DETERMINISTIC, "deterministic=True"),)
        runtime = _attempt(
            problems,
            Runtime,
            accelerator=accelerator,
            devices=devices,
            num_nodes=num_nodes,
            strategy=strategy,
            precision=precision,
            launcher=launcher,
            cluster_environment=cluster_environment,
            plugins=_listed(plugins),
            gpus=gpus,
            sync_batchnorm=sync_batchnorm,
            wants=wants,
        )
        policy = _attempt(problems, policy_of, given=signals, env=os.environ)
        if settings is None or runtime is None or policy is None:
            raise _together(problems)
        self.settings, self.runtime, self.signals = settings, runtime, policy
        self.deterministic = deterministic
        self.default_root_dir = os.fspath(default_root_dir) if default_root_dir else os.getcwd()
        writes = default_root_dir is not None
        self.loggers: list[Logger] = default_loggers(
            logger, self.default_root_dir, by_default=writes, off=bool(fast_dev_run)
        )
        self._own_callbacks = default_callbacks(
            _listed(callbacks),
            checkpointing=writes if enable_checkpointing is None else enable_checkpointing,
            progress_bar=enable_progress_bar,
            model_summary=enable_model_summary,
            no_files=bool(fast_dev_run),
        )
        self.callbacks: list[Callback] = list(self._own_callbacks)
        self.module: Module | None = None
        self.optimizers: list[torch.optim.Optimizer] = []
        self.schedulers: list[Scheduled] = []
        self.callback_metrics: dict[str, float] = {}
        self.logged_metrics: dict[str, float] = {}
        self.progress_bar_metrics: dict[str, float] = {}
        self.should_stop = False
        self.sanity_checking = False
        self.interrupted: signal.Signals | None = None
        self.stop_action: SignalAction | None = None
        self.runs = 0
        self.limits: dict[str, list[int | None]] = {}
        self.metrics: Metrics | None = None
        self.fitted = Fitted()
        self._run: FitRun | None = None

    # The four things it does
    def fit(
        self,
        module: Module,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: DataModule | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
    ) -> None:
        """Train until ``max_epochs``, ``max_steps`` or ``max_time``.

        Args:
            module: The model.
            train_dataloaders: A loader, any iterable of batches, or a ``DataModule``.
            val_dataloaders: A loader, or a list of loaders.
            datamodule: Where loaders come from if they are not given.
            ckpt_path: A checkpoint to resume; ``"best"`` of this Trainer's own; or ``"last"``: the
                newest that is complete and verified where its callbacks save, and none if there
                is nothing yet, so that a script can be started again and again.

        Raises:
            Interrupted: A signal stopped it cleanly; a ``SystemExit`` with the code 128 + signal.
        """
        self.settings.check_limit_is_set()
        if isinstance(train_dataloaders, DataModule):
            train_dataloaders, datamodule = None, train_dataloaders
        loaders = {"fit": train_dataloaders, "validate": val_dataloaders}
        self._launch("fit", module, datamodule, loaders, ckpt_path)
        self._end_if_interrupted()

    def validate(
        self,
        module: Module,
        dataloaders: Any = None,
        datamodule: DataModule | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
    ) -> dict[str, float]:
        """Evaluate on the validation loaders; returns the metrics."""
        return self._evaluate("validate", module, dataloaders, datamodule, ckpt_path).metrics

    def test(
        self,
        module: Module,
        dataloaders: Any = None,
        datamodule: DataModule | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
    ) -> dict[str, float]:
        """Evaluate on the test loaders; returns the metrics."""
        return self._evaluate("test", module, dataloaders, datamodule, ckpt_path).metrics

    def predict(
        self,
        module: Module,
        dataloaders: Any = None,
        datamodule: DataModule | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
    ) -> list[Any]:
        """Predict; returns this rank's outputs: one per batch, in lists if there are loaders."""
        outputs = self._evaluate("predict", module, dataloaders, datamodule, ckpt_path).outputs
        return outputs[0] if len(outputs) == 1 else outputs

    def save_checkpoint(
        self,
        path: str | os.PathLike[str],
        weights_only: bool = False,  # noqa: FBT001, FBT002
    ) -> None:
        """Save the state of the fit that is running. Every rank calls it, between windows.

        Raises:
            UserCodeError: No fit is running.
            CheckpointError: Something in the state cannot be encoded.
            StorageError: It cannot be written.
        """
        run, tree = self._collected(path, weights_only=weights_only)
        snapshot.write_checkpoint(tree, os.fspath(path), run.stack, run.watch.check)

    def begin_checkpoint(
        self, path: str | os.PathLike[str], *, weights_only: bool = False
    ) -> PendingSave | None:
        """Save while training goes on: return as soon as the state is copied. Every rank calls it.

        Returns:
            On rank 0 what says when it is durable, or raises what went wrong; None on other ranks.

        Raises:
            UserCodeError: No fit is running.
            UnsupportedError: The checkpoint IO saves only while training waits.
            CheckpointError: Something in the state cannot be encoded.
        """
        run, tree = self._collected(path, weights_only=weights_only)
        return snapshot.begin_checkpoint(tree, os.fspath(path), run.stack, run.watch.check)

    def _collected(
        self, path: str | os.PathLike[str], *, weights_only: bool
    ) -> tuple[FitRun, dict[str, Any]]:
        if self._run is None:
            raise UserCodeError(
                f"A checkpoint was to be saved to {os.fspath(path)!r} while no fit is running.",
                "Call save_checkpoint from a hook, or add a ModelCheckpoint callback.",
            )
        progress = self._run.progress
        self._run.losses.check(progress.epoch, progress.attempts)
        return self._run, snapshot.collect(self._run, weights_only=weights_only)

    def report_progress(self) -> None:
        """Tell that this run is alive, in a hook that takes longer than ``hang_timeout``."""
        if self._run is not None:
            self._run.watch.alive()

    def explain(self) -> None:
        """Print the plan and, for every choice, candidates, evidence, winner and who asked."""
        print(self.plan.explain())  # noqa: T201 - that is what it is for

    # What callbacks and modules read
    @property
    def plan(self) -> Plan:
        """What was chosen, and why."""
        return self.runtime.plan

    @property
    def world(self) -> World:
        """This process's place."""
        return self.runtime.world

    @property
    def is_global_zero(self) -> bool:
        """Whether this is rank 0."""
        return self.world.is_main

    @property
    def collectives(self) -> Collectives:
        """Communication between the processes."""
        return self.runtime.stack.collectives

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """What writes and reads checkpoints."""
        return self.runtime.stack.checkpoint_io

    @property
    def run_dir(self) -> str:
        """Where files of this run go."""
        return self.default_root_dir

    @property
    def max_epochs(self) -> int | None:
        """The limit of epochs."""
        return self.settings.max_epochs

    @property
    def max_steps(self) -> int:
        """The limit of optimizer steps, or -1."""
        return self.settings.max_steps

    @property
    def log_every_n_steps(self) -> int:
        """Optimizer steps between log points."""
        return self.settings.log_every_n_steps

    @property
    def current_epoch(self) -> int:
        """Epochs completed; while training also the number of the current one."""
        return self._run.progress.epoch if self._run else self.fitted.epoch

    @property
    def global_step(self) -> int:
        """Optimizer steps that were applied."""
        return self._run.progress.global_step if self._run else self.fitted.global_step

    @property
    def batch_idx(self) -> int:
        """Batches of this epoch that are done, on this rank."""
        return self._run.progress.batch if self._run else 0

    @property
    def elapsed(self) -> float:
        """Seconds of training, those before a resume included."""
        return self._run.elapsed if self._run else self.fitted.elapsed

    @property
    def num_training_batches(self) -> float:
        """Batches per epoch on this rank; infinite if the loader has no length."""
        limit = self._run.limit if self._run else None
        return float("inf") if limit is None else limit

    @property
    def num_val_batches(self) -> list[float]:
        """Batches of each validation loader on this rank."""
        return self._limits("validation")

    @property
    def num_test_batches(self) -> list[float]:
        """Batches of each test loader on this rank."""
        return self._limits("test")

    @property
    def num_predict_batches(self) -> list[float]:
        """Batches of each loader to predict on this rank."""
        return self._limits("predict")

    def _limits(self, kind: str) -> list[float]:
        limits = self.limits.get(kind, [])
        return [float("inf") if limit is None else limit for limit in limits]

    @property
    def manual_optimizers(self) -> list[ManualOptimizer]:
        """The optimizers for manual optimization."""
        return self._fit_run.manual_optimizers

    def manual_backward(self, loss: torch.Tensor) -> None:
        """Backpropagate in manual optimization."""
        self._fit_run.manual_step.backward(loss)

    @property
    def _fit_run(self) -> FitRun:
        if self._run is None:
            raise UserCodeError(
                "Manual optimization was used while no fit is running.",
                "Use it in training_step, with automatic_optimization = False.",
            )
        return self._run

    # What the loop calls
    def attach(self, run: FitRun) -> None:
        """The fit that is running, for whoever asks this Trainer."""
        self._run = run
        self.metrics = run.metrics

    def detach(self) -> None:
        """The fit is over."""
        self._run = None

    def publish(self, logged: Logged) -> None:
        """Hand the values of a log point to callbacks, progress bar and loggers."""
        self.callback_metrics.update(logged.everything)
        self.progress_bar_metrics.update(logged.prog_bar)
        if logged.logger:
            self.log_metrics(logged.logger)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Send host values to the loggers, on rank 0."""
        self.logged_metrics.update(metrics)
        if self.loggers and self.is_global_zero:
            for each in self.loggers:
                each.log_metrics(metrics, self.global_step if step is None else step)

    def metric(self, name: str | None, who: str) -> float:
        """A metric that was logged. Raises ``ConfigurationError`` with the names there are."""
        if name is None or name not in self.callback_metrics:
            raise ConfigurationError(
                f"{who} monitors {name!r}, and what has been logged is "
                f"{sorted(self.callback_metrics)}.",
                f"Log {name!r} before, or monitor one of these.",
            )
        return self.callback_metrics[name]

    # Runs
    def _launch(
        self,
        stage: str,
        module: Module,
        datamodule: DataModule | None,
        loaders: dict[str, Any],
        ckpt_path: str | os.PathLike[str] | None,
    ) -> Outcome:
        if not isinstance(module, Module):
            raise UserCodeError(
                f"{stage} was called with a {type(module).__name__}, not with a drivetrain.Module.",
                "Subclass Module, or wrap a plain nn.Module in FunctionalModule.",
            )
        self.callbacks = [*self._own_callbacks, *module.configure_callbacks()]
        if stage == "fit":
            check_wants(self.plan, self._wants_of(module))
            check_saves(self.signals, self.callbacks)
        self.runs += 1
        path = self._checkpoint_path(ckpt_path)
        job = Job(stage, module, datamodule, loaders, path)
        ahead = load_optimizers if stage == "fit" else None
        outcome: Outcome = self.runtime.launch(work, self, job, ahead=ahead)
        if not self.runtime.in_place:
            outcome.apply(self, module)
        return outcome

    def _evaluate(
        self, stage: str, module: Module, dataloaders: Any, datamodule: Any, ckpt_path: Any
    ) -> Outcome:
        if isinstance(dataloaders, DataModule):
            dataloaders, datamodule = None, dataloaders
        outcome = self._launch(stage, module, datamodule, {stage: dataloaders}, ckpt_path)
        self._end_if_interrupted()
        return outcome

    def _end_if_interrupted(self) -> None:
        """End this process as its signal asks; at a prompt say so and go on."""
        if self.interrupted is None:
            return
        if self.stop_action is SignalAction.REQUEUE:
            if not self._interactive:
                expect_the_end()
            if self.is_global_zero:
                requeue(self.signals, os.environ)
        if not self._interactive:
            raise Interrupted(self.interrupted)
        log.warning("The run stopped at a step boundary on %s.", self.interrupted.name)

    def _wants_of(self, module: Module) -> tuple[Want, ...]:
        found = Hooks(self, module, self.callbacks).step_hooks()
        wants = [Want(hook, name) for hook, names in found.items() for name in names]
        if not module.automatic_optimization:
            owner = type(module).__name__
            wants.append(Want(Feature.MANUAL_STEP, f"{owner}.automatic_optimization = False"))
        return tuple(wants)

    def _checkpoint_path(self, asked: str | os.PathLike[str] | None) -> str | None:
        if asked is None:
            return None
        asked = os.fspath(asked)
        if asked != "best":
            return asked  # "last" is looked for in the processes of the run
        found: list[str] = [
            path for each in self.callbacks if (path := getattr(each, "best_model_path", ""))
        ]
        if not found:
            raise StorageError(
                "ckpt_path='best' was asked for, and no callback of this Trainer saved one.",
                "Give the path of a checkpoint.",
            )
        return found[0]

    @property
    def _interactive(self) -> bool:
        import __main__

        return not hasattr(__main__, "__file__")

    def __getstate__(self) -> dict[str, Any]:
        live: dict[str, Any] = {"_run": None, "metrics": None, "optimizers": [], "schedulers": []}
        return {**self.__dict__, **live}


T = TypeVar("T")


def _attempt(problems: list[DrivetrainError], make: Callable[..., T], **arguments: Any) -> T | None:
    """What ``make`` makes; None, and its error among the problems, if it cannot."""
    try:
        return make(**arguments)
    except DrivetrainError as problem:
        problems.append(problem)
        return None


def _together(problems: list[DrivetrainError]) -> DrivetrainError:
    """One error for all of them, so that nobody has to correct arguments one by one."""
    if len(problems) == 1:
        return problems[0]
    return ConfigurationError.conflicts([each for one in problems for each in one.problems])


def _listed(given: Any | Sequence[Any] | None) -> list[Any]:
    if given is None:
        return []
    return list(given) if isinstance(given, (list, tuple)) else [given]
