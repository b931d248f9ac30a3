"""Callbacks: code that watches or steers a run without being part of the model."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from drivetrain.module import Module
    from drivetrain.trainer import Trainer


class Moment(str, Enum):
    """When a checkpoint may be saved: counters are final and no accumulation window is open."""

    STEP = "step"
    """After a window, its batch-end hooks, schedulers and log point; before validation."""
    VALIDATION = "validation"
    """After a validation run inside ``fit``."""
    EPOCH = "epoch"
    """After an epoch with all its hooks."""
    END = "end"
    """When ``fit`` has reached its limit."""
    INTERRUPTED = "interrupted"
    """When ``fit`` stops before its limit: on a signal, or after ``max_time``."""


class Callback:
    """Base class; every hook does nothing and costs nothing unless it is overridden.

    Hooks of callbacks run before the module's hook of the same name, in list order, with those that
    save checkpoints last. ``trainer`` and ``module`` are passed in, never stored by the framework.
    """

    saves_checkpoints = False
    """Whether this callback runs after all others."""

    @property
    def state_key(self) -> str:
        """The key under which the state is stored in a checkpoint; unique within a run."""
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """State to save: JSON values and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""

    # The whole run
    def setup(self, trainer: Trainer, module: Module, stage: str) -> None:
        """Before anything else of ``fit``, ``validate``, ``test`` or ``predict``, on every rank."""

    def teardown(self, trainer: Trainer, module: Module, stage: str) -> None:
        """After everything else, also after an error or a signal."""

    def on_exception(self, trainer: Trainer, module: Module, error: BaseException) -> None:
        """When the run ends with an exception."""

    def on_fit_start(self, trainer: Trainer, module: Module) -> None:
        """Module and optimizers are on the device; nothing is restored yet."""

    def on_fit_end(self, trainer: Trainer, module: Module) -> None:
        """The fit is over; module and optimizers are still on the device."""

    def on_sanity_check_start(self, trainer: Trainer, module: Module) -> None:
        """Before the validation batches that are tried before training."""

    def on_sanity_check_end(self, trainer: Trainer, module: Module) -> None:
        """After the validation batches that are tried before training."""

    # Training
    def on_train_start(self, trainer: Trainer, module: Module) -> None:
        """Before the first epoch; everything is restored."""

    def on_train_end(self, trainer: Trainer, module: Module) -> None:
        """After the last epoch."""

    def on_train_epoch_start(self, trainer: Trainer, module: Module) -> None:
        """Before the first batch of an epoch."""

    def on_train_epoch_end(self, trainer: Trainer, module: Module) -> None:
        """After the last batch of an epoch and its validation."""

    def on_train_batch_start(
        self, trainer: Trainer, module: Module, batch: Any, batch_idx: int
    ) -> None:
        """A batch was drawn into the window; it is still on the host."""

    def on_train_batch_end(
        self, trainer: Trainer, module: Module, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The window that holds the batch is done, its update applied or skipped."""

    def on_step_skipped(self, trainer: Trainer, module: Module) -> None:
        """A window ended without an update, because its gradients were not finite."""

    def on_before_backward(self, trainer: Trainer, module: Module, loss: torch.Tensor) -> None:
        """``loss`` is undivided and unscaled."""

    def on_after_backward(self, trainer: Trainer, module: Module) -> None:
        """Gradients of one microbatch were added; they may still be scaled."""

    def on_before_optimizer_step(
        self, trainer: Trainer, module: Module, optimizer: torch.optim.Optimizer
    ) -> None:
        """Gradients are complete and unscaled, and not clipped yet."""

    def on_before_zero_grad(
        self, trainer: Trainer, module: Module, optimizer: torch.optim.Optimizer
    ) -> None:
        """After the update; gradients are about to be cleared."""

    # Validation
    def on_validation_start(self, trainer: Trainer, module: Module) -> None:
        """Before validation."""

    def on_validation_end(self, trainer: Trainer, module: Module) -> None:
        """After validation; its metrics are in ``trainer.callback_metrics``."""

    def on_validation_epoch_start(self, trainer: Trainer, module: Module) -> None:
        """Before the first validation batch."""

    def on_validation_epoch_end(self, trainer: Trainer, module: Module) -> None:
        """After the last validation batch; metrics may still be logged."""

    def on_validation_batch_start(
        self, trainer: Trainer, module: Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Before a validation batch."""

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        module: Module,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """After a validation batch."""

    # Test
    def on_test_start(self, trainer: Trainer, module: Module) -> None:
        """Before testing."""

    def on_test_end(self, trainer: Trainer, module: Module) -> None:
        """After testing."""

    def on_test_epoch_start(self, trainer: Trainer, module: Module) -> None:
        """Before the first test batch."""

    def on_test_epoch_end(self, trainer: Trainer, module: Module) -> None:
        """After the last test batch; metrics may still be logged."""

    def on_test_batch_start(
        self, trainer: Trainer, module: Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Before a test batch."""

    def on_test_batch_end(
        self,
        trainer: Trainer,
        module: Module,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """After a test batch."""

    # Prediction
    def on_predict_start(self, trainer: Trainer, module: Module) -> None:
        """Before prediction."""

    def on_predict_end(self, trainer: Trainer, module: Module) -> None:
        """After prediction."""

    def on_predict_epoch_start(self, trainer: Trainer, module: Module) -> None:
        """Before the first batch to predict."""

    def on_predict_epoch_end(self, trainer: Trainer, module: Module) -> None:
        """After the last batch to predict."""

    def on_predict_batch_start(
        self, trainer: Trainer, module: Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Before a batch to predict."""

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        module: Module,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """After a batch to predict."""

    # Checkpoints
    def on_save_checkpoint(
        self, trainer: Trainer, module: Module, checkpoint: dict[str, Any]
    ) -> None:
        """Add to the tree that is about to be saved."""

    def on_load_checkpoint(
        self, trainer: Trainer, module: Module, checkpoint: dict[str, Any]
    ) -> None:
        """Read from the tree that was loaded."""

    def on_save_opportunity(self, trainer: Trainer, module: Module, moment: Moment) -> None:
        """A checkpoint may be saved now, with ``trainer.save_checkpoint``. Every rank is here."""
