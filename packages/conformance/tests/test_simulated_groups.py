"""Communication between simulated devices: two processes, what they get, and how it breaks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import pytest

from drivetrain_conformance import simulated

if reason := simulated.unavailable():
    pytest.skip(reason, allow_module_level=True)

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.timeout(600)

START = """
import datetime, json, sys, torch, torch.distributed as dist
from torch import nn
from drivetrain_conformance import simulated
rank, size, path, timeout = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
torch.set_num_threads(1)
simulated.install()
torch.sim.set_device(rank)
dist.init_process_group(
    simulated.COLLECTIVE_BACKEND, store=dist.FileStore(path, size), rank=rank, world_size=size,
    timeout=datetime.timedelta(seconds=timeout),
)
here = torch.device("sim", rank)
said = {}

def refused(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
"""
END = """
print(json.dumps(said), flush=True)
dist.destroy_process_group()
"""


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    from drivetrain_conformance.simulated import building

    building.build()


def both(folder: Path, code: str, timeout: float = 60.0, **options: Any) -> list[dict[str, Any]]:
    """What two ranks that ran the code said."""
    program = START + textwrap.dedent(code) + END
    env = {**os.environ, **simulated.Options(**options).to_environment()}
    path = folder / f"store-{len(list(folder.iterdir()))}"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), "2", str(path), str(timeout)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**env, "RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        outputs = [child.communicate(timeout=100) for child in children]
    finally:
        for child in children:
            child.kill()
    for child, (_, errors) in zip(children, outputs, strict=True):
        assert child.returncode == 0, errors
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


def test_collectives_do_what_torch_says_and_are_no_use_of_the_host(tmp_path: Path) -> None:
    first, second = both(
        tmp_path,
        """
        before = simulated.counters()
        t = torch.tensor([1.0, rank], device=here)
        results = {}
        def keep(name, value): results[name] = value
        a = t.clone(); dist.all_reduce(a); keep("sum", a)
        a = t.clone(); dist.all_reduce(a, dist.ReduceOp.MAX); keep("max", a)
        a = t.half(); dist.all_reduce(a); keep("half", a)
        a = torch.tensor([2**60 + rank], device=here); dist.all_reduce(a); keep("long", a)
        a = t.clone(); dist.broadcast(a, 1); keep("broadcast", a)
        a = [torch.empty_like(t) for _ in range(2)]; dist.all_gather(a, t); keep("gather", a)
        a = torch.empty(4, device=here); dist.all_gather_into_tensor(a, t); keep("into", a)
        a = torch.empty(1, device=here); dist.reduce_scatter_tensor(a, t); keep("scatter", a)
        a = t.clone(); dist.reduce(a, 0); keep("reduce", a if rank == 0 else t)
        a = torch.empty_like(t); dist.all_to_all_single(a, t); keep("all_to_all", a)
        a = t.clone()
        dist.send(a, 1) if rank == 0 else dist.recv(a, 0)
        keep("recv", a)
        work = dist.all_reduce(t.clone(), async_op=True); work.wait()
        assert work.is_completed()
        dist.barrier()
        counted = simulated.counters() - before
        said["counted"] = [counted.downloads, counted.synchronizations, counted.collectives]
        objects = [{"rank": rank}]
        dist.broadcast_object_list(objects, 1, device=here)
        said["objects"] = objects
        said["devices"] = sorted({str(v.device) for v in results.values() if v is not a
                                  and not isinstance(v, list)})
        group = dist.new_group([0, 1])
        b = torch.ones(1, device=here); dist.all_reduce(b, group=group)
        results["group"] = b
        said |= {k: [x.tolist() for x in v] if isinstance(v, list) else v.tolist()
                 for k, v in results.items()}
        """,
    )
    for rank, said in enumerate((first, second)):
        assert said["sum"] == said["half"] == [2, 1]
        assert said["max"] == [1, 1]
        assert said["long"] == [2**61 + 1]
        assert said["broadcast"] == [1, 1]
        assert said["gather"] == [[1, 0], [1, 1]]
        assert said["into"] == [1, 0, 1, 1]
        assert said["scatter"] == [[2], [1]][rank]
        assert said["all_to_all"] == [[1, 1], [0, 1]][rank]
        assert said["recv"] == [1, 0]
        assert said["objects"] == [{"rank": 1}]
        assert said["group"] == [2]
        assert said["devices"] == [f"sim:{rank}"]
        assert said["counted"] == [0, 0, 13]
    assert first["reduce"] == [2, 1]


def test_it_is_as_strict_as_a_vendors_library(tmp_path: Path) -> None:
    for said in both(
        tmp_path,
        """
        said["host"] = refused(lambda: dist.all_reduce(torch.ones(1)))
        said["average"] = refused(
            lambda: dist.all_reduce(torch.ones(1, device=here), dist.ReduceOp.AVG))
        said["strided"] = refused(lambda: dist.broadcast(torch.ones(2, 2, device=here).t()[0], 0))
        """,
    ):
        assert "one of ['cpu']" in said["host"]
        assert "ReduceOp.AVG" in said["average"]
        assert "contiguous" in said["strided"]


def test_ddp_trains_as_one_process_with_the_whole_batch(tmp_path: Path) -> None:
    for said in both(
        tmp_path,
        """
        torch.manual_seed(0)
        def build():
            return nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.SyncBatchNorm(4), nn.ReLU(),
                                 nn.Flatten(), nn.Linear(16, 2))
        def plain():
            module = build(); module[1] = nn.BatchNorm2d(4); return module
        alone = plain(); module = build(); module.load_state_dict(alone.state_dict())
        module = module.to(here)
        wrapped = nn.parallel.DistributedDataParallel(module)
        x, y = torch.randn(8, 1, 4, 4), torch.randint(0, 2, (8,))
        for net, a, b in ((alone, x, y), (wrapped, x[rank::2].to(here), y[rank::2].to(here))):
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            for _ in range(3):
                nn.functional.cross_entropy(net(a), b).backward()
                optimizer.step(); optimizer.zero_grad()
        said["difference"] = max(float((a - b.cpu()).abs().max()) for a, b in
            zip(alone.state_dict().values(), module.state_dict().values()))
        """,
    ):
        assert said["difference"] < 1e-5


def test_parameters_can_be_sharded_over_devices(tmp_path: Path) -> None:
    for said in both(
        tmp_path,
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard
        torch.manual_seed(0)
        alone = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        x = torch.randn(8, 4)
        alone(x).pow(2).mean().backward()
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).to(here)
        mesh = init_device_mesh("sim", (2,))
        for part in (*module, module):
            fully_shard(part, mesh=mesh)
            part.set_force_sum_reduction_for_comms(True)  # there is no average
        module(x[rank::2].to(here)).pow(2).mean().backward()
        weight = module[0].weight
        said["mine"] = weight.to_local().numel()
        said["difference"] = float(
            (weight.grad.full_tensor().cpu() - alone[0].weight.grad).abs().max())
        """,
    ):
        assert said["mine"] == 16
        assert said["difference"] < 1e-6


def test_a_collective_can_hang_until_the_time_is_over(tmp_path: Path) -> None:
    quiet, hanging = both(
        tmp_path,
        """
        dist.all_reduce(torch.ones(1, device=here))
        said["error"] = refused(lambda: dist.all_reduce(torch.ones(1, device=here)))
        """,
        timeout=3.0,
        hang_at_collective=2,
        fault_rank=1,
    )
    assert (
        "DistBackendError: Simulated: allreduce of rank 1 timed out after 3 s" in (hanging["error"])
    )
    assert "RuntimeError" in quiet["error"]


def test_a_rank_can_be_dropped_and_the_others_notice(tmp_path: Path) -> None:
    others, dropped = both(
        tmp_path,
        """
        dist.all_reduce(torch.ones(1, device=here))
        said["error"] = refused(lambda: dist.barrier())
        said["again"] = refused(lambda: dist.all_reduce(torch.ones(1, device=here)))
        """,
        timeout=20.0,
        drop_at_collective=2,
        fault_rank=1,
    )
    assert "rank 1 lost its connection in barrier" in dropped["error"]
    assert "rank 1 lost its connection in allreduce" in dropped["again"]
    assert "RuntimeError" in others["error"]
