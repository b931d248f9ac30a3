"""Training by programs: the same numbers as plain torch, the device taken in turns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drivetrain_interfaces import (
    DataError,
    EvalSpec,
    ModelState,
    StepSpec,
    UnavailableError,
    UserCodeError,
)
from poptorch import devices
from poptorch.wrapping import PoptorchParameter
from torch import nn

from drivetrain_ipu.strategy import IpuStrategy

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5, weight_decay=0.01, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.9), eps=1e-6),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_equals_plain_torch(lab: Any, name: Any) -> None:
    windows = [[batch] for batch in lab.batches(4)]
    losses, module = lab.train(lab.bind(), windows, optimizer=OPTIMIZERS[name])
    wanted, plain = lab.by_hand(lab.model(), windows, OPTIMIZERS[name])
    assert losses == pytest.approx(wanted, rel=1e-6)
    assert lab.apart(module, plain) < 1e-6


@pytest.mark.parametrize("replicas", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_replicas_and_accumulation_are_one_large_batch(
    lab: Any, replicas: Any, accumulate: Any
) -> None:
    drawn = lab.batches(3 * accumulate, rows=8)
    windows = [drawn[n : n + accumulate] for n in range(0, len(drawn), accumulate)]
    losses, module = lab.train(lab.bind(devices=replicas), windows, accumulate=accumulate)
    wanted, plain = lab.by_hand(lab.model(), windows)
    assert losses == pytest.approx(wanted, rel=1e-5)
    assert lab.apart(module, plain) < 1e-6


def test_a_short_window_is_divided_by_what_it_holds(lab: Any) -> None:
    drawn = lab.batches(5)
    windows = [drawn[:3], drawn[3:]]
    losses, module = lab.train(lab.bind(), windows, accumulate=3)
    wanted, plain = lab.by_hand(lab.model(), windows)
    assert losses == pytest.approx(wanted, rel=1e-5)
    assert lab.apart(module, plain) < 1e-6


def test_weights_of_microbatches_count(lab: Any) -> None:
    drawn = lab.batches(2)
    weights = iter([1.0, 3.0])
    strategy = lab.bind()
    losses, module = lab.train(strategy, [drawn], accumulate=2, weight=lambda _: next(weights))
    model = lab.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    each = [lab.loss(model, batch) for batch in drawn]
    total = each[0] * 0.25 + each[1] * 0.75
    total.backward()
    optimizer.step()
    assert losses == pytest.approx([float(total.detach())], rel=1e-6)
    assert lab.apart(module, model) < 1e-6


def test_device_iterations_are_updates_of_one_call(lab: Any) -> None:
    (large,) = lab.batches(1, rows=8)
    _, module = lab.train(lab.bind(device_iterations=2), [[large]])
    parts = [[tuple(t[:4] for t in large)], [tuple(t[4:] for t in large)]]
    _, plain = lab.by_hand(lab.model(), parts)
    assert lab.apart(module, plain) < 1e-6


def test_device_iterations_and_accumulation_share_microbatches(lab: Any) -> None:
    window = lab.batches(2, rows=8)
    _, module = lab.train(lab.bind(device_iterations=2), [window], accumulate=2)
    parts = [
        [tuple(t[:4] for t in batch) for batch in window],
        [tuple(t[4:] for t in batch) for batch in window],
    ]
    _, plain = lab.by_hand(lab.model(), parts)
    assert lab.apart(module, plain) < 1e-6


def test_user_code_runs_once_and_gradients_stay_on_the_device(lab: Any) -> None:
    calls = []

    def loss(module: Any, batch: Any) -> Any:
        calls.append(1)
        return lab.loss(module, batch)

    _, module = lab.train(lab.bind(), [[b] for b in lab.batches(4)], loss=loss)
    assert len(calls) == 1
    assert all(p.grad is None for p in module.parameters())


def test_any_formula_is_a_loss(lab: Any) -> None:
    def loss(module: Any, batch: Any) -> Any:
        one = nn.functional.mse_loss(module(batch[0]), batch[1])
        return 0.5 * one + module[0].weight.square().sum() * 0.01

    windows = [[b] for b in lab.batches(2)]
    losses, _ = lab.train(lab.bind(), windows, loss=loss)
    assert losses == pytest.approx(lab.by_hand(lab.model(), windows, loss=loss)[0], rel=1e-6)


@pytest.mark.parametrize("precision", ["16-true", "16-mixed"])
def test_products_are_made_in_float16(lab: Any, precision: Any) -> None:
    seen = []

    def loss(module: Any, batch: Any) -> Any:
        out = module(batch[0])
        seen.append(out.dtype)
        return (out.float() - batch[1]).square().mean()

    windows = [[b] for b in lab.batches(3)]
    losses, module = lab.train(lab.bind(precision), windows, loss=loss)
    assert seen == [torch.float16]
    stored = torch.float16 if precision == "16-true" else torch.float32
    assert {p.dtype for p in module.parameters()} == {stored}
    assert losses == pytest.approx(lab.by_hand(lab.model(), windows)[0], rel=2e-2)


def test_statistics_stay_in_float32_in_16_true(lab: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    _, module = lab.train(
        lab.bind("16-true"),
        [[b] for b in lab.batches(2)],
        model=model,
        loss=lambda m, b: (m(b[0]).float() - b[1]).square().mean(),
    )
    assert module[1].running_mean.dtype is torch.float32
    assert module[1].weight.dtype is torch.float16
    assert int(module[1].num_batches_tracked) == 2


def test_the_norm_is_clipped_on_the_device_if_that_is_asked(lab: Any) -> None:
    windows = [[b] for b in lab.batches(3)]
    _, module = lab.train(lab.bind(max_grad_norm=0.05), windows)
    _, plain = lab.by_hand(lab.model(), windows, clip=0.05)
    _, unclipped = lab.by_hand(lab.model(), windows)
    assert lab.apart(module, plain) < 1e-5
    assert lab.apart(module, unclipped) > 1e-3


def test_the_learning_rate_follows_a_scheduler(lab: Any) -> None:
    windows = [[b] for b in lab.batches(4)]
    strategy = lab.bind()
    module, optimizer, step = lab.build(strategy)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    with step:
        for window in windows:
            step(window)
            scheduler.step()
    model = lab.model()
    plain = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    other = torch.optim.lr_scheduler.StepLR(plain, 1, 0.5)
    for (batch,) in windows:
        lab.loss(model, batch).backward()
        plain.step()
        plain.zero_grad()
        other.step()
    assert lab.apart(module, model) < 1e-6


def test_a_hyperparameter_that_is_compiled_in_may_be_declared_variable(lab: Any) -> None:
    (batch,) = lab.batches(1)
    _, optimizer, step = lab.build(lab.bind(variable=("lr", "momentum")))
    with step:
        step([batch])
        optimizer.param_groups[0]["momentum"] = 0.1
        step([batch])


# The device, and what is on it
def test_the_device_is_held_between_the_steps_ends(lab: Any) -> None:
    (batch,) = lab.batches(1)
    strategy = lab.bind()
    module, _, step = lab.build(strategy)
    with step:
        step([batch])
        assert devices.held() == 1
        assert type(module[0].weight) is PoptorchParameter
    assert devices.held() == 0
    with step:
        assert devices.held() == 1
    strategy.close()
    assert devices.held() == 0
    assert type(module[0].weight) is nn.Parameter
    assert type(module[0]) is nn.Linear


def test_evaluation_takes_the_device_and_gives_it_back(lab: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv(devices.VARIABLE, "1")
    batches = lab.batches(4)
    strategy = lab.bind()
    module, _, step = lab.build(strategy)
    spec = EvalSpec(module, lambda m, b: m(b[0]), inference_mode=False)
    evaluation = strategy.eval_step(spec)
    with step:
        step([batches[0]])
        for number in (1, 2):
            with evaluation:
                found = evaluation(batches[3])
            plain = lab.by_hand(lab.model(), [[b] for b in batches[:number]])[1]
            assert torch.allclose(found, plain(batches[3][0]), atol=1e-6)
            step([batches[number]])
    _, plain = lab.by_hand(lab.model(), [[b] for b in batches[:3]])
    assert lab.apart(module, plain) < 1e-6


def test_evaluation_before_training_sees_the_weights_of_the_host(lab: Any) -> None:
    (batch,) = lab.batches(1)
    strategy = lab.bind()
    module = strategy.prepare(lab.model())
    spec = EvalSpec(module, lambda m, b: m(b[0]), inference_mode=False)
    evaluation = strategy.eval_step(spec)
    for _ in range(2):
        with evaluation:
            found = evaluation(batch)
        assert torch.allclose(found, module(batch[0]), atol=1e-6)
        with torch.no_grad():
            module[0].weight.mul_(2)


def test_a_busy_device_is_told(lab: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv(devices.VARIABLE, "0")
    (batch,) = lab.batches(1)
    _, _, step = lab.build(lab.bind())
    with pytest.raises(UnavailableError, match="Wait for whoever holds them"), step:
        step([batch])
    monkeypatch.setenv(devices.VARIABLE, "1")
    with step:
        step([batch])


def test_an_error_while_compiling_leaves_the_module_as_it_was(lab: Any) -> None:
    (batch,) = lab.batches(1)

    def loss(module: Any, item: Any) -> Any:
        raise OSError("the user's own")

    strategy = lab.bind()
    module, _, step = lab.build(strategy, loss=loss)
    with pytest.raises(OSError, match="the user's own"), step:
        step([batch])
    assert type(module[0].weight) is nn.Parameter
    assert lab.train(strategy, [[batch]], model=module)


def test_a_second_step_replaces_the_first(lab: Any) -> None:
    (batch,) = lab.batches(1)
    strategy = lab.bind()
    module, _, first = lab.build(strategy)
    with first:
        first([batch])
    _, _, second = lab.build(strategy, model=module)
    with second:
        second([batch])
        with pytest.raises(UserCodeError, match="built another one"):
            first([batch])


# What changes, and may not
def test_batches_keep_the_shape_that_was_compiled(lab: Any) -> None:
    _, _, step = lab.build(lab.bind())
    with step:
        step(lab.batches(1, rows=4))
        with pytest.raises(DataError, match="drop_last=True"):
            step(lab.batches(1, rows=3))
        step(lab.batches(1, rows=4))


def test_a_batch_that_replicas_cannot_share_is_refused(lab: Any) -> None:
    _, _, step = lab.build(lab.bind(devices=2))
    with pytest.raises(DataError, match="multiple of 2"), step:
        step(lab.batches(1, rows=3))


def test_values_that_are_no_tensors_may_not_change(lab: Any) -> None:
    def loss(module: Any, batch: Any) -> Any:
        return module(batch["x"]).square().mean() * batch["scale"]

    _, _, step = lab.build(lab.bind(), loss=loss)
    with step:
        step([{"x": torch.ones(4, 4), "scale": 2.0}])
        with pytest.raises(DataError, match="tensors alone"):
            step([{"x": torch.ones(4, 4), "scale": 3.0}])


def test_a_mode_that_changes_is_refused(lab: Any) -> None:
    (batch,) = lab.batches(1)
    module, _, step = lab.build(lab.bind())
    with step:
        step([batch])
        module[1].eval()
        with pytest.raises(UserCodeError, match="Tanh is in evaluation mode now"):
            step([batch])


def test_evaluations_have_a_program_for_each_kind_of_batch(lab: Any) -> None:
    strategy = lab.bind()
    module = strategy.prepare(lab.model())
    spec = EvalSpec(module, lambda m, b, _: m(b[0]), inference_mode=False)
    with strategy.eval_step(spec) as step:
        for number, rows in enumerate((4, 3, 4, 3)):
            (batch,) = lab.batches(1, rows=rows)
            assert torch.allclose(step(batch, number), module(batch[0]), atol=1e-6)
        for rows in (5, 6):
            step(lab.batches(1, rows=rows)[0], 0)
        with pytest.raises(DataError, match="drop_last=True"):
            step(lab.batches(1, rows=7)[0], 0)


def test_a_number_that_is_read_makes_a_program_of_its_own(lab: Any) -> None:
    strategy = lab.bind()
    module = strategy.prepare(lab.model())

    def function(module: Any, batch: Any, number: Any) -> Any:
        return module(batch[0]) * (2 if number == 0 else 1)

    (batch,) = lab.batches(1)
    with strategy.eval_step(EvalSpec(module, function, inference_mode=False)) as step:
        for number in (0, 1, 0):
            wanted = module(batch[0]) * (2 if number == 0 else 1)
            assert torch.allclose(step(batch, number), wanted, atol=1e-6)
        for number in (2, 3):
            step(batch, number)
        with pytest.raises(DataError, match="reads a number"):
            step(batch, 4)


def test_results_of_an_evaluation_keep_their_containers_and_types(lab: Any) -> None:
    strategy = lab.bind(devices=2)
    module = strategy.prepare(lab.model())

    def function(module: Any, batch: Any) -> Any:
        scores = module(batch[0])
        return {"best": scores.argmax(1), "mean": scores.mean(), "name": "x", "nothing": None}

    (batch,) = lab.batches(1)
    with strategy.eval_step(EvalSpec(module, function, inference_mode=False)) as step:
        found = step(batch)
    scores = module(batch[0]).detach()
    assert torch.equal(found["best"], scores.argmax(1))
    assert found["best"].dtype is torch.int64
    assert float(found["mean"]) == pytest.approx(float(scores.mean()), rel=1e-5)
    assert (found["name"], found["nothing"]) == ("x", None)


class Logging(nn.Module):
    """A network that logs, as modules of a trainer do."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(4, 2)
        self.said: list[Any] = []

    def log(self, name: Any, value: Any, *, prog_bar: Any = False) -> Any:
        self.said.append((name, float(value), prog_bar))

    def forward(self, features: Any) -> Any:
        return self.line(features)


