"""What importing the bridge does, and how this package bounds it."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest
from drivetrain_interfaces import ConfigurationError, UnavailableError, World

from drivetrain_hpu import bridge
from drivetrain_hpu.modules import choose_module, visible_modules

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    Run = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.timeout(400)
SNAPSHOT = """
import json, os, sys
import torch, torch.distributed, torch.profiler
from torch.profiler import profile as early
names = ("torch.save", "torch.load", "torch.manual_seed", "torch.random.fork_rng",
         "torch.distributed.init_process_group", "torch.distributed.new_group",
         "torch.profiler.profile", "torch.autograd.profiler.profile",
         "torch.profiler.ProfilerActivity")
def look():
    found = {}
    for name in names:
        value = torch
        for part in name.split(".")[1:]:
            value = getattr(value, part)
        found[name] = id(value)
    return found
before, env = look(), dict(os.environ)
import habana_frameworks.torch
import fake_gaudi
after = look()
from habana_frameworks.torch.utils.internal import is_lazy
from torch._dynamo import list_backends
print(json.dumps({
    "changed": [name for name in names if before[name] != after[name]],
    "env": {k: v for k, v in os.environ.items() if env.get(k) != v},
    "lazy": is_lazy(), "module": hasattr(torch, "hpu"), "held": fake_gaudi.Held.module,
    "hccl": "hccl" in torch.distributed.Backend.backend_list,
    "compiler": "hpu_backend" in list_backends(), "early": early is torch.profiler.profile,
}))
"""


def snapshot(run_python: Run, **env: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run_python(SNAPSHOT, **env).stdout.splitlines()[-1])
    return found


def test_the_import_changes_torch_and_the_environment_in_eager_mode(run_python: Run) -> None:
    found = snapshot(run_python, PT_HPU_LAZY_MODE="0")
    assert set(found["changed"]) == {
        "torch.manual_seed",
        "torch.random.fork_rng",
        "torch.distributed.init_process_group",
        "torch.distributed.new_group",
        "torch.profiler.profile",
        "torch.autograd.profiler.profile",
        "torch.profiler.ProfilerActivity",
    }
    found["env"].pop("TORCHINDUCTOR_CACHE_DIR", None)  # torch's compiler sets it by itself
    assert found["env"] == {
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "HABANA_PROFILE": "profile_api_light",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "12345",
    }
    assert found["module"]
    assert found["hccl"]
    assert found["compiler"]
    assert not found["lazy"]
    assert not found["early"]
    assert found["held"] is None


def test_lazy_mode_replaces_saving_and_loading_and_has_no_compiler(run_python: Run) -> None:
    found = snapshot(run_python, PT_HPU_LAZY_MODE="1")
    assert {"torch.save", "torch.load"} <= set(found["changed"])
    assert found["lazy"]
    assert not found["compiler"]


def test_the_mode_is_read_once_and_asked_of_the_bridge(run_python: Run) -> None:
    script = (
        "import os\n"
        "from drivetrain_hpu import bridge\n"
        "bridge.load_bridge()\n"
        "assert os.environ['PT_HPU_LAZY_MODE'] == '0' and not bridge.is_lazy()\n"
        "os.environ['PT_HPU_LAZY_MODE'] = '1'\n"
        "assert not bridge.is_lazy()\n"
        "from fake_gaudi.marks import CALLS\n"
        "assert bridge.core().mark_step() is None and CALLS == []\n"
        "assert 'MASTER_PORT' not in os.environ and 'HLS_MODULE_ID' not in os.environ\n"
    )
    # On a release whose own default is lazy, this package still asks for eager mode.
    options = {**json.loads(os.environ["DRIVETRAIN_FAKE_GAUDI"]), "lazy": True}
    run_python(script, DRIVETRAIN_FAKE_GAUDI=json.dumps(options))


def test_an_unset_mode_means_what_the_release_says(run_python: Run) -> None:
    options = {**json.loads(os.environ["DRIVETRAIN_FAKE_GAUDI"]), "lazy": True}
    assert snapshot(run_python, DRIVETRAIN_FAKE_GAUDI=json.dumps(options))["lazy"]


FAULTS = {
    "assertion": ["AssertionError: torch 2.11 is needed", "Intel's own build"],
    "attribute": ["AttributeError", "+git"],
    "os": ["libSynapse.so", "GC_KERNEL_PATH"],
}
FAILING = """
import json, os, sys
import torch
from drivetrain_hpu import bridge
from drivetrain_interfaces import UnavailableError
options = json.loads(os.environ["DRIVETRAIN_FAKE_GAUDI"])
for fault in sys.argv[1:]:
    child = os.fork()  # an import is tried once in a process
    if child:
        assert os.waitpid(child, 0)[1] == 0
        continue
    os.environ["DRIVETRAIN_FAKE_GAUDI"] = json.dumps({**options, "fault": fault})
    try:
        bridge.load_bridge()
    except UnavailableError as error:
        print(fault, str(error).replace(chr(10), " "), flush=True)
    os._exit(0)
