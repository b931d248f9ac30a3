"""The README's example, unchanged but for the accelerator."""

from __future__ import annotations

import re
from pathlib import Path

import drivetrain
import pytest
import torch

README = Path(__file__).parents[3] / "README.md"


def accuracy(accelerator, folder, monkeypatch, **changes):
    """Run the block of code and look at what it leaves; its data and weights are seeded."""
    text = README.read_text(encoding="utf-8").split("## In code")[1]
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    assert 'accelerator="cpu"' in code
    code = code.replace('accelerator="cpu"', f'accelerator="{accelerator}"')
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    monkeypatch.chdir(folder)
    drivetrain.seed_everything(3)
    left = {"__name__": "readme"}
    exec(compile(code, str(README), "exec"), left)
    module = left["trainer"].module.to("cpu")
    with torch.no_grad():
        right = module.net(left["inputs"]).argmax(1) == (left["inputs"].sum(1) > 0)
    return float(right.float().mean()), module.state_dict()


@pytest.mark.parametrize("epochs", [2, 20])
def test_the_readmes_example_reaches_the_accuracy_of_the_cpu(tmp_path, monkeypatch, epochs):
    found = {}
    for accelerator in ("cpu", "xla"):
        folder = tmp_path / accelerator
        folder.mkdir()
        found[accelerator], _ = accuracy(
            accelerator, folder, monkeypatch, **{"max_epochs=2": f"max_epochs={epochs}"}
        )
    assert found["xla"] == pytest.approx(found["cpu"], abs=1 / 64 + 1e-6)
    if epochs > 2:
        assert found["xla"] > 0.9
