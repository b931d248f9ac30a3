"""``dp``, ``ddp2`` and ``rpc``: batches that devices or ranks share, and calls between ranks."""

from __future__ import annotations

import pytest
import strategy_worlds as here
import torch
from drivetrain import FunctionalModule, Trainer
from drivetrain_cpu.backend import CpuBackend
from drivetrain_interfaces import (
    ConfigurationError,
    DataError,
    StepSpec,
    StrategyContext,
    UnsupportedError,
    World,
)
from drivetrain_toolkit.strategies import DataParallelStrategy


def close(one, other, **tolerance):
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], **tolerance)


def bound(strategy, world=None, **options):
    backend = CpuBackend()
    world = world or World()
    return strategy(
        StrategyContext(
            accelerator=backend.accelerator(),
            device_index=0,
            world=world,
            collectives=backend.collectives(World()),
            precision=backend.precision("32-true"),
            options=options,
        )
    )


@pytest.mark.parametrize("devices", [(0, 1), (0, 1, 2)])
def test_devices_of_one_process_train_as_one(devices, monkeypatch):
    strategy = bound(DataParallelStrategy(devices=devices))
    module = strategy.prepare(here.model())
    # Another index of the host is the same memory: what is copied there goes through backward.
    strategy._devices = tuple(torch.device("cpu", index) for index in devices)
    monkeypatch.setattr(torch.Tensor, "to", _copied_on_the_way(torch.Tensor.to))
    optimizers = here.OPTIMIZERS["adamw"](module)
    step = strategy.train_step(StepSpec(module, optimizers, here.loss_of))
    for batch in here.joined(2, here.STEPS):
        step([batch])
    close(dict(module.named_parameters()), here.reference(2), rtol=2e-4, atol=2e-5)


def _copied_on_the_way(to):
    def moved(self, *args, **kwargs):
        made = to(self, *args, **kwargs)
        return made.clone() if made is self and self.requires_grad else made

    return moved


def test_a_batch_may_be_smaller_than_the_devices_and_must_have_rows():
    strategy = bound(DataParallelStrategy(devices=[0, 1, 2]))
    module = strategy.prepare(here.model())
    step = strategy.train_step(StepSpec(module, here.OPTIMIZERS["sgd"](module), here.loss_of))
    assert step([here.batches(0, 1, rows=1)[0]]).applied
    with pytest.raises(DataError, match="'dp' divides batches by rows"):
        step([(torch.ones(2, 4), torch.ones(3, 4))])


def test_one_process_drives_all_devices_in_a_trainer():
    net = here.model()
    module = FunctionalModule(
        net,
        training_step=here.loss_of,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    )
    trainer = Trainer(
        accelerator="cpu",
        strategy="dp",
        devices=2,
        max_steps=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    assert (trainer.plan.world_size, trainer.plan.devices) == (1, (0, 1))
    trainer.fit(module, here.batches(0, 3))
    assert trainer.global_step == 3


def test_dp_refuses_several_processes():
    world = World(0, 2, 0, 2, address="127.0.0.1", port=1)
    with pytest.raises(UnsupportedError, match="'dp' was asked for in a world of 2"):
        bound(DataParallelStrategy(), world)


@pytest.mark.parametrize("loss", ["contrast", "contrast_by_parts"])
@pytest.mark.parametrize(
    ("size", "node_size"), [(2, 2), pytest.param(4, 2, marks=pytest.mark.slow)]
)
def test_a_nodes_batch_is_one_loss(worlds, size, node_size, loss):
    answers = worlds(size).run(
        "strategy_worlds:train_on_nodes", "ddp2", node_size=node_size, loss=loss
    )
    wanted = here.nodes_by_hand(size, node_size)
    for rank, answer in enumerate(answers):
        close(answer["end"], wanted, rtol=2e-4, atol=2e-5)
        assert answer["losses"] == answers[rank - rank % node_size]["losses"]


def test_a_nodes_batch_is_accumulated_by_rows(worlds):
    answers = worlds(2).run(
        "strategy_worlds:train_on_nodes", "ddp2", node_size=2, loss="contrast", accumulate=3
    )
    close(answers[0]["end"], here.nodes_by_hand(2, 2, 3), rtol=2e-4, atol=2e-5)


def test_a_node_size_that_does_not_divide_is_refused(worlds):
    for text in worlds(2).run(
        "strategy_worlds:refused", "ddp2", kind="DDP2Strategy", options={"node_size": 3}
    ):
        assert "node_size=3" in text
        assert "world of 2" in text


def test_ranks_call_each_other_and_disconnect(worlds):
    for _ in range(2):
        answers = worlds(2).run("strategy_worlds:call_the_next", "rpc")
        assert answers == [2.0, 3.0]


def test_the_older_classes_take_the_older_arguments():
    from drivetrain.plugins import DataParallelPlugin, DDP2Plugin, DDPShardedPlugin, RPCPlugin

    assert DDP2Plugin(find_unused_parameters=True).ddp_kwargs["find_unused_parameters"]
    assert DDPShardedPlugin().name == "zero1"
    assert RPCPlugin(rpc_timeout_sec=5).name == "rpc"
    assert DataParallelPlugin([torch.device("cuda", 1)]).name == "dp"
    with pytest.raises(ConfigurationError, match="an index"):
        DataParallelPlugin([torch.device("cpu")])
    with pytest.raises(ConfigurationError, match="the strategy does not decide that"):
        DDPShardedPlugin(num_nodes=2)
