"""What a fit computes and calls, against loops and lists that were written by hand."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from drivetrain import Callback, DataModule, FunctionalModule, Module, Trainer
from drivetrain.callbacks.base import Moment
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": False,
}


def _data(size: int = 28) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(size, 6, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True).cos())


def _network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


# The order of the hooks

HOOKS = [name for name in vars(Callback) if name.startswith("on_") or name in {"setup", "teardown"}]


def _spy(name: str, log: list[str], label: str) -> Callable[..., None]:
    def hook(self: Any, *args: Any, **kwargs: Any) -> None:
        moment = f"({args[-1].value})" if args and isinstance(args[-1], Moment) else ""
        log.append(f"{label}.{name}{moment}")

    return hook


def _watched(base: type, label: str, names: list[str], log: list[str], **more: Any) -> Any:
    """A subclass of ``base`` whose hooks write down their names."""
    return type(label, (base,), {**{name: _spy(name, log, label) for name in names}, **more})


def _each(name: str) -> list[str]:
    """Callbacks before the module, and those that save checkpoints after other callbacks."""
    return [f"cb.{name}", f"ck.{name}", f"m.{name}"]


def _offer(moment: str) -> list[str]:
    return [f"cb.on_save_opportunity({moment})", f"ck.on_save_opportunity({moment})"]


VALIDATION = [
    *_each("on_validation_start"),
    *_each("on_validation_epoch_start"),
    *_each("on_validation_batch_start"),
    "m.validation_step",
    *_each("on_validation_batch_end"),
    *_each("on_validation_epoch_end"),
    *_each("on_validation_end"),
]
MICROBATCH = ["m.training_step", *_each("on_before_backward"), *_each("on_after_backward")]
UPDATE = [*_each("on_before_optimizer_step"), *_each("on_before_zero_grad")]
START, END = _each("on_train_batch_start"), _each("on_train_batch_end")
EPOCH = [
    *_each("on_train_epoch_start"),
    # a window of two batches
    *(START * 2),
    *(MICROBATCH * 2),
    *UPDATE,
    *(END * 2),
    *_offer("step"),
    # the last window holds what is left: one
    *START,
    *MICROBATCH,
    *UPDATE,
    *END,
    *_offer("step"),
    *VALIDATION,
    *_offer("validation"),
    *_each("on_train_epoch_end"),
    *_offer("epoch"),
]
WHOLE_FIT = [
    "dm.prepare_data",
    "m.prepare_data",
    "dm.setup",
    *_each("setup"),
    "m.configure_model",
    "m.configure_optimizers",
    *_each("on_fit_start"),
    "cb.on_sanity_check_start",
    "ck.on_sanity_check_start",
    *VALIDATION,
    "cb.on_sanity_check_end",
    "ck.on_sanity_check_end",
    *_each("on_train_start"),
    *EPOCH,
    *EPOCH,
    *_offer("end"),
    *_each("on_save_checkpoint"),
    *_each("on_train_end"),
    *_each("on_fit_end"),
    "dm.teardown",
    *_each("teardown"),
]


def test_a_whole_fit_calls_every_hook_in_the_documented_order(tmp_path: Path) -> None:
    log: list[str] = []

    def training_step(self: Any, batch: Any, batch_idx: int) -> torch.Tensor:
        log.append("m.training_step")
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self: Any) -> Any:
        log.append("m.configure_optimizers")
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def save_at_the_end(self: Any, trainer: Any, module: Any, moment: Moment) -> None:
        log.append(f"ck.on_save_opportunity({moment.value})")
        if moment is Moment.END:
            trainer.save_checkpoint(tmp_path / "end.ckpt")

    more = ["prepare_data", "configure_model", "validation_step"]
    without_module = {"on_sanity_check_start", "on_sanity_check_end", "on_save_opportunity"}
    model = _watched(
        Module,
        "m",
        [name for name in HOOKS if name not in {*without_module, "on_exception"}] + more,
        log,
        training_step=training_step,
        configure_optimizers=configure_optimizers,
    )()
    model.net = _network()
    plain = _watched(Callback, "cb", HOOKS, log)()
    saver = _watched(
        Callback,
        "ck",
        HOOKS,
        log,
        saves_checkpoints=True,
        on_save_opportunity=save_at_the_end,
    )()
    data = _watched(DataModule, "dm", ["prepare_data", "setup", "teardown"], log)()
    trainer = Trainer(
        **QUIET,
        max_epochs=2,
        accumulate_grad_batches=2,
        num_sanity_val_steps=1,
        callbacks=[saver, plain],
    )
    trainer.fit(model, DataLoader(_data(12), 4), DataLoader(_data(4), 4), datamodule=data)
    assert log == WHOLE_FIT


def test_an_error_tells_callbacks_and_tears_down() -> None:
    log: list[str] = []

    class Breaks(Line):
        def on_train_epoch_end(self) -> None:
            raise LookupError("the user's own")

        def teardown(self, stage: str) -> None:
            log.append("m.teardown")

    callback = _watched(Callback, "cb", ["on_exception", "on_train_end", "teardown"], log)()
    data = _watched(DataModule, "dm", ["on_exception", "teardown"], log)()
    trainer = Trainer(**QUIET, max_epochs=1, callbacks=[callback])
    with pytest.raises(LookupError, match="the user's own"):
        trainer.fit(Breaks(), DataLoader(_data(), 4), datamodule=data)
    assert log == [
        "dm.on_exception",
        "cb.on_exception",
        "dm.teardown",
        "cb.teardown",
        "m.teardown",
    ]


# What is computed


class Line(Module):
    """Regression with an optimizer that is given."""

    def __init__(self, make: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.net = _network()
        self.make = make or (lambda parameters: torch.optim.SGD(parameters, lr=0.1))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


def _sgd(parameters: Any) -> Any:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def _adamw(parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, lr=0.02)


def _adam(parameters: Any) -> Any:
    return torch.optim.Adam(parameters, lr=0.02)


def _loop(
    make: Callable[..., Any],
    *,
    epochs: int = 3,
    batch: int = 4,
    window: int = 1,
    clip: Callable[..., Any] | None = None,
    autocast: torch.dtype | None = None,
    scaler: Any = None,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """What a person writes who has no trainer."""
    net = _network().to(dtype)
    optimizer = make(net.parameters())
    for _ in range(epochs):
        batches = list(DataLoader(_data(), batch))
        for begin in range(0, len(batches), window):
            group = batches[begin : begin + window]
            for x, y in group:
                with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                    loss = nn.functional.mse_loss(net(x.to(dtype)), y)
                loss = loss / len(group)
                (loss if scaler is None else scaler.scale(loss)).backward()
            if scaler is not None:
                scaler.unscale_(optimizer)
            if clip is not None:
                clip(net.parameters())
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad(set_to_none=True)
    return net


def _assert_same(found: nn.Module, expected: nn.Module) -> None:
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def _fitted(model: Module, batch: int = 4, **settings: Any) -> Any:
    trainer = Trainer(**{**QUIET, "max_epochs": 3, **settings})
    trainer.fit(model, DataLoader(_data(), batch))
    return model


def _clip_norm(parameters: Any) -> None:
    nn.utils.clip_grad_norm_(parameters, 0.05)


def _clip_value(parameters: Any) -> None:
    nn.utils.clip_grad_value_(parameters, 0.01)


@pytest.mark.parametrize("make", [_sgd, _adamw])
@pytest.mark.parametrize(
    ("settings", "by_hand"),
    [
        ({}, {}),
        # seven batches: three windows of two, and one that holds a single batch
        ({"accumulate_grad_batches": 2}, {"window": 2}),
        ({"gradient_clip_val": 0.05}, {"clip": _clip_norm}),
        (
            {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
            {"clip": _clip_value},
        ),
        (
            {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2},
            {"clip": _clip_norm, "window": 2},
        ),
        ({"precision": "bf16-mixed"}, {"autocast": torch.bfloat16}),
        ({"precision": "16-mixed"}, {"autocast": torch.float16, "scaler": True}),
        (
            {"precision": "16-mixed", "gradient_clip_val": 0.05},
            {"autocast": torch.float16, "scaler": True, "clip": _clip_norm},
        ),
        ({"precision": "64-true"}, {"dtype": torch.float64}),
    ],
    ids=["plain", "tail", "norm", "value", "both", "bf16", "16", "16-norm", "64"],
)
def test_parameters_equal_those_of_a_loop_by_hand_bit_for_bit(
    make: Any, settings: dict[str, Any], by_hand: dict[str, Any]
) -> None:
    if "scaler" in by_hand:
        by_hand = {**by_hand, "scaler": torch.amp.GradScaler("cpu")}
    _assert_same(_fitted(Line(make), **settings).net, _loop(make, **by_hand))


def test_a_window_is_weighted_by_what_it_contains() -> None:
    """28 samples in batches of 5 leave one of 3; windows of 4 then hold 20 and 8 samples."""
    model = _fitted(Line(_sgd), batch=5, accumulate_grad_batches=4)
    net, data = _network(), _data()
    optimizer = _sgd(net.parameters())
    for _ in range(3):
        for rows in (slice(0, 20), slice(20, 28)):
            x, y = data[rows]
            nn.functional.mse_loss(net(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(model.net.state_dict()[name], tensor)


def test_a_plain_network_with_functions_trains_like_the_loop_by_hand() -> None:
    validated: list[int] = []

    def training_step(net: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.mse_loss(net(batch[0]), batch[1])

    def validation_step(net: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        validated.append(len(batch[0]))
        return {"val_loss": nn.functional.mse_loss(net(batch[0]), batch[1])}

    net = _network()
    model = FunctionalModule(net, training_step, _adamw, validation_step)
    trainer = Trainer(**QUIET, max_epochs=3, num_sanity_val_steps=0)
    trainer.fit(model, DataLoader(_data(), 4), DataLoader(_data(8), 8))
    expected = _loop(_adamw)
    _assert_same(net, expected)
    assert validated == [8, 8, 8]
    x, y = _data(8)[:]
    loss = nn.functional.mse_loss(expected(x), y).item()
    assert trainer.callback_metrics["val_loss"] == pytest.approx(loss)


def test_an_optimizer_that_evaluates_the_loss_itself_trains_like_by_hand() -> None:
    def lbfgs(parameters: Any) -> Any:
        return torch.optim.LBFGS(parameters, lr=0.5, max_iter=4)

    model = _fitted(Line(lbfgs), batch=14)
    net = _network()
    optimizer = lbfgs(net.parameters())
    for _ in range(3):
        for x, y in DataLoader(_data(), 14):

            def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(net(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
    _assert_same(model.net, net)


def test_two_optimizers_both_step_on_the_one_loss() -> None:
    class Two(Line):
        def configure_optimizers(self) -> Any:
            return [_sgd(self.net[0].parameters()), _adamw(self.net[2].parameters())]

    model = _fitted(Two())
    net = _network()
    optimizers = [_sgd(net[0].parameters()), _adamw(net[2].parameters())]
    for _ in range(3):
        for x, y in DataLoader(_data(), 4):
            nn.functional.mse_loss(net(x), y).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    _assert_same(model.net, net)


def test_a_step_that_is_not_applied_counts_nowhere() -> None:
    """The first scales of 16-mixed overflow on a large loss."""
    schedule: list[int] = []

    class Loud(Line):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step(batch, batch_idx) * 300

        def configure_optimizers(self) -> Any:
            optimizer = _sgd(self.parameters())

            def rate(step: int) -> float:
                schedule.append(step)
                return 1e-4

            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    skipped: list[int] = []

    class Counts(Callback):
        def on_step_skipped(self, trainer: Any, module: Any) -> None:
            skipped.append(trainer.global_step)

    trainer = Trainer(**QUIET, max_epochs=1, precision="16-mixed", callbacks=[Counts()])
    trainer.fit(Loud(), DataLoader(_data(), 2))
    assert skipped
    assert trainer.global_step == 14 - len(skipped)
    assert schedule[-1] == trainer.global_step


# Manual optimization


class Gan(Module):
    """Two players that train against each other, by hand."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.artist = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 6))
        self.critic = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        artist, critic = self.optimizers()
        real = batch[0]
        fake = self.artist(real[:, :2])
        loss = _doubt(self.critic(real), 1.0) + _doubt(self.critic(fake.detach()), 0.0)
        self.manual_backward(loss)
        critic.step(max_norm=0.5)
        critic.zero_grad()
        loss = _doubt(self.critic(fake), 1.0)
        self.manual_backward(loss)
        artist.step()
        artist.zero_grad()
        critic.zero_grad()
        self.log("artist", loss)

    def configure_optimizers(self) -> Any:
        return [_adam(self.artist.parameters()), _adam(self.critic.parameters())]


