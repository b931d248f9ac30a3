"""Models built divided, DeepSpeed's own checkpoints, and what a step sends, on two real ranks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings

import deepspeed_cases as cases
import pytest
import torch
from drivetrain_interfaces import (
    CheckpointError,
    ConfigurationError,
    NotFoundError,
    UnavailableError,
)

from drivetrain_deepspeed import (
    DeepSpeedStrategy,
    build_cpu_adam,
    make_universal,
    optimizers,
    read_native,
)
from drivetrain_deepspeed.engine import check_nvme, import_deepspeed

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def ask(two_ranks):
    """What rank 0 answers to a case of ``ranks/deepspeed_builds.py``."""

    def one(name, **arguments):
        return two_ranks.run(f"deepspeed_builds:{name}", name, seconds=600.0, **arguments)[0]

    return one


@pytest.fixture(scope="module")
def built(ask):
    return ask("built")


@pytest.fixture(scope="module")
def saved(ask, tmp_path_factory):
    """A folder with a checkpoint of each stage in DeepSpeed's own format, and what was found."""
    folder = tmp_path_factory.mktemp("native")
    return folder, ask("native", folder=str(folder))


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in other.items():
        assert torch.equal(one[name], value), name


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_model_on_the_meta_device_gets_its_values_layer_by_layer(built, precision):
    whole, divided = built[1, precision], built[3, precision]
    layers = 16 * 31 + 31, 31 * 3 + 3
    assert whole["most"] == sum(layers)
    assert divided["most"] == max(layers), "more than one layer was held at once"
    assert divided["losses"][-1] < divided["losses"][0]
    assert all(value.abs().sum() > 0 for value in divided["start"].values())


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_model_that_is_built_under_zero_init_stays_divided(built, precision):
    found = built["zero_init", precision]
    assert found["most"] == 0
    assert found["losses"][-1] < found["losses"][0]
    if precision == "32-true":  # rank 0's values, as it draws them without DeepSpeed
        same(found["start"], dict(cases.network(0).state_dict()))


def test_a_model_that_cannot_be_built_divided_is_refused(built):
    without, other = built["refused"]
    assert "WithoutValues was built on the meta device" in without
    assert "torch.float32, and the precision stores parameters in torch.bfloat16" in other or (
        "under zero.Init in torch.bfloat16" in other
    )


def test_activations_that_are_made_again_lead_to_the_same(ask):
    found = ask("activations")
    for stage in (2, 3):
        same(found[stage, True], found[stage, False])
        assert found["configured", stage] == 1, "DeepSpeed saw the section"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeeds_own_format_goes_out_and_in(saved, stage):
    _, found = saved
    for key, wanted in (("loaded", "state"), ("again", "end")):
        same(found[stage][key][0], found[stage][wanted][0])
        for name, entry in found[stage][wanted][1][0]["state"].items():
            same(found[stage][key][1][0]["state"][name], entry)
    assert found[stage]["kept"] == 7


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_native_checkpoint_that_does_not_fit_is_refused_with_both_stages(saved, stage):
    refused = saved[1]["refused"]
    assert "pickles that run code" in refused["untrusted", stage]
    assert f"and this run is at stage {stage}" in refused["other stage", stage]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_whole_weights_are_read_from_the_native_format_without_ranks(saved, stage):
    folder, found = saved
    with pytest.raises(CheckpointError, match="trusted=True"):
        read_native(folder / f"stage{stage}")
    same(read_native(folder / f"stage{stage}", trusted=True), found[stage]["state"][0])


def test_a_universal_checkpoint_goes_from_stage_to_stage(saved, ask):
    folder, found = saved
    for stage in (1, 3):
        assert make_universal(folder / f"stage{stage}", trusted=True) == "four_universal"
    ends = ask("universal", folder=str(folder))
    for (source, target), state in ends.items():
        for name, value in found[source]["end"][0].items():
            assert torch.allclose(state[0][name], value, atol=1e-6, rtol=0), (source, target, name)
    with pytest.raises(CheckpointError, match="which is universal"):
        read_native(folder / "stage3", "four_universal", trusted=True)
    with pytest.raises(CheckpointError, match="at stage 0"):
        make_universal(folder / "stage0", trusted=True)


def test_a_native_checkpoint_that_is_missing_is_named(tmp_path):
    with pytest.raises(NotFoundError, match="there is none"):
        read_native(tmp_path, trusted=True)


def test_a_scheduler_of_torchs_leads_where_it_does_with_ddp(ask):
    found = ask("our_scheduler")
    for stage in (0, 1, 2, 3):
        for name, value in found["ddp"].items():
            assert torch.allclose(found[stage][name], value, atol=1e-6, rtol=0), (stage, name)


