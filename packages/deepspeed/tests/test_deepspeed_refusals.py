"""What the engine cannot do is refused by name, before anything is trained."""

from __future__ import annotations

import pytest
import torch
from drivetrain_interfaces import (
    Clip,
    ClusterError,
    ConfigurationError,
    ManualSpec,
    ReduceOp,
    StepHooks,
    StepSpec,
    StrategyContext,
    UnsupportedError,
    World,
)
from drivetrain_interfaces.discovery import load_backend
from drivetrain_toolkit.checks import same_version

from drivetrain_deepspeed import DeepSpeedStrategy
from drivetrain_deepspeed.precision import DeepSpeedPrecision
from drivetrain_deepspeed.seeds import DeepSpeedPlugin, DeepSpeedPrecisionPlugin

pytestmark = pytest.mark.timeout(400)  # its first engine takes long on a busy machine


@pytest.fixture
def bind():
    backend = load_backend("cpu").load()
    made = []

    def bind_one(strategy, precision="32-true", **context):
        if isinstance(precision, str):
            precision = backend.precision(precision)
        accelerator = backend.accelerator()
        accelerator.activate(0, 1)
        bound = strategy(
            StrategyContext(
                accelerator, 0, World(), backend.collectives(World()), precision, **context
            )
        )
        made.append(bound)
        return bound

    yield bind_one
    for each in made:
        each.close()


def build(strategy, make=torch.optim.SGD, count=1, **settings):
    module = strategy.prepare(torch.nn.Linear(3, 2))
    optimizers = [make(module.parameters(), lr=0.1) for _ in range(count)]
    return strategy.train_step(
        StepSpec(module, optimizers, lambda m, x: m(x).square().mean(), **settings)
    )


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"count": 2}, "2 optimizers were given"),
        ({"make": torch.optim.LBFGS}, "LBFGS evaluates the loss itself"),
        ({"make": torch.optim.Adagrad}, "Adagrad was given"),
        ({"clip": Clip(1.0, "value")}, "Clipping by value"),
        ({"hooks": StepHooks(before_optimizer_step=print)}, "before_optimizer_step was given"),
        ({"hooks": StepHooks(before_zero_grad=print)}, "before_zero_grad was given"),
    ],
)
def test_a_step_that_the_engine_cannot_make_is_refused(bind, settings, text):
    with pytest.raises(UnsupportedError, match=text):
        build(bind(DeepSpeedStrategy(1)), **settings)


def test_manual_optimization_is_refused(bind):
    strategy = bind(DeepSpeedStrategy(1))
    with pytest.raises(UnsupportedError, match="owns backward"):
        strategy.manual_step(ManualSpec(strategy.prepare(torch.nn.Linear(3, 2)), [], print))


def test_an_argument_of_the_trainer_that_contradicts_is_refused_with_both_values(bind):
    strategy = bind(DeepSpeedStrategy(1, config={"gradient_clipping": 0.5}))
    with pytest.raises(ConfigurationError, match=r"is 1\.0, and config has gradient_clipping=0\.5"):
        build(strategy, clip=Clip(1.0))


def test_what_was_filled_in_is_logged(bind, caplog):
    config = {"gradient_clipping": "auto", "zero_optimization": {"reduce_bucket_size": "auto"}}
    with caplog.at_level("INFO", "drivetrain_deepspeed.strategy"):
        build(bind(DeepSpeedStrategy(1, config=config)), clip=Clip(0.5))
    (text,) = [r.getMessage() for r in caplog.records if "completed with" in r.getMessage()]
    assert "gradient_clipping=0.5" in text
    assert 'zero_optimization.reduce_bucket_size="DeepSpeed\'s default"' in text


def test_a_key_that_a_section_of_deepspeed_does_not_know_is_refused(bind):
    strategy = bind(DeepSpeedStrategy(1, config={"zero_optimization": {"bucket": 1}}))
    with pytest.raises(ConfigurationError, match="bucket"):
        build(strategy)


@pytest.mark.parametrize("precision", ["64-true", "16-mixed"])
def test_a_precision_that_the_engine_has_not_is_refused(bind, precision):
    with pytest.raises(UnsupportedError, match=precision):
        bind(DeepSpeedStrategy(1), precision)


def test_float16_is_refused_where_the_device_has_none(bind, monkeypatch):
    import deepspeed

    accelerator = deepspeed.accelerator.get_accelerator()
    monkeypatch.setattr(accelerator, "is_fp16_supported", lambda: False)
    with pytest.raises(UnsupportedError, match="no float16 on 'cpu' devices"):
        bind(DeepSpeedStrategy(1), DeepSpeedPrecision(16))


def test_half_precision_without_a_float32_copy_is_refused(bind):
    with pytest.raises(UnsupportedError, match="at stage 0"):
        bind(DeepSpeedStrategy(0), "bf16-true")


def test_batch_statistics_over_processes_are_refused(bind):
    with pytest.raises(UnsupportedError, match="Batch statistics"):
        bind(DeepSpeedStrategy(1), sync_batchnorm=True)


def test_ranks_with_other_versions_are_refused():
    class Others:
        def all_reduce(self, tensor, op):
            return tensor if op is ReduceOp.MAX else torch.tensor([0, 18, 1, 0])

    with pytest.raises(ClusterError, match=r"0\.18\.1 and 0\.19\.8"):
        same_version("DeepSpeed", "0.19.8", Others())


def test_the_older_names_take_the_older_arguments():
    plugin = DeepSpeedPlugin(stage=3, offload_optimizer=True, partition_activations=True)
    assert plugin.stage == 3
    assert plugin.options.offload_optimizer == "cpu"
    assert plugin._merged.get("activation_checkpointing.partition_activations") is True
    assert DeepSpeedPlugin(zero_optimization=False).stage == 0
    with pytest.raises(ConfigurationError, match="num_nodes=2"):
        DeepSpeedPlugin(num_nodes=2)
    with pytest.raises(ConfigurationError, match="stags"):
        DeepSpeedPlugin(stags=2)
    assert DeepSpeedPrecisionPlugin("bf16").name == "bf16-true"
    with pytest.raises(ConfigurationError, match="Apex"):
        DeepSpeedPrecisionPlugin(16, "apex")
    with pytest.raises(ConfigurationError, match="'8'"):
        DeepSpeedPrecisionPlugin("8")