def test_what_a_step_logs_is_logged_after_each_run(lab: Any) -> None:
    def loss(module: Any, batch: Any) -> Any:
        value = lab.loss(module, batch)
        module.log("loss", value, prog_bar=True)
        module.log("constant", 3)
        return value

    drawn = lab.batches(4)
    strategy = lab.bind()
    module, _, step = lab.build(strategy, model=Logging(), loss=loss, accumulate=2)
    with step:
        losses = [float(step(drawn[n : n + 2]).loss) for n in (0, 2)]
    assert module.said[0] == ("loss", pytest.approx(losses[0], rel=1e-6), True)
    assert module.said[1] == ("constant", 3.0, False)
    assert module.said[2][1] == pytest.approx(losses[1], rel=1e-6)
    assert "log" not in vars(module)


# State
def adam(parameters: Any) -> Any:
    parameters = list(parameters)
    groups = [{"params": parameters[:2], "note": "mine"}, {"params": parameters[2:], "lr": 0.02}]
    return torch.optim.Adam(groups, lr=0.01)


def test_a_state_is_of_torchs_own_tensors_by_torchs_own_names(lab: Any) -> None:
    strategy = lab.bind()
    _, _, step = lab.build(strategy, optimizer=adam)
    with step:
        for batch in lab.batches(2):
            step([batch])
        state = strategy.state()
    assert all(type(tensor) is torch.Tensor for tensor in state.module.values())
    kept = state.optimizers[0]["state"]["0.weight"]
    assert set(kept) == {"step", "exp_avg", "exp_avg_sq"}
    assert float(kept["step"]) == 2


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_goes_on_from_its_state_bit_for_bit(lab: Any, name: Any) -> None:
    batches = lab.batches(4)
    optimizer = OPTIMIZERS[name]
    first = lab.bind()
    whole, _, step = lab.build(first, optimizer=optimizer)
    with step:
        for batch in batches[:2]:
            step([batch])
        state = first.state()
        for batch in batches[2:]:
            step([batch])
    second = lab.bind()
    resumed, _, step = lab.build(second, model=lab.model(1), optimizer=optimizer)
    second.load(state)
    with step:
        for batch in batches[2:]:
            step([batch])
    assert lab.apart(whole, resumed) == 0