def _doubt(verdict: torch.Tensor, truth: float) -> torch.Tensor:
    return nn.functional.binary_cross_entropy_with_logits(verdict, torch.full_like(verdict, truth))


def _gan_by_hand(batch: int) -> Gan:
    gan = Gan()
    artist_optimizer, critic_optimizer = gan.configure_optimizers()
    for _ in range(2):
        for real, _ in DataLoader(_data(24), batch):
            fake = gan.artist(real[:, :2])
            (_doubt(gan.critic(real), 1.0) + _doubt(gan.critic(fake.detach()), 0.0)).backward()
            nn.utils.clip_grad_norm_(gan.critic.parameters(), 0.5)
            critic_optimizer.step()
            critic_optimizer.zero_grad()
            _doubt(gan.critic(fake), 1.0).backward()
            artist_optimizer.step()
            artist_optimizer.zero_grad()
            critic_optimizer.zero_grad()
    return gan


def test_manual_optimization_equals_the_loop_by_hand_bit_for_bit() -> None:
    gan = Gan()
    trainer = Trainer(**QUIET, max_epochs=2)
    trainer.fit(gan, DataLoader(_data(24), 4))
    _assert_same(gan, _gan_by_hand(4))
    assert trainer.global_step == 2 * 2 * 6  # two updates per batch


def test_manual_optimization_on_two_ranks_equals_twice_the_batch(tmp_path: Path) -> None:
    class Keeps(Callback):
        def on_train_end(self, trainer: Any, module: Any) -> None:
            torch.save(module.state_dict(), tmp_path / f"{trainer.world.rank}.pt")

    trainer = Trainer(**QUIET, max_epochs=2, devices=2, launcher="fork", callbacks=[Keeps()])
    gan = Gan()
    trainer.fit(gan, DataLoader(_data(24), 4))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    expected = _gan_by_hand(8).state_dict()
    for name, tensor in ranks[0].items():
        assert torch.equal(tensor, ranks[1][name]), name
        assert torch.equal(tensor, gan.state_dict()[name]), name
        torch.testing.assert_close(tensor, expected[name])


def test_the_users_module_is_the_one_that_trains() -> None:
    """No copy is trained in its place, and its modes are those that it had."""
    model = Line()
    model.net[1].eval()
    before = copy.deepcopy(model.state_dict())
    _fitted(model)
    assert not torch.equal(before["net.0.weight"], model.net[0].weight)
    assert model.training
    assert not model.net[1].training
