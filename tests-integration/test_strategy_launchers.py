"""Every strategy with every launcher: the same training, however its two processes were started."""

from __future__ import annotations

import json

import pytest

STRATEGIES = {"ddp", "ddp2", "fsdp", "pipeline", "rpc", "tp", "zero1", "zero2"}


@pytest.mark.parametrize(
    "launcher",
    [
        "fork",
        pytest.param("script", marks=pytest.mark.slow),
        pytest.param("spawn", marks=pytest.mark.slow),
        pytest.param("attach", marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(300)
def test_strategies_train_alike_with_every_launcher(start, launcher):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    running = start(
        "launch_strategies.py",
        launcher,
        by=torchrun if launcher == "attach" else (),
        env={"OMP_NUM_THREADS": "1"},
    )
    assert running.finish(within=280) == 0, running.output
    lines = [line.split() for line in running.lines if line.startswith("FIT ")]
    found = {name: json.loads(said) for _, name, said in lines}
    assert found.keys() == STRATEGIES, running.output
    for name, (steps, off) in found.items():
        assert steps == 6, name
        assert off == pytest.approx(found["ddp"][1], rel=1e-5), name