def test_a_state_can_be_loaded_while_a_program_is_on_the_device(lab: Any) -> None:
    batches = lab.batches(3)
    strategy = lab.bind()
    module, _, step = lab.build(strategy, optimizer=adam)
    with step:
        step([batches[0]])
        state = strategy.state()
        step([batches[1]])
        strategy.load(state)
        step([batches[1]])
        once = strategy.state()
    _, plain = lab.by_hand(lab.model(), [[b] for b in batches[:2]], adam)
    assert lab.apart(module, plain) < 1e-6
    assert float(once.optimizers[0]["state"]["0.weight"]["step"]) == 2


def test_a_state_of_plain_torch_goes_on_here(lab: Any) -> None:
    batches = lab.batches(4)
    model = lab.model()
    optimizer = adam(model.parameters())
    for batch in batches[:2]:
        lab.loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    names = {id(p): n for n, p in model.named_parameters()}
    saved = ModelState(
        module={n: t.clone() for n, t in model.state_dict().items()},
        optimizers=[
            {
                "state": {
                    names[id(p)]: {k: v.clone() for k, v in s.items()}
                    for p, s in optimizer.state.items()
                },
                "groups": [
                    {"parameters": [names[id(p)] for p in g["params"]],
                     **{k: v for k, v in g.items() if k != "params"}}
                    for g in optimizer.param_groups
                ],
            }
        ],
    )  # fmt: skip
    strategy = lab.bind()
    module, _, step = lab.build(strategy, model=lab.model(1), optimizer=adam)
    strategy.load(saved)
    with step:
        for batch in batches[2:]:
            step([batch])
    _, plain = lab.by_hand(lab.model(), [[b] for b in batches], adam)
    assert lab.apart(module, plain) < 1e-6


