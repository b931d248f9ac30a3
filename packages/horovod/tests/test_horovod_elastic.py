"""An elastic run over gloo that loses or gains a host: two made-up hosts of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from drivetrain_interfaces import ConfigurationError

SCRIPT = Path(__file__).parent / "ranks/horovod_elastic.py"
PATIENCE = 400.0


def batch_of(epoch):
    generator = torch.Generator().manual_seed(epoch)
    return torch.randn(8, 4, generator=generator), torch.randn(8, 1, generator=generator)


def run(folder, change, start_with):
    """What each rank left of a run over two hosts, the second of which is listed once it may be."""
    hosts = folder / "hosts.sh"
    hosts.write_text(
        "#!/bin/sh\necho localhost:1\n"
        f"if [ {change} = lose ] || [ -e '{folder}/second' ]; then echo 127.0.0.1:1; fi\n"
    )
    hosts.chmod(0o755)
    done = subprocess.run(
        [
            Path(sys.executable).with_name("horovodrun"), "-np", str(start_with), "--min-np", "1",
            "--max-np", "2", "--gloo", "--network-interface", "lo",
            "--host-discovery-script", hosts, sys.executable, SCRIPT, folder, change,
        ],
        cwd=folder, capture_output=True, text=True, timeout=PATIENCE, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    left = sorted(folder.glob("end*.pt"))
    assert left, done.stdout + done.stderr
    return [torch.load(each, weights_only=False) for each in left]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("change", "start_with", "sizes"),
    [("lose", 2, [2, 2, 1, 1, 1, 1]), ("gain", 1, [1, 1, 2, 2, 2, 2])],
)
def test_a_run_goes_on_with_the_ranks_that_there_are(tmp_path, change, start_with, sizes):
    found, *others = run(tmp_path, change, start_with)
    assert [epoch for epoch, _, _ in found["seen"]] == [0, 1, 2, 3, 4, 5]
    assert [size for _, size, _ in found["seen"]] == sizes
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for epoch, _, loss in found["seen"]:
        features, targets = batch_of(epoch)
        wanted = (module(features) - targets).square().mean()
        assert loss == pytest.approx(wanted.item(), rel=1e-5)
        wanted.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in module.state_dict().items():
        assert torch.allclose(found["module"][name], value, atol=1e-6, rtol=0), name
    assert set(found["steps"]) == {6.0}
    assert len(others) == sizes[-1] - 1
    for other in others:  # what came late has what was there, from the start of its own run
        assert other["seen"] == found["seen"]
        assert other["steps"] == found["steps"]
        for name, value in found["module"].items():
            assert torch.equal(other["module"][name], value), name


def test_a_value_with_a_name_of_the_states_own_is_refused():
    from drivetrain_horovod.elastic import ElasticState

    with pytest.raises(ConfigurationError, match=r"\['world'\]"):
        ElasticState(lambda strategy: None, world=3)
