"""Two processes on two fake modules: HCCL's limits, launchers, and training with several ranks."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    Run = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.timeout(400)
START = """
import importlib.util, os, sys, warnings
from drivetrain_interfaces import LaunchRequest, World
from drivetrain_hpu.backend import HpuBackend

def launched(main, name="spawn", size=2):
    launcher = HpuBackend().launcher(name)
    return launcher.launch(main, launcher.plan(LaunchRequest(local_size=size)))

def opened(world):
    backend = HpuBackend()
    backend.accelerator().activate(world.local_rank, world.local_size)
    return backend, backend.collectives(world)
"""

LIMITS = (
    START
    + """
def main(world):
    backend, collectives = opened(world)
    import torch, torch.distributed as dist
    from drivetrain_interfaces import ReduceOp
    import fake_gaudi
    assert fake_gaudi.Held.module == str(world.local_rank), fake_gaudi.Held.module
    mine = torch.full((3,), float(world.rank + 1), device="hpu")
    assert collectives.all_reduce(mine).tolist() == [3.0] * 3
    assert collectives.all_reduce(mine, ReduceOp.MEAN).tolist() == [1.5] * 3
    # What HCCL would round travels over the host, and comes back exact, wherever it was.
    for device in ("hpu", "cpu"):
        large = torch.tensor([2**24 + 1, -(2**40)], device=device)
        total = collectives.all_reduce(large)
        assert total.tolist() == [2**25 + 2, -(2**41)] and total.device.type == device
    fine = torch.tensor([1.0 + 2**-40], dtype=torch.float64)
    assert float(collectives.all_reduce(fine)) == 2 + 2**-39
    assert collectives.all_reduce(torch.tensor([world.rank == 0]), ReduceOp.MAX).tolist() == [True]
    assert collectives.broadcast_object({"rank": world.rank}) == {"rank": 0}
    rows = torch.ones(world.rank + 1, 3, dtype=torch.uint8, device="hpu")
    assert [len(part) for part in collectives.all_gather(rows)] == [1, 2]
    collectives.barrier()

    def refused(call, words):
        try:
            call()
        except RuntimeError as error:
            assert words in str(error), error
        else:
            raise AssertionError(words)
    for op in (dist.ReduceOp.AVG, dist.ReduceOp.BAND):
        one = torch.ones(1, device="hpu")
        refused(lambda op=op: dist.all_reduce(one, op), "Unsupported ReduceOp for HCCL")
    for kind in (torch.int16, torch.complex64):
        value = torch.ones(1, dtype=kind, device="hpu")  # torch itself hands on complex as real
        refused(lambda value=value: dist.group.WORLD.allreduce([value]),
                "data type is not supported for HCCL")
    refused(lambda: dist.all_reduce(torch.ones(1), group=None), "")
    for kind, value in ((torch.int64, 2**24 + 1), (torch.float64, 1.0 + 2**-40)):
        lossy = torch.tensor([value], dtype=kind, device="hpu")
        dist.all_reduce(lossy)
        assert lossy.item() != 2 * value, kind
    refused(dist.group.WORLD.abort, "does not implement abort")
    if importlib.util.find_spec("numpy"):  # torch's own function needs it
        listed = [{"a": world.rank}]
        dist.broadcast_object_list(listed, 0, device=torch.device("hpu"))
        assert listed == [{"a": 0}]
    collectives.close()
    assert os.environ["RANK"] == str(world.rank)
    return "done"

if __name__ == "__main__":
    os.environ.update(HLS_MODULE_ID="1", ID="1")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert launched(main) == "done"
    assert any("HLS_MODULE_ID=1 is set, and is dropped" in str(one.message) for one in told), told
    assert "ID" not in os.environ
    import fake_gaudi
    assert fake_gaudi.Held.module is None
    assert "habana_frameworks.torch" not in sys.modules
"""
)


def test_hccl_has_its_limits_and_collectives_stay_within(run_python: Run) -> None:
    run_python(LIMITS)


TRAINING = (
    START
    + """
def loss(module, batch):
    return module(batch).square().mean()

def batches():
    import torch
    torch.manual_seed(1)
    return [torch.randn(8, 4) for _ in range(4)]

def made():
    import torch
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))