def test_random_numbers_of_the_device_go_on_too(lab: Any) -> None:
    def model() -> Any:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))

    batches = lab.batches(4)
    first = lab.bind(random_seed=7)
    whole, _, step = lab.build(first, model=model())
    accelerator = first.context.accelerator
    with step:
        for batch in batches[:2]:
            step([batch])
        state, numbers = first.state(), accelerator.rng_state(first.device)
        for batch in batches[2:]:
            step([batch])
    second = lab.bind(random_seed=8)
    resumed, _, step = lab.build(second, model=model())
    second.load(state)
    second.context.accelerator.set_rng_state(numbers, second.device)
    with step:
        for batch in batches[2:]:
            step([batch])
    assert lab.apart(whole, resumed) == 0


def test_the_seed_of_the_device_leaves_the_hosts_alone(lab: Any) -> None:
    torch.manual_seed(3)
    strategy = lab.bind(random_seed=7)
    module = strategy.prepare(nn.Linear(4, 2))
    before = torch.get_rng_state()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with strategy.train_step(StepSpec(module, [optimizer], lab.loss)) as step:
        step(lab.batches(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_tied_parameters_stay_tied(lab: Any) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4, bias=False)
            self.outer = nn.Linear(4, 4, bias=False)
            self.outer.weight = self.inner.weight

        def forward(self, x: Any) -> Any:
            return self.outer(self.inner(x).tanh())[:, :2]

    torch.manual_seed(0)
    model = Tied()
    windows = [[b] for b in lab.batches(3)]
    wanted = lab.by_hand(model, windows)[1]
    _, module = lab.train(lab.bind(), windows, model=model)
    assert lab.apart(module, wanted) < 1e-6
    assert module.outer.weight is module.inner.weight


# Pipelines
def test_a_divided_model_trains_as_a_whole_one(lab: Any) -> None:
    window = lab.batches(3)
    strategy = lab.bind(pipeline={"0": 0, "2": 1})
    _, module = lab.train(strategy, [window], accumulate=3)
    assert lab.apart(module, lab.by_hand(lab.model(), [window])[1]) < 1e-6
    executor = strategy._step.executor
    assert executor._ipus == 2
    strategy.close()
    assert not module[0]._forward_pre_hooks


def test_an_unbound_strategy_pickles_and_says_what_it_lacks() -> None:
    import pickle

    from drivetrain_interfaces import ConfigurationError

    made = pickle.loads(pickle.dumps(IpuStrategy(max_grad_norm=1.0)))
    with pytest.raises(ConfigurationError, match="not bound"):
        made.device  # noqa: B018 - a property that raises