"""


def test_an_import_that_fails_says_what_to_do(run_python: Run) -> None:
    lines = run_python(FAILING, *FAULTS).stdout.splitlines()
    told = dict(line.split(" ", 1) for line in lines)
    for fault, words in FAULTS.items():
        for word in words:
            assert word in told[fault]


RANKS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "HLS_MODULE_ID", "ID")


@pytest.mark.parametrize(
    ("env", "given", "result", "wanted"),
    [
        ({}, (), (1, -1, -1), {"MASTER_ADDR": "localhost", "MASTER_PORT": "12345"}),
        (
            {},
            (4, 2, 2),
            (4, 2, 2),
            {"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "2", "HLS_MODULE_ID": "2", "ID": "2"},
        ),
        (
            {"HABANA_VISIBLE_MODULES": "5,7"},
            (4, 3, 1),
            (4, 3, 1),
            {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "HLS_MODULE_ID": "7", "ID": "3"},
        ),
        (
            {"HLS_MODULE_ID": "6"},
            (2, 1, 1),
            (2, 1, 1),
            {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "HLS_MODULE_ID": "6", "ID": "1"},
        ),
        (
            {},
            (1, 0, 0),
            (1, 0, 0),
            {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "ID": "0"},
        ),
        (
            {
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            },
            (),
            (2, 1, 1),
            {
                "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "HLS_MODULE_ID": "1", "ID": "1",
                "MASTER_ADDR": "localhost", "MASTER_PORT": "12345",
            },
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
            (),
            (2, 0, 0),
            {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "HLS_MODULE_ID": "0", "ID": "0"},
        ),
    ],
)  # fmt: skip
def test_the_vendors_set_up_of_ranks(
    monkeypatch: pytest.MonkeyPatch,
    env: dict[str, str],
    given: tuple[int, ...],
    result: tuple[int, int, int],
    wanted: dict[str, str],
) -> None:
    bridge.load_bridge()
    from habana_frameworks.torch.distributed.hccl import initialize_distributed_hpu

    for name in (*RANKS, "HABANA_VISIBLE_MODULES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    asked = dict(zip(("world_size", "rank", "local_rank"), given, strict=False))
    # Through monkeypatch, so that what is set here goes away again.
    for name in RANKS:
        monkeypatch.setenv(name, os.environ.get(name, "")) if name in os.environ else None
    try:
        assert initialize_distributed_hpu(**asked) == result
        assert {name: os.environ[name] for name in RANKS if name in os.environ} == wanted
    finally:
        for name in RANKS:
            os.environ.pop(name, None)


def test_too_few_modules_for_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HABANA_VISIBLE_MODULES", "3")
    bridge.load_bridge()
    with pytest.raises(UnavailableError, match="Process 1 of 2 on this machine") as caught:
        bridge.join(World(1, 2, 1, 2, address="127.0.0.1", port=1))
    assert "HABANA_VISIBLE_MODULES" in str(caught.value)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        os.environ.pop(name, None)


def test_variables_of_a_rank_are_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    before = bridge.join(World(1, 2, 1, 2, address="127.0.0.1", port=1))
    assert os.environ["RANK"] == "1"
    bridge.leave(before)
    assert not {"WORLD_SIZE", "RANK", "LOCAL_RANK", "ID"} & set(os.environ)
    os.environ.pop("HLS_MODULE_ID", None)


def test_modules_are_chosen_by_place_among_the_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HABANA_VISIBLE_MODULES", "4,6")
    monkeypatch.delenv("HLS_MODULE_ID", raising=False)
    choose_module(0, 1, 2)
    assert "HLS_MODULE_ID" not in os.environ  # a process alone: the driver finds a free one
    choose_module(1, 1, 2)
    assert os.environ["HLS_MODULE_ID"] == "6"
    monkeypatch.setenv("HLS_MODULE_ID", "5")
    choose_module(0, 2, 2)
    assert os.environ["HLS_MODULE_ID"] == "5"  # a manager has chosen
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("HLS_MODULE_ID", "4")
    choose_module(1, 2, 2)
    assert os.environ["HLS_MODULE_ID"] == "6"  # the bridge had chosen, by the rank


@pytest.mark.parametrize("text", ["0,0", "a", "0,,1", "-1"])
def test_a_list_of_modules_that_is_none(text: str) -> None:
    with pytest.raises(ConfigurationError, match="no list of different module numbers"):
        visible_modules({"HABANA_VISIBLE_MODULES": text}, 4)
