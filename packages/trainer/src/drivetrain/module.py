"""The user's model: an ``nn.Module`` with steps, optimizers and hooks."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from drivetrain_interfaces import UserCodeError
from torch import nn

from drivetrain.metrics import Options

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from types import FrameType

    from drivetrain_interfaces import CheckpointIO
    from typing_extensions import Self

    from drivetrain.manual import ManualOptimizer
    from drivetrain.trainer import Trainer


class Module(nn.Module):
    """A model that the Trainer can fit.

    Override ``training_step`` and ``configure_optimizers``, and whatever else you need. Hooks have
    the names and the order that users of Lightning know; docs/loop.md lists where they differ.

    Attributes:
        automatic_optimization: False for code that calls ``manual_backward`` and steps itself.
        strict_loading: Whether a checkpoint must hold exactly this module's parameters.
    """

    automatic_optimization: bool = True
    strict_loading: bool = True
    #: The trainer while one is attached; plain attributes, so that ``nn.Module`` ignores them.
    _trainer: Trainer | None = None
    _hparams: dict[str, Any] | None = None

    # Steps
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Compute the loss of one batch.

        Returns:
            A scalar tensor that requires grad, or a dictionary with it under ``"loss"``. With
            manual optimization the value is passed on to ``on_train_batch_end`` as it is.
        """
        raise NotImplementedError

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Evaluate one validation batch."""
        raise NotImplementedError

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Evaluate one test batch."""
        raise NotImplementedError

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Predict one batch; by default calls the module with it."""
        return self(batch)

    def batch_weight(self, batch: Any) -> float:
        """The weight of a batch in an accumulation window, such as its number of tokens.

        By default the number of samples. An override is totalled over all ranks, in one small
        collective per window.
        """
        raise NotImplementedError

    # Configuration
    def configure_optimizers(self) -> Any:
        """The optimizers, and schedulers if any. Called when the module is on its device."""
        raise NotImplementedError

    def configure_model(self) -> None:
        """Create layers late, in every process; called before weights are restored."""

    def configure_callbacks(self) -> Sequence[Any]:
        """Callbacks that belong to this model."""
        return ()

    # Data, where no DataModule is used
    def prepare_data(self) -> None:
        """Download or convert, once per machine."""

    def train_dataloader(self) -> Any:
        """The batches to train on."""
        return None

    def val_dataloader(self) -> Any:
        """The batches to validate on, or a list of loaders."""
        return None

    def test_dataloader(self) -> Any:
        """The batches to test on, or a list of loaders."""
        return None

    def predict_dataloader(self) -> Any:
        """The batches to predict, or a list of loaders."""
        return None

    # Hooks; the callbacks' hooks of the same names say when each runs
    def setup(self, stage: str) -> None:
        """On every rank, before anything else; ``stage`` is fit, validate, test or predict."""

    def teardown(self, stage: str) -> None:
        """After everything else, also after an error or a signal."""

    def on_fit_start(self) -> None:
        """See ``Callback.on_fit_start``."""

    def on_fit_end(self) -> None:
        """See ``Callback.on_fit_end``."""

    def on_train_start(self) -> None:
        """See ``Callback.on_train_start``."""

    def on_train_end(self) -> None:
        """See ``Callback.on_train_end``."""

    def on_train_epoch_start(self) -> None:
        """See ``Callback.on_train_epoch_start``."""

    def on_train_epoch_end(self) -> None:
        """See ``Callback.on_train_epoch_end``."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """A batch was drawn; return -1 to end the epoch before it."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """See ``Callback.on_train_batch_end``."""

    def on_step_skipped(self) -> None:
        """See ``Callback.on_step_skipped``."""

    def on_before_backward(self, loss: torch.Tensor) -> None:
        """See ``Callback.on_before_backward``."""

    def on_after_backward(self) -> None:
        """See ``Callback.on_after_backward``."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """See ``Callback.on_before_optimizer_step``."""

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        """See ``Callback.on_before_zero_grad``."""

    def on_validation_start(self) -> None:
        """See ``Callback.on_validation_start``."""

    def on_validation_end(self) -> None:
        """See ``Callback.on_validation_end``."""

    def on_validation_epoch_start(self) -> None:
        """See ``Callback.on_validation_epoch_start``."""

    def on_validation_epoch_end(self) -> None:
        """See ``Callback.on_validation_epoch_end``."""

    def on_validation_batch_start(
        self, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """See ``Callback.on_validation_batch_start``."""

    def on_validation_batch_end(
        self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """See ``Callback.on_validation_batch_end``."""

    def on_test_start(self) -> None:
        """See ``Callback.on_test_start``."""

    def on_test_end(self) -> None:
        """See ``Callback.on_test_end``."""

    def on_test_epoch_start(self) -> None:
        """See ``Callback.on_test_epoch_start``."""

    def on_test_epoch_end(self) -> None:
        """See ``Callback.on_test_epoch_end``."""

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """See ``Callback.on_test_batch_start``."""

    def on_test_batch_end(
        self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """See ``Callback.on_test_batch_end``."""

    def on_predict_start(self) -> None:
        """See ``Callback.on_predict_start``."""

    def on_predict_end(self) -> None:
        """See ``Callback.on_predict_end``."""

    def on_predict_epoch_start(self) -> None:
        """See ``Callback.on_predict_epoch_start``."""

    def on_predict_epoch_end(self) -> None:
        """See ``Callback.on_predict_epoch_end``."""

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """See ``Callback.on_predict_batch_start``."""

    def on_predict_batch_end(
        self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """See ``Callback.on_predict_batch_end``."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The batch on the host, before it goes to the device."""
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The batch on the device."""
        return batch

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add to the tree that is about to be saved."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read from the tree that was loaded."""

    # Logging
    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,  # noqa: FBT001, FBT002 - the signature users know
        logger: bool = True,  # noqa: FBT001, FBT002
        on_step: bool | None = None,  # noqa: FBT001
        on_epoch: bool | None = None,  # noqa: FBT001
        reduce_fx: str | Callable[..., Any] = "mean",
        sync_dist: bool | None = None,  # noqa: FBT001
        batch_size: int | None = None,
    ) -> None:
        """Log a number or a tensor of one element. It stays on its device until a log point.

        Args:
            name: The metric's name.
            value: The value; also an object with ``compute`` and ``reset``.
            prog_bar: Show it in the progress bar.
            logger: Send it to the loggers.
            on_step: Report the newest value at log points; by default while training.
            on_epoch: Report the epoch's reduction; by default in evaluation and epoch-end hooks.
            reduce_fx: ``"mean"`` (weighted by batch size), ``"sum"``, ``"min"`` or ``"max"``.
            sync_dist: Reduce over ranks. By default epoch values are reduced and step values are
                rank 0's own.
            batch_size: The weight of the value, if not the number of samples in the batch.
        """
        trainer = self._trainer
        metrics = None if trainer is None else trainer.metrics
        if metrics is None:
            raise UserCodeError(
                f"log({name!r}) was called while no trainer runs this module.",
                "Call log from a step or a hook.",
            )
        metrics.log(
            name,
            value,
            Options(prog_bar, logger, on_step, on_epoch, reduce_fx, sync_dist),
            batch_size,
        )

    def log_dict(self, values: Mapping[str, Any], **options: Any) -> None:
        """``log`` for several names with the same options."""
        for name, value in values.items():
            self.log(name, value, **options)

    # Access
    @property
    def trainer(self) -> Trainer:
        """The trainer that runs this module. Raises ``UserCodeError`` when none does."""
        if self._trainer is None:
            raise UserCodeError(
                f"{type(self).__name__}.trainer was read while no trainer runs this module.",
                "Read it from a step or a hook.",
            )
        return self._trainer

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next((parameter.device for parameter in self.parameters()), torch.device("cpu"))

    @property
    def current_epoch(self) -> int:
        """Epochs completed by the trainer."""
        return self._trainer.current_epoch if self._trainer else 0

    @property
    def global_step(self) -> int:
        """Optimizer steps applied by the trainer."""
        return self._trainer.global_step if self._trainer else 0

    def print(self, *values: Any) -> None:
        """Print on rank 0 only."""
        if self._trainer is None or self._trainer.is_global_zero:
            print(*values)  # noqa: T201 - that is what it is for

    # Manual optimization
    def optimizers(self) -> ManualOptimizer | list[ManualOptimizer]:
        """The optimizers for manual optimization: one, or a list of several."""
        made = self.trainer.manual_optimizers
        return made[0] if len(made) == 1 else list(made)

    def lr_schedulers(self) -> Any:
        """The schedulers: none, one, or a list of several."""
        made = [scheduled.scheduler for scheduled in self.trainer.schedulers]
        return None if not made else made[0] if len(made) == 1 else made

    def manual_backward(self, loss: torch.Tensor) -> None:
        """Backpropagate in manual optimization."""
        self.trainer.manual_backward(loss)

    def freeze(self) -> None:
        """Stop training all parameters."""
        self.requires_grad_(requires_grad=False)
        self.eval()

    def unfreeze(self) -> None:
        """Train all parameters again."""
        self.requires_grad_(requires_grad=True)
        self.train()

    # Hyperparameters
    @property
    def hparams(self) -> dict[str, Any]:
        """What ``save_hyperparameters`` has recorded."""
        if self._hparams is None:
            self._hparams = {}
        return self._hparams

    def save_hyperparameters(self, *names: str, ignore: Iterable[str] = ()) -> None:
        """Record the arguments of ``__init__`` for checkpoints and loggers. Call it there.

        Args:
            names: The arguments to record; all of them if none is named.
            ignore: Arguments to leave out, such as other modules.
        """
        frame = inspect.currentframe()
        arguments = _init_arguments(self, frame.f_back if frame else None)
        left_out = set(ignore)
        self.hparams.update(
            {
                name: value
                for name, value in arguments.items()
                if name not in left_out and (not names or name in names)
            }
        )

    @classmethod
    def load_from_checkpoint(
        cls,
        path: str,
        *,
        checkpoint_io: CheckpointIO | None = None,
        strict: bool = True,
        **init: Any,
    ) -> Self:
        """Build a module with saved hyperparameters and load its weights.

        Args:
            path: The checkpoint.
            checkpoint_io: What reads it; by default that of the best available backend.
            strict: Whether the parameters must match exactly.
            init: Arguments of ``__init__`` that replace or complete the saved ones.
        """
        from drivetrain.snapshot import read_checkpoint

        tree = read_checkpoint(path, checkpoint_io)
        module = cls(**{**accepted(cls, tree.get("hyper_parameters", {})), **init})
        module.load_state_dict(tree["module"], strict=strict)
        return module


