"""A backend for the simulated device, made of toolkit parts: whole runs are those of the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from drivetrain_interfaces import (
    Accelerator,
    Backend,
    Capabilities,
    Feature,
    Probe,
    SupportsMemoryStats,
    SupportsRng,
    UnsupportedError,
)

from drivetrain_conformance import simulated

if reason := simulated.unavailable():
    pytest.skip(reason, allow_module_level=True)
for needed in ("drivetrain", "drivetrain_toolkit", "drivetrain_cpu"):
    pytest.importorskip(needed, reason=f"runs need {needed}")

pytestmark = pytest.mark.timeout(600)

HERE = str(Path(__file__).parent)

SCRIPT = """
import json, sys
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import drivetrain
from drivetrain_conformance import simulated


class Net(drivetrain.Module):
    def __init__(self):
        super().__init__()
        # No bias in front of a normalization: its gradient is noise, which Adam scales up.
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3)

class Counting(drivetrain.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if simulated.installed():
            c = simulated.counters()
            self.seen.append([c.synchronizations, c.blocking_uploads, c.downloads, c.collectives])

def main():
    asked = json.loads(sys.argv[1])
    drivetrain.seed_everything(7)
    generator = torch.Generator().manual_seed(5)
    y = torch.randint(0, 10, (192,), generator=generator)
    means = torch.randn(10, 1, 8, 8, generator=generator)
    x = means[y] + 0.3 * torch.randn(192, 1, 8, 8, generator=generator)
    data = [DataLoader(TensorDataset(x[a:b], y[a:b]), 16, shuffle=a == 0)
            for a, b in ((0, 128), (128, 192))]
    where = asked.pop("accelerator")
    if where == "sim":
        from simulated_backend import spec as where
    resume = asked.pop("resume", None)
    counting = Counting()
    trainer = drivetrain.Trainer(
        accelerator=where, default_root_dir=asked.pop("to"), callbacks=[counting],
        log_every_n_steps=100, enable_progress_bar=False,
        gradient_clip_val=1.0, **asked)
    module = Net()
    trainer.fit(module, *data, ckpt_path=resume)
    if trainer.is_global_zero:
        steps = [[b - a for a, b in zip(*pair)]
                 for pair in zip(counting.seen, counting.seen[1:])]
        print(json.dumps({
            "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
            "weights": {k: v.cpu().double().flatten().tolist()
                        for k, v in module.state_dict().items()},
            "device": str(next(module.parameters()).device),
            "steps": steps,
        }), flush=True)

if __name__ == "__main__":
    main()
"""


class Runs:
    """Runs of one script, in processes of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "train.py").write_text(SCRIPT, encoding="utf-8")

    def start(self, name: str, options: simulated.Options | None, **asked: Any) -> Any:
        asked = {"max_epochs": 1, "to": str(self.folder / name), **asked}
        env = {**os.environ, "PYTHONPATH": HERE}
        env |= (options or simulated.Options()).to_environment()
        return subprocess.run(
            [sys.executable, str(self.folder / "train.py"), json.dumps(asked)],
            capture_output=True,
            text=True,
            timeout=300,
            env=env,
            check=False,
        )

    def __call__(
        self, name: str, options: simulated.Options | None = None, **asked: Any
    ) -> dict[str, Any]:
        done = self.start(name, options, **asked)
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result

    def checkpoint(self, name: str) -> str:
        (path,) = (self.folder / name / "checkpoints").iterdir()
        return str(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def on_cpu(runs: Runs) -> dict[str, Any]:
    return runs("cpu", accelerator="cpu", devices=1)


@pytest.fixture(scope="module")
def on_sim(runs: Runs) -> dict[str, Any]:
    return runs("sim", accelerator="sim", devices=1)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(HERE)
    import simulated_backend

    return simulated_backend


def close(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(
        values == pytest.approx(other["weights"][name], rel=1e-4, abs=1e-5)
        for name, values in one["weights"].items()
    )


# Runs ---------------------------------------------------------------------------------------------


def test_a_run_on_one_device_is_the_run_on_the_cpu(
    on_cpu: dict[str, Any], on_sim: dict[str, Any]
) -> None:
    assert (on_cpu["device"], on_sim["device"]) == ("cpu", "sim:0")
    assert on_sim["metrics"] == pytest.approx(on_cpu["metrics"], rel=1e-5)
    assert close(on_sim, on_cpu)


def test_no_step_makes_the_host_wait(on_sim: dict[str, Any]) -> None:
    assert len(on_sim["steps"]) == 7
    assert all(step == [0, 0, 0, 0] for step in on_sim["steps"])


def test_two_processes_train_as_two_on_the_cpu_without_waiting(runs: Runs) -> None:
    cpu = runs("cpu-2", accelerator="cpu", devices=2)
    sim = runs("sim-2", accelerator="sim", devices=2)
    assert sim["metrics"] == pytest.approx(cpu["metrics"], rel=1e-5)
    assert close(sim, cpu)
    # Torch itself reads once, in the second step, when ranks agree on the order of gradients.
    for waits, uploads, downloads, collectives in sim["steps"][1:]:
        assert waits == uploads == downloads == 0
        assert collectives > 0


@pytest.mark.parametrize(("precision", "reads"), [("bf16-mixed", 0), ("16-mixed", 1)])
def test_lower_precision_comes_close_and_only_a_loss_scale_is_read(
    precision: str, reads: int, runs: Runs, on_sim: dict[str, Any]
) -> None:
    done = runs(precision, accelerator="sim", devices=1, precision=precision)
    assert done["metrics"]["loss"] == pytest.approx(on_sim["metrics"]["loss"], rel=0.05)
    assert {step[0] for step in done["steps"]} == {reads}


def test_a_checkpoint_of_either_goes_on_on_the_other_exactly(
    runs: Runs, on_cpu: dict[str, Any], on_sim: dict[str, Any]
) -> None:
    assert on_cpu
    assert on_sim
    straight = runs("straight", accelerator="cpu", devices=1, max_epochs=2)
    for start, other in (("cpu", "sim"), ("sim", "cpu")):
        resumed = runs(
            f"{start}-{other}",
            accelerator=other,
            devices=1,
            max_epochs=2,
            resume=runs.checkpoint(start),
        )
        assert close(resumed, straight)


def test_too_little_memory_is_the_error_of_the_run(runs: Runs) -> None:
    done = runs.start("memory", simulated.Options(memory_limit=50_000), accelerator="sim")
    assert done.returncode != 0
    assert "OutOfMemoryError: Simulated device out of memory" in done.stderr


def test_a_device_that_fails_on_one_rank_ends_all_and_is_named(runs: Runs) -> None:
    options = simulated.Options(fail_at_launch=300, fault_rank=1)
    done = runs.start("fails", options, accelerator="sim", devices=2)
    assert done.returncode != 0
    assert "Simulated device error: device 1 failed" in done.stderr


# The backend --------------------------------------------------------------------------------------


def test_importing_and_probing_the_spec_loads_no_torch() -> None:
    code = (
        "import sys; from simulated_backend import spec; print(spec.probe().devices, "
        "[m for m in ('torch', 'numpy') if m in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": HERE, **simulated.Options(devices=3).to_environment()}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env=env,
        check=True,
    )
    assert done.stdout.strip() == "3 []"


def test_the_probe_says_what_is_missing(package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(simulated, "unavailable", lambda: "There is no compiler.")
        assert package.spec.probe() == Probe(devices=0, reason="There is no compiler.")
    monkeypatch.setenv(simulated.VARIABLE, "{")
    probe = package.spec.probe()
    assert probe.devices == 0
    assert simulated.VARIABLE in probe.reason


def test_what_the_device_lacks_is_not_declared(package: Any) -> None:
    whole: Capabilities = package.capabilities(simulated.Options())
    assert {Feature.INFERENCE_MODE, Feature.SYNC_BATCHNORM} <= whole.features
    assert "16-mixed" in whole.precisions
    less = package.capabilities(simulated.Options(fp16=False, inference_mode=False))
    assert whole.features - less.features == {Feature.INFERENCE_MODE}
    assert whole.precisions - less.precisions == {"16-mixed", "16-true"}


def test_its_parts_are_what_the_contracts_ask_for(package: Any) -> None:
    backend = package.spec.load()
    assert isinstance(backend, Backend)
    accelerator = backend.accelerator()
    for contract in (Accelerator, SupportsMemoryStats, SupportsRng):
        assert isinstance(accelerator, contract)
    assert accelerator.facts is package.spec.facts
    device = accelerator.activate(1, 1)
    assert str(device) == "sim:1"
    assert set(accelerator.memory_stats(device)) == {"allocated", "peak"}
    state = accelerator.rng_state(device)
    accelerator.set_rng_state(state, device)
    accelerator.synchronize(device)
    accelerator.close()
    accelerator.close()


def test_what_is_not_declared_is_refused(package: Any) -> None:
    backend = package.spec.load()
    with simulated.configured(fp16=False), pytest.raises(UnsupportedError, match="'16-mixed'"):
        backend.precision("16-mixed")
    with pytest.raises(UnsupportedError, match="'fsdp'"):
        backend.strategy("fsdp", None)
