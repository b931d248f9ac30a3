"""The spec, the environment and what is refused without any other process."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from drivetrain_interfaces import (
    CONTRACT,
    ClusterError,
    ConfigurationError,
    Feature,
    StepSpec,
    StrategyContext,
    UnavailableError,
    UnsupportedError,
    World,
)
from drivetrain_interfaces.discovery import load_backend, load_strategy

from drivetrain_horovod import HorovodStrategy, spec
from drivetrain_horovod.environment import HOROVOD
from drivetrain_horovod.seeds import HorovodPlugin

pytestmark = pytest.mark.timeout(400)  # imports take long on a busy machine
VARIABLES = {
    "HOROVOD_RANK": "1",
    "HOROVOD_SIZE": "2",
    "HOROVOD_LOCAL_RANK": "1",
    "HOROVOD_LOCAL_SIZE": "2",
    "HOROVOD_CROSS_RANK": "0",
    "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1",
    "HOROVOD_GLOO_RENDEZVOUS_PORT": "23456",
}


def test_importing_the_spec_loads_neither_torch_nor_horovod():
    code = (
        "import sys; from drivetrain_horovod import spec; "
        "print([m for m in ('torch', 'horovod', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=200
    )
    assert done.stdout.strip() == "[]"


def test_the_name_yields_the_spec():
    assert load_strategy("horovod") is spec
    assert CONTRACT.serves(spec.contract)
    assert Feature.CLOSURE not in spec.capabilities
    assert "bf16-true" not in spec.capabilities.precisions


def test_the_variables_of_horovodrun_make_a_world():
    assert not HOROVOD.detect({})
    assert HOROVOD.detect(VARIABLES) == ("HOROVOD_RANK=1", "HOROVOD_SIZE=2")
    world = HOROVOD.world(VARIABLES)
    assert (world.rank, world.size, world.local_rank, world.address) == (1, 2, 1, "127.0.0.1")
    assert world.port == HOROVOD.world({**VARIABLES, "HOROVOD_RANK": "0"}).port
    assert HOROVOD.world({**VARIABLES, "MASTER_PORT": "29500"}).port == 29500


@pytest.mark.parametrize("change", [{"HOROVOD_RANK": "2"}, {"HOROVOD_SIZE": "two"}])
def test_variables_that_make_no_world_are_refused(change):
    with pytest.raises(ClusterError, match="make no world"):
        HOROVOD.world({**VARIABLES, **change})


def test_a_variable_that_is_missing_is_named():
    with pytest.raises(ClusterError, match="HOROVOD_CROSS_RANK is missing"):
        HOROVOD.world({k: v for k, v in VARIABLES.items() if k != "HOROVOD_CROSS_RANK"})


@pytest.mark.parametrize("options", [{"compression": "bf16"}, {"groups": 0}])
def test_an_option_with_a_value_that_there_is_not_is_refused(options):
    with pytest.raises(ConfigurationError):
        HorovodStrategy(**options)
    with pytest.raises(ConfigurationError):
        HorovodPlugin(**options)


def bound(precision="32-true", **options):
    backend = load_backend("cpu").load()
    accelerator = backend.accelerator()
    accelerator.activate(0, 1)
    return HorovodStrategy()(
        StrategyContext(
            accelerator, 0, World(), backend.collectives(World()), backend.precision(precision),
            options=options,
        )
    )  # fmt: skip


def test_bfloat16_gradients_are_refused():
    with pytest.raises(UnsupportedError, match="does not reduce bfloat16"):
        bound("bf16-true")


def test_unknown_options_are_refused_with_those_that_it_takes():
    with pytest.raises(ConfigurationError, match=r"\['scale'\]; it takes \['compression'"):
        bound(scale=True)


def test_an_optimizer_with_a_closure_is_refused():
    strategy = bound()
    module = strategy.prepare(torch.nn.Linear(3, 2))
    with pytest.raises(UnsupportedError, match="LBFGS evaluates the loss itself"):
        strategy.train_step(
            StepSpec(module, [torch.optim.LBFGS(module.parameters())], lambda m, x: m(x).sum())
        )
    strategy.close()


def test_a_library_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "horovod", None)
    monkeypatch.delitem(sys.modules, "horovod.torch", raising=False)
    with pytest.raises(UnavailableError, match="Horovod is not installed"):
        bound()


def test_a_library_that_was_built_for_another_torch_is_said_to_be():
    code = (
        "import importlib.abc, sys\n"
        "class Broken(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'horovod.torch':\n"
        "            raise ImportError('undefined symbol: _ZN3c10')\n"
        "sys.meta_path.insert(0, Broken())\n"
        "from drivetrain_interfaces import BrokenPackageError\n"
        "from drivetrain_horovod.starting import import_horovod\n"
        "try:\n"
        "    import_horovod()\n"
        "except BrokenPackageError as error:\n"
        "    print(error.message)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=200
    )
    assert "undefined symbol" in done.stdout