def _init_arguments(module: Module, frame: FrameType | None) -> dict[str, Any]:
    """The arguments of every ``__init__`` that is running for ``module``, subclasses' last."""
    found: dict[str, Any] = {}
    while frame is not None and frame.f_code.co_name == "__init__":
        own = inspect.getargvalues(frame)
        if not own.args or own.locals.get(own.args[0]) is not module:
            break
        found.update({name: own.locals[name] for name in own.args[1:] if name in own.locals})
        if own.keywords:
            found.update(own.locals.get(own.keywords, {}))
        frame = frame.f_back
    return found


def accepted(cls: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those that ``cls`` takes: a base class may have recorded what a subclass decides itself."""
    taken = inspect.signature(cls).parameters
    if any(each.kind is each.VAR_KEYWORD for each in taken.values()):
        return dict(arguments)
    return {name: value for name, value in arguments.items() if name in taken}


class FunctionalModule(Module):
    """A plain ``nn.Module`` and functions beside it, for those who do not want to subclass.

    Args:
        model: The network.
        training_step: Called with the network and a batch; returns the loss.
        optimizer: Called with the network's parameters; returns the optimizer.
        validation_step: Called with the network and a batch; returns metrics by name, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        training_step: Callable[[nn.Module, Any], torch.Tensor],
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        validation_step: Callable[[nn.Module, Any], Mapping[str, Any] | None] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self._training = training_step
        self._optimizer = optimizer
        self._validation = validation_step

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's own forward."""
        return self.model(*args, **kwargs)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """The loss that the user's function returns; logged as ``loss``."""
        loss = self._training(self.model, batch)
        if isinstance(loss, torch.Tensor) and loss.numel() == 1:
            self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Logs whatever the user's function returns."""
        if self._validation is not None:
            self.log_dict(self._validation(self.model, batch) or {}, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """The optimizer that the user's function makes."""
        return self._optimizer(self.model.parameters())
