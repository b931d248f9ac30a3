"""Configuration: one value for each thing, unknown keys refused, ``auto`` filled and shown."""

from __future__ import annotations

import json

import pytest
from drivetrain_interfaces import ConfigurationError

from drivetrain_deepspeed.config import Options, Wanted, complete, read


def wanted(**changes):
    settings = {
        "accumulate": 1,
        "clip": None,
        "world_size": 2,
        "precision": "32-true",
        "parameters": "float32",
    }
    return Wanted(**{**settings, **changes})


def test_without_anything_the_stage_is_two_and_says_so():
    merged = read(Options())
    assert merged.get("zero_optimization.stage") == 2
    assert merged.filled == {"zero_optimization.stage": 2}


def test_options_and_a_file_are_merged(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 1000}}))
    merged = read(Options(stage=1, overlap_comm=False, config=path))
    assert merged.values["zero_optimization"] == {
        "stage": 1,
        "reduce_bucket_size": 1000,
        "overlap_comm": False,
    }
    assert merged.filled == {}


def test_what_the_user_gave_is_not_changed():
    config = {"zero_optimization": {"stage": 1}}
    complete(read(Options(config=config)), wanted())
    assert config == {"zero_optimization": {"stage": 1}}


def test_every_contradiction_is_named_with_both_values():
    config = {
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
    }
    with pytest.raises(ConfigurationError) as caught:
        complete(read(Options(config=config)), wanted(accumulate=2, clip=1.0))
    text = str(caught.value)
    assert "accumulation is 2, and config has gradient_accumulation_steps=4" in text
    assert "clipping by norm is 1.0, and config has gradient_clipping=0.5" in text
    assert "stores parameters in float32, and config has bf16.enabled=True" in text


def test_an_option_that_contradicts_the_configuration_is_named():
    with pytest.raises(ConfigurationError, match=r"stage is 3, and config has .*stage=1"):
        read(Options(stage=3, config={"zero_optimization": {"stage": 1}}))


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"zero_optimisation": {}}, "'zero_optimisation', which DeepSpeed does not read (it"),
        ({"checkpoint": {"load": True}}, "checkpoint.load, which DeepSpeed does not read"),
        ({"scheduler": []}, "scheduler=[], which is a section"),
        ({"optimizer": {"type": "AdamW"}}, "'optimizer', which is not for DeepSpeed here"),
        ({"zero_optimization": {"stage": 4}}, "the ZeRO stage is 4"),
        ({"zero_optimization": {"stage": True}}, "the ZeRO stage is True"),
    ],
)
def test_what_deepspeed_would_not_read_is_refused(config, text):
    with pytest.raises(ConfigurationError) as caught:
        read(Options(config=config))
    assert text in str(caught.value)


def test_auto_is_filled_with_what_the_trainer_knows_and_listed():
    config = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": "auto", "reduce_bucket_size": "auto"},
    }
    made = complete(
        read(Options(stage=3, config=config)),
        wanted(accumulate=4, clip=0.5, precision="bf16-true", parameters="bfloat16"),
    )
    assert made.values == {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3},
        "managed_gradient_accumulation": False,
    }
    assert made.filled["gradient_clipping"] == 0.5
    assert made.filled["zero_optimization.reduce_bucket_size"] == "DeepSpeed's default"


def test_auto_that_nobody_knows_is_refused():
    with pytest.raises(ConfigurationError, match=r"scheduler.type='auto'"):
        complete(read(Options(config={"scheduler": {"type": "auto"}})), wanted())


def test_batches_that_cannot_be_shared_are_refused():
    with pytest.raises(ConfigurationError, match=r"train_batch_size=33"):
        complete(read(Options(config={"train_batch_size": 33})), wanted())
    config = {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4}
    with pytest.raises(ConfigurationError, match=r"train_batch_size=32"):
        complete(read(Options(config=config)), wanted(accumulate=2))
    made = complete(read(Options(config={"train_batch_size": 32})), wanted(accumulate=2))
    assert made.get("train_micro_batch_size_per_gpu") == 8


def test_clipping_of_the_configuration_stands_where_the_trainer_has_none():
    made = complete(read(Options(config={"gradient_clipping": 0.5})), wanted())
    assert made.get("gradient_clipping") == 0.5


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"stage": 2, "offload_parameters": "cpu"}, "offload_parameters='cpu' needs stage 3"),
        ({"stage": 0, "offload_optimizer": "cpu"}, "offload_optimizer='cpu' needs stage 1"),
        ({"offload_optimizer": "disk"}, "offload_optimizer is 'disk'"),
        ({"offload_optimizer": "nvme"}, "nvme_path was not given"),
    ],
)
def test_offload_that_is_not_possible_is_refused(options, text):
    with pytest.raises(ConfigurationError) as caught:
        read(Options(**options))
    assert text in str(caught.value)


def test_offload_is_written_as_deepspeed_reads_it():
    merged = read(
        Options(stage=3, offload_optimizer="nvme", offload_parameters="cpu", nvme_path="/fast")
    )
    assert merged.values["zero_optimization"] == {
        "stage": 3,
        "offload_optimizer": {"device": "nvme", "nvme_path": "/fast"},
        "offload_param": {"device": "cpu", "nvme_path": "/fast"},
    }


@pytest.mark.parametrize("text", ["{", "[]", '{"bf16": {}, "bf16": {}}'])
def test_a_file_that_is_no_configuration_is_refused(tmp_path, text):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=r"ds\.json"):
        read(Options(config=path))


def test_a_file_that_is_missing_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="could not be read"):
        read(Options(config=tmp_path / "none.json"))
