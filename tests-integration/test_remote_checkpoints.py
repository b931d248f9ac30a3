"""A run whose checkpoints are in an S3-compatible store, a real server on loopback."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from drivetrain import Trainer, seed_everything
from drivetrain.callbacks import ModelCheckpoint
from drivetrain_toolkit.checkpoint import DirectoryCheckpointIO
from training_parts import Regression, loader

if TYPE_CHECKING:
    from collections.abc import Iterator

SERVER = Path(__file__).parents[1] / "packages/toolkit/tests/s3_server.py"
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": False,
}
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore::DeprecationWarning",
)


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """How the server is reached; a bucket is there."""
    if importlib.util.find_spec("moto") is None or importlib.util.find_spec("s3fs") is None:
        pytest.skip("needs moto and s3fs")
    import s3fs

    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "AWS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with subprocess.Popen(
        [sys.executable, str(SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        address = f"http://127.0.0.1:{int(process.stdout.readline())}"
        found = {"key": "a", "secret": "b", "client_kwargs": {"endpoint_url": address}}
        s3fs.S3FileSystem(**found).mkdir("bucket")
        yield found
        process.communicate("", timeout=60)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_saves_to_a_store_and_goes_on_from_there(
    options: dict[str, Any], asynchronous: bool
) -> None:
    folder = "s3://bucket/run"
    found: dict[int, Regression] = {}
    for epochs in (1, 2):
        seed_everything(3)
        saver = ModelCheckpoint(
            folder,
            "{step}",
            every_n_train_steps=6,
            save_top_k=2,
            save_last=True,
            asynchronous=asynchronous,
        )
        found[epochs] = Regression()
        io = DirectoryCheckpointIO(storage_options=options)
        trainer = Trainer(max_epochs=epochs, callbacks=[saver], plugins=[io], **QUIET)
        trainer.fit(found[epochs], loader(), ckpt_path="last")
        assert saver.last_model_path == f"{folder}/step={12 * epochs}.ckpt"
    names = {path.rpartition("/")[2] for path in io.list(folder)}
    assert names == {"step=18.ckpt", "step=24.ckpt", "last.ckpt"}
    assert all(io.verify(path) == [] for path in io.list(folder))
    seed_everything(3)
    straight = Regression()
    Trainer(max_epochs=2, **QUIET).fit(straight, loader())
    for one, other in zip(straight.parameters(), found[2].parameters(), strict=True):
        assert torch.equal(one, other)
