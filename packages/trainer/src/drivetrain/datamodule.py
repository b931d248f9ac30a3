"""Data that belongs together: preparing it, splitting it, and its loaders."""

from __future__ import annotations

from typing import Any


class DataModule:
    """Loaders with the preparation they need. Every method may be left out."""

    def prepare_data(self) -> None:
        """Download or convert, once per machine. Set no attributes here: other ranks miss them."""

    def setup(self, stage: str) -> None:
        """Build data sets, on every rank; ``stage`` is fit, validate, test or predict."""

    def teardown(self, stage: str) -> None:
        """Release what ``setup`` opened, also after an error or a signal."""

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

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The batch on the host, before it goes to the device."""
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The batch on the device."""
        return batch

    def on_exception(self, error: BaseException) -> None:
        """When the run ends with an exception."""

    def state_dict(self) -> dict[str, Any]:
        """State to save: JSON values and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