def main(world):
    backend, collectives = opened(world)
    import torch
    from drivetrain_interfaces import Clip, StepSpec, StrategyContext
    for name in ("ddp", "fsdp"):
        context = StrategyContext(backend.accelerator(), world.local_rank, world, collectives,
                                  backend.precision("32-true"))
        from drivetrain_hpu.strategies import HpuFSDP
        sharded = name == "fsdp"
        strategy = HpuFSDP()(context) if sharded else backend.strategy(name, context)
        module = strategy.prepare(made())
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
        step = strategy.train_step(StepSpec(module, [optimizer], loss, clip=Clip(1.0)))
        for batch in batches():
            step([strategy.feed(batch[world.rank::2])])
        state = strategy.state().module
        strategy.close()
        if world.is_main:
            reference = made()
            usual = torch.optim.AdamW(reference.parameters(), lr=0.01)
            for batch in batches():
                loss(reference, batch).backward()
                torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
                usual.step()
                usual.zero_grad()
            for key, value in reference.state_dict().items():
                found = state[key].cpu()
                assert torch.allclose(found, value, atol=2e-6), (name, key, found - value)
    # Without the forced sums, torch asks HCCL for an average, which it refuses.
    from torch.distributed.fsdp import FSDPModule
    FSDPModule.set_force_sum_reduction_for_comms = lambda self, enable: None
    context = StrategyContext(backend.accelerator(), world.local_rank, world, collectives,
                              backend.precision("32-true"))
    strategy = HpuFSDP()(context)
    module = strategy.prepare(made())
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    step = strategy.train_step(StepSpec(module, [optimizer], loss))
    try:
        step([strategy.feed(batches()[0][world.rank::2])])
    except RuntimeError as error:
        assert "Unsupported ReduceOp for HCCL process group" in str(error), error
    else:
        raise AssertionError("an average")
    strategy.close()
    collectives.close()
    return "done"

if __name__ == "__main__":
    assert launched(main) == "done"
"""
)


def test_ddp_and_fsdp_train_as_one_process_does(run_python: Run) -> None:
    run_python(TRAINING)


PARENTS = (
    START
    + """
def main(world):
    backend, collectives = opened(world)
    import fake_gaudi
    found = collectives.broadcast_object(fake_gaudi.Held.module, source=1)
    collectives.close()
    return found

if __name__ == "__main__":
    from drivetrain_interfaces import ClusterError
    name = sys.argv[1]
    wanted = os.environ.get("HABANA_VISIBLE_MODULES", "0,1").split(",")[1]
    import fake_gaudi
    if name == "spawn":
        # A process that has loaded the bridge may still start others, as long as it opens nothing.
        from drivetrain_hpu.bridge import load_bridge
        load_bridge()
    assert launched(main, name) == wanted
    if name == "spawn":
        assert fake_gaudi.Held.module is None
        try:
            launched(main, "fork")
        except ClusterError as error:
            assert "whose threads survive no fork" in str(error)
        else:
            raise AssertionError("fork")
        import torch
        torch.ones(1, device="hpu")
        try:
            launched(main, name)
        except ClusterError as error:
            assert "opened a Gaudi device already" in str(error)
        else:
            raise AssertionError("opened")
"""
)


@pytest.mark.parametrize("name", ["spawn", "script"])
def test_parents_open_nothing_and_children_get_modules_of_their_own(
    run_python: Run, name: str
) -> None:
    run_python(PARENTS, name, HABANA_VISIBLE_MODULES="2,3")


def test_ranks_of_a_manager_open_modules_by_their_rank(run_python: Run) -> None:
    script = (
        START
        + """
import subprocess
if len(sys.argv) == 1:
    import socket
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(port)}
    ranks = [subprocess.Popen([sys.executable, __file__, str(k)],
                              env={**os.environ, **place, "RANK": str(k), "LOCAL_RANK": str(k)})
             for k in range(2)]
    sys.exit(sum(each.wait(90) for each in ranks))
rank = int(sys.argv[1])
world = World(rank=rank, size=2, local_rank=rank, local_size=2, address=os.environ["MASTER_ADDR"],
              port=int(os.environ["MASTER_PORT"]))
backend, collectives = opened(world)
import fake_gaudi
assert fake_gaudi.Held.module == str(rank)
collectives.barrier()
collectives.close()
"""
    )
    options = {**json.loads(os.environ["DRIVETRAIN_FAKE_GAUDI"]), "cards": 2}
    run_python(script, DRIVETRAIN_FAKE_GAUDI=json.dumps(options))
