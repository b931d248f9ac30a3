"""One run of the Trainer in one process: setting up, fitting or evaluating, and tearing down."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
from drivetrain_interfaces import (
    ConfigurationError,
    DataError,
    EvalSpec,
    Feature,
    ManualSpec,
    StepHooks,
    StepSpec,
    SupportsManualStep,
    SupportsSideChannel,
    UserCodeError,
    refuse_what_is_newer,
)

from drivetrain import snapshot
from drivetrain.batches import size_of
from drivetrain.counters import Progress
from drivetrain.data import feed_of, limited, loaders_of
from drivetrain.datamodule import DataModule
from drivetrain.evaluate import Evaluation, evaluate, isolated
from drivetrain.exchange import gather_objects
from drivetrain.hooks import Hooks, overrides, trimmed
from drivetrain.loop import FitRun, fit
from drivetrain.losses import LossWatch
from drivetrain.manual import ManualOptimizer
from drivetrain.metrics import Metrics
from drivetrain.module import Module
from drivetrain.optim import configured
from drivetrain.seeding import data_seed
from drivetrain.stopping import StopRequest
from drivetrain.watching import Watch
from drivetrain.windows import AutomaticWindow, ManualWindow

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from drivetrain_interfaces import SideChannel

    from drivetrain.runtime import Runtime, Stack
    from drivetrain.signals import SignalWatch
    from drivetrain.trainer import Trainer

log = logging.getLogger("drivetrain")

_LOADERS = {
    "fit": "train_dataloader",
    "validate": "val_dataloader",
    "test": "test_dataloader",
    "predict": "predict_dataloader",
}
_KINDS = {"validate": "validation", "test": "test", "predict": "predict"}


class Session:
    """The parts of one run. Made when the processes are up, gone when the run is over."""

    def __init__(
        self,
        trainer: Trainer,
        runtime: Runtime,
        module: Module,
        datamodule: DataModule | None,
        stage: str,
        signals: SignalWatch,
    ) -> None:
        self.trainer = trainer
        self.signals = signals
        self.module = module
        self.datamodule = datamodule
        self.stage = stage
        self.runtime = runtime
        self.stack: Stack = runtime.stack
        self.settings = trainer.settings
        self.hooks = Hooks(trainer, module, trainer.callbacks)
        run = uuid4().hex  # entries stay in the store, and other runs of this script use it too
        self.seed: int
        self.seed, self._run = self.stack.collectives.broadcast_object((data_seed(), run))
        self.watch = Watch(
            self.stack.world,
            self.stack.collectives,
            self._side_channel(),
            f"watch-{self._run}",
            signals,
            self.settings.hang_seconds,
        )

    # Around every run
    def prepare(self) -> None:
        """Prepare data once per machine, then run the set-up hooks on every rank."""
        if self.stack.world.local_rank == 0:
            if self.datamodule is not None:
                self.datamodule.prepare_data()
            self.module.prepare_data()
        self.stack.collectives.barrier()
        if self.datamodule is not None:
            self.datamodule.setup(self.stage)
        self.hooks.call("setup", self.stage)
        self.module.configure_model()

    def teardown(self) -> None:
        """Run the tear-down hooks, also after an error."""
        if self.datamodule is not None:
            self.datamodule.teardown(self.stage)
        self.hooks.call("teardown", self.stage)

    def failed(self, error: BaseException) -> None:
        """Tell callbacks and the data module that the run ends with an error."""
        if self.datamodule is not None:
            self.datamodule.on_exception(error)
        self.hooks.call("on_exception", error)

    # Fit
    def fit(self, loaders: Mapping[str, Any], tree: Mapping[str, Any] | None) -> None:
        """Train from the beginning, or from a checkpoint's tree."""
        strategy = self.stack.strategy
        train = feed_of(
            self._loader("fit", loaders),
            self.stack.world,
            seed=self._seed_of(tree),
            training=True,
            distribute=self.settings.use_distributed_sampler,
            name="train loader",
        )
        self._say(train.notice)
        limit = self._limit("train", train.length)
        self._check_even(limit)
        placed = strategy.prepare(self.module)
        optimizers, schedulers = configured(
            placed.configure_optimizers(),  # type: ignore[operator]  # the user's own module
            type(self.module).__name__,
        )
        self.trainer.optimizers, self.trainer.schedulers = optimizers, schedulers
        stop = self._stop_request()
        validation = self._evaluation("validate", placed, loaders, required=False, stop=stop)
        metrics = self._metrics(training=True)
        window, step = self._training_step(placed, metrics)
        run = FitRun(
            trainer=self.trainer,
            module=self.module,
            datamodule=self.datamodule,
            stack=self.stack,
            settings=self.settings,
            hooks=self.hooks,
            progress=Progress(),
            feed=train,
            validation=validation,
            schedulers=schedulers,
            metrics=metrics,
            losses=LossWatch(self.settings.nan_loss),
            stop=stop,
            watch=self.watch,
            train_window=window,
            seed=self.seed,
            limit=limit,
        )
        self._check_interval(run)
        if isinstance(window, ManualWindow):
            run.manual_optimizers = [
                ManualOptimizer(optimizer, window.step, run.progress) for optimizer in optimizers
            ]
        self.trainer.attach(run)
        self.hooks.call("on_fit_start")
        if tree is not None:
            snapshot.restore(run, tree)
            run.restore_rng = partial(snapshot.restore_rng, run, tree)
            if self.stack.world.is_main:
                for each in self.trainer.loggers:
                    each.continue_from(run.progress.global_step)
        if self.settings.seconds is not None:
            run.deadline = run.started + self.settings.seconds - run.progress.elapsed
        with stop, step:
            if validation is not None and tree is None and self.settings.num_sanity_val_steps:
                self._sanity_check(validation)
            self.watch.begin(stop, run)
            fit(run)
            self._part()
        self._stopped_by(stop)
        self.hooks.call("on_fit_end")

    def _seed_of(self, tree: Mapping[str, Any] | None) -> int:
        """The seed of the order of samples: the checkpoint's, if it says one."""
        saved = None if tree is None else tree.get("data", {}).get("seed")
        return self.seed if saved is None else saved

    def _part(self) -> None:
        """The end of what ranks do together. Rank 0 may hold the store that threads look at."""
        self.stack.collectives.barrier()
        self.watch.close()

    def _training_step(self, placed: Any, metrics: Metrics) -> tuple[Any, Any]:
        feed = self._feed(0)
        keep = bool(self.hooks.table("on_train_batch_end", 3))
        optimizers = self.trainer.optimizers
        if not self.module.automatic_optimization:
            self._refuse_what_manual_code_decides()
            manual_window = ManualWindow(feed, metrics)
            return manual_window, self._manual_step(placed, manual_window)
        if not optimizers:
            raise UserCodeError(
                f"{type(self.module).__name__}.configure_optimizers returned no optimizer.",
                "Return one, or set automatic_optimization = False.",
            )
        window = AutomaticWindow(placed, feed, metrics, keep=keep)
        own_weight = overrides(self.module, Module, "batch_weight")
        spec = StepSpec(
            module=placed,
            optimizers=optimizers,
            loss=window.loss,
            accumulate=self.settings.accumulate_grad_batches,
            clip=self.settings.clip,
            hooks=self._step_hooks(),
            weight=self.module.batch_weight if own_weight else size_of,
            weight_over_ranks=own_weight,
        )
        plan, parts = self.runtime.plan, self.runtime.parts
        refuse_what_is_newer(spec, plan.owner, parts.spec.contract)
        window.step = self.stack.strategy.train_step(spec)
        return window, window.step

    def _refuse_what_manual_code_decides(self) -> None:
        settings = self.settings
        why = f"was asked for, and {type(self.module).__name__} steps its optimizers itself."
        problems = []
        if settings.clip is not None:
            what = f"gradient_clip_val={settings.gradient_clip_val!r} {why}"
            problems.append((what, "Clip there, such as optimizer.step(max_norm=1.0)."))
        if settings.accumulate_grad_batches > 1:
            what = f"accumulate_grad_batches={settings.accumulate_grad_batches} {why}"
            problems.append((what, "Step and clear gradients there, every so many batches."))
        if problems:
            raise ConfigurationError.conflicts(problems)

    def _manual_step(self, placed: Any, window: ManualWindow) -> Any:
        strategy = self.stack.strategy
        if not isinstance(strategy, SupportsManualStep):  # the plan has refused it before
            raise ConfigurationError(
                f"The strategy {self.runtime.plan.strategy!r} offers no manual optimization.",
                "Use automatic optimization.",
            )
        call = trimmed(placed.training_step, 2)
        spec = ManualSpec(placed, self.trainer.optimizers, lambda _module, *args: call(*args))
        window.step = strategy.manual_step(spec)
        return window.step

    def _step_hooks(self) -> StepHooks:
        """One callable per moment that somebody overrides, None for the others."""

        def each_optimizer(name: str) -> Callable[..., None] | None:
            calls = self.hooks.table(name, 1)

            def run(optimizers: Any) -> None:
                for optimizer in optimizers:
                    for call in calls:
                        call(optimizer)

            return run if calls else None

        def plain(name: str, offered: int) -> Callable[..., None] | None:
            calls = self.hooks.table(name, offered)

            def run(*args: Any) -> None:
                for call in calls:
                    call(*args)

            return run if calls else None

        return StepHooks(
            before_backward=plain("on_before_backward", 1),
            after_backward=plain("on_after_backward", 0),
            before_optimizer_step=each_optimizer("on_before_optimizer_step"),
            before_zero_grad=each_optimizer("on_before_zero_grad"),
        )

    def _sanity_check(self, validation: Evaluation) -> None:
        """Try some validation batches first; it touches no metric, counter or random number."""
        most = self.settings.num_sanity_val_steps
        self.trainer.sanity_checking = True
        self.hooks.call("on_sanity_check_start")
        with isolated(self.stack.accelerator, self.stack.strategy.device):
            evaluate(validation, quietly=True, most=None if most < 0 else most)
        self.hooks.call("on_sanity_check_end")
        self.trainer.sanity_checking = False

    def _stop_request(self) -> StopRequest:
        channel = self._side_channel()
        stop = StopRequest(self.stack.world, channel, f"stop-{self._run}", self.signals.policy)
        self.signals.listen(stop.ask)
        return stop

    def _side_channel(self) -> SideChannel | None:
        collectives = self.stack.collectives
        if self.stack.world.size == 1 or not isinstance(collectives, SupportsSideChannel):
            return None
        return collectives.side_channel()

    def _stopped_by(self, stop: StopRequest) -> None:
        """Keep what the ranks agreed on. What comes from now on is for whoever called."""
        self.trainer.interrupted = stop.signal
        self.trainer.stop_action = stop.action if stop.signal else None

    # Evaluation
    def evaluate(
        self, loaders: Mapping[str, Any], tree: Mapping[str, Any] | None
    ) -> tuple[dict[str, float], list[list[Any]]]:
        """Run ``validate``, ``test`` or ``predict``; returns metrics and outputs."""
        placed = self.stack.strategy.prepare(self.module)
        if tree is not None:
            snapshot.restore_module(
                self.module, self.stack, tree, strict=self.module.strict_loading
            )
        stop = self._stop_request()
        run = self._evaluation(self.stage, placed, loaders, required=True, stop=stop)
        assert run is not None
        with stop:
            self.watch.begin(stop)
            found = evaluate(run)
            self._part()
        self._stopped_by(stop)
        return found, run.outputs

    def _evaluation(
        self,
        stage: str,
        placed: Any,
        loaders: Mapping[str, Any],
        *,
        required: bool,
        stop: StopRequest | None,
    ) -> Evaluation | None:
        name = {"validate": "val"}.get(stage, stage)
        step_name = f"{_KINDS[stage]}_step"
        given = self._loader(stage, loaders, required=required)
        has_step = stage == "predict" or overrides(self.module, Module, step_name)
        if given is None or not has_step:
            if required or (given is not None and loaders.get(stage) is not None):
                raise UserCodeError(
                    f"A {name} loader was given, and {type(self.module).__name__} has no "
                    f"{step_name}.",
                    f"Override {step_name}.",
                )
            return None
        feeds = [
            feed_of(
                loader,
                self.stack.world,
                seed=self.seed,
                training=False,
                distribute=self.settings.use_distributed_sampler,
                name=f"{name} loader",
            )
            for loader in loaders_of(given)
        ]
        for notice in dict.fromkeys(feed.notice for feed in feeds):
            self._say(notice)
        limits = [self._limit(name, feed.length) for feed in feeds]
        self.trainer.limits[_KINDS[stage]] = limits
        if not required and all(limit == 0 for limit in limits):
            return None
        # With one loader the user's step gets no loader number, as it may not take one.
        offered = 3 if len(feeds) > 1 else 2
        call = trimmed(getattr(placed, step_name), offered)

        def function(_module: Any, *args: Any) -> Any:
            return call(*args[:offered])

        # Inside a fit, tensors made in inference mode could not be used in training later.
        inference = (
            self.settings.inference_mode
            and self.stage != "fit"
            and Feature.INFERENCE_MODE in self.runtime.plan.capabilities
        )
        return Evaluation(
            kind=_KINDS[stage],
            trainer=self.trainer,
            module=placed,
            hooks=self.hooks,
            feeds=feeds,
            limits=limits,
            step=self.stack.strategy.eval_step(EvalSpec(placed, function, inference)),
            metrics=partial(self._metrics, training=False),
            feed=self._feed_numbered(),
            stop=stop,
            keep=stage == "predict",
        )

    # Pieces
    def _metrics(self, *, training: bool) -> Metrics:
        stack = self.stack
        return Metrics(stack.collectives, stack.world, stack.strategy.device, training=training)

    def _loader(self, stage: str, loaders: Mapping[str, Any], *, required: bool = True) -> Any:
        given = loaders.get(stage)
        name = _LOADERS[stage]
        for owner in (self.datamodule, self.module):
            if given is None and owner is not None:
                given = getattr(owner, name)()
        if given is None and required:
            raise ConfigurationError(
                f"{self.stage} was called without batches: no {name} was given.",
                f"Pass a loader or a DataModule, or override {name} in "
                f"{type(self.module).__name__}.",
            )
        return given

    def _limit(self, name: str, length: int | None) -> int | None:
        if self.settings.fast_dev_run:
            most = int(self.settings.fast_dev_run)
            return most if length is None else min(most, length)
        argument = f"limit_{name}_batches"
        return limited(length, getattr(self.settings, argument), argument)

    def _check_even(self, limit: int | None) -> None:
        """Ranks train together in every step, so each needs as many batches as the others."""
        world = self.stack.world
        if world.size == 1:
            return
        strategy = self.stack.strategy
        limits = gather_objects(limit, self.stack.collectives, strategy.device)
        if len(set(limits)) > 1:
            raise DataError(
                f"The train loaders of the ranks have {limits} batches (None: not known).",
                "Give every rank equally many batches, such as by limit_train_batches.",
            )

    def _check_interval(self, run: FitRun) -> None:
        asked = self.settings.val_check_interval
        too_far = isinstance(asked, int) and run.limit is not None and asked > run.limit
        fraction = isinstance(asked, float) and run.limit is None and asked != 1.0
        if run.validation is not None and (too_far or fraction):
            has = "no length" if fraction else f"{run.limit} batches per epoch"
            raise ConfigurationError(
                f"val_check_interval={asked!r} was asked for, and the train loader has {has}.",
                "Give a number of batches that an epoch holds.",
            )

    def _feed(self, number: int) -> Callable[[Any], Any]:
        """The strategy's own feed, unless the user overrides a transfer hook."""
        feed = self.stack.strategy.feed
        before = self._transfer_hook("on_before_batch_transfer")
        after = self._transfer_hook("on_after_batch_transfer")
        if before is None and after is None:
            return feed

        def with_hooks(batch: Any) -> Any:
            batch = feed(batch if before is None else before(batch, number))
            return batch if after is None else after(batch, number)

        return with_hooks

    def _feed_numbered(self) -> Callable[[Any, int], Any]:
        feeds: dict[int, Callable[[Any], Any]] = {}

        def feed(batch: Any, number: int) -> Any:
            if number not in feeds:
                feeds[number] = self._feed(number)
            return feeds[number](batch)

        return feed

    def _transfer_hook(self, name: str) -> Callable[..., Any] | None:
        if self.datamodule is not None and overrides(self.datamodule, DataModule, name):
            return trimmed(getattr(self.datamodule, name), 2)
        if overrides(self.module, Module, name):
            return trimmed(getattr(self.module, name), 2)
        return None

    def _say(self, notice: str) -> None:
        if notice and self.stack.world.is_main:
            log.warning("%s", notice)


class determinism:  # noqa: N801 - used as a function
    """Deterministic algorithms inside, what was set before afterwards.

    Args:
        asked: True, ``"warn"``, or False and None to leave torch's setting alone.
    """

    def __init__(self, *, asked: bool | str | None) -> None:
        self._asked = asked

    def __enter__(self) -> None:
        self._before = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        if self._asked:
            torch.use_deterministic_algorithms(True, warn_only=self._asked == "warn")  # noqa: FBT003

    def __exit__(self, *exc: object) -> None:
        torch.use_deterministic_algorithms(self._before[0], warn_only=self._before[1])