def test_a_step_sends_what_one_by_hand_does(ask):
    for stage, (ours, by_hand) in ask("messages").items():
        assert ours == by_hand, stage
        assert ours, stage


def test_float16_trains_and_is_resumed_where_the_device_has_it_and_is_refused_elsewhere(ask):
    found = ask("float16")
    if "refused" in found:
        assert "no float16 on 'cpu' devices" in found["refused"]
        return
    for stage in (1, 2, 3):
        assert found[stage]["losses"][-1] < found[stage]["losses"][0], stage
        assert found[stage]["dtypes"] == {torch.float16}
        same(found[stage]["again"][0], found[stage]["end"][0])


def test_a_stale_lock_is_removed_and_one_that_is_held_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert not optimizers.drop_stale_lock("some_op")
    lock = tmp_path / "some_op/lock"
    assert lock.parent.is_dir()
    held = os.open(lock, os.O_CREAT | os.O_EXCL)
    assert not optimizers.drop_stale_lock("some_op")
    os.close(held)
    with pytest.warns(UserWarning, match="lock that a process left"):
        assert optimizers.drop_stale_lock("some_op")
    assert not lock.exists()


def test_without_a_compiler_there_is_torchs_adamw_with_one_notice(tmp_path):
    code = (
        "import warnings, torch\n"
        "from drivetrain_deepspeed.engine import import_deepspeed\n"
        "import_deepspeed('cpu')\n"
        "from drivetrain_deepspeed import cpu_adam\n"
        "layer = torch.nn.Linear(2, 2)\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    made = cpu_adam(layer.parameters(), lr=0.5)\n"
        "notices = [w for w in caught if 'DeepSpeedCPUAdam' in str(w.message)]\n"
        "print(type(made).__module__, type(made).__name__, len(notices), made.defaults['lr'])\n"
    )
    env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": "/nowhere/g++"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=400, check=True,
        env={**env, "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    assert done.stdout.split()[-4:] == ["torch.optim.adamw", "AdamW", "1", "0.5"], done.stderr


def test_files_are_refused_without_libaio_or_a_folder(tmp_path, monkeypatch):
    deepspeed = import_deepspeed("cpu")
    files = {"offload_optimizer": "nvme", "offload_parameters": "nvme"}
    missing = DeepSpeedStrategy(3, nvme_path=str(tmp_path / "none"), **files)
    with pytest.raises(ConfigurationError, match="no folder that this process can write"):
        check_nvme(missing._merged, deepspeed)
    monkeypatch.setattr(
        deepspeed.accelerator.get_accelerator(), "get_op_builder", lambda name: None
    )
    there = DeepSpeedStrategy(3, nvme_path=str(tmp_path), **files)
    with pytest.raises(UnavailableError, match="libaio"):
        check_nvme(there._merged, deepspeed)


@pytest.fixture(scope="module")
def compiled():
    """DeepSpeed's Adam for the host, compiled in this one process before ranks ask for it."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    import_deepspeed("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build_cpu_adam()


@pytest.mark.slow
@pytest.mark.timeout(3600)  # a busy machine compiles for long
def test_deepspeeds_adam_on_the_host_trains_as_torchs_does(compiled, ask):
    found = ask("host_adam")
    assert found["kind"] == "DeepSpeedCPUAdam"
    assert found["notices"] == []
    for name in ("2", "3"):
        for key, value in found["ddp"].items():
            assert torch.allclose(found[name][key], value, atol=1e-5, rtol=0), (name, key)


@pytest.fixture(scope="module")
def reads_files():
    """What reads and writes files, compiled in this one process before ranks ask for it."""
    deepspeed = import_deepspeed("cpu")
    builder = deepspeed.accelerator.get_accelerator().get_op_builder("AsyncIOBuilder")
    if not builder().is_compatible(verbose=False):
        pytest.skip("needs g++ and libaio with its headers: libaio-dev on Debian")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        builder().load(verbose=False)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # a busy machine compiles for long
@pytest.mark.parametrize("make_optimizer", ["torch", "deepspeed"])
def test_what_waits_in_files_trains_as_ddp_does_and_is_resumed(
    reads_files, request, ask, tmp_path, make_optimizer
):
    if make_optimizer == "deepspeed":
        request.getfixturevalue("compiled")
    found = ask("in_files", folder=str(tmp_path), make_optimizer=make_optimizer)
    assert found["parameters"] == 6, "every weight has a file"
    assert found["files"] == {"float32params", "optimizer"}
    assert found["held"] == 1, "and its part is nowhere else"
    assert found["found"] == pytest.approx(found["wanted"], rel=1e-5)
    assert found["apart"] < 1e-6
    for what in ("whole", "loaded", "resumed", "from meta"):
        assert found[what] == [], what
