"""Several processes: the same run, whoever starts it, and no more talk than needed."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from drivetrain import Callback, Module, Runtime, Trainer, seed_everything
from drivetrain.callbacks import EarlyStopping
from torch import nn
from torch.utils.data import DataLoader
from training_parts import Recorder, Regression, Samples, loader

if TYPE_CHECKING:
    from conftest import Starter

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": False,
}
FORKED: dict[str, Any] = {**QUIET, "devices": 2, "launcher": "fork"}


def _rows(folder: Path, rank: int, event: str | None = None) -> list[dict[str, Any]]:
    text = (folder / f"events-{rank}.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    return [row for row in rows if event in (None, row["event"])]


# Launchers

LAUNCHERS = ["script", "spawn", "fork", "torchrun"]


@pytest.fixture(scope="module")
def launched(start_once: Starter) -> dict[str, Path]:
    """The folder of the same run by every launcher."""
    folders = {}
    for launcher in LAUNCHERS:
        out = start_once.folder / launcher
        out.mkdir()
        by = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        under_torchrun = launcher == "torchrun"
        trainer: dict[str, Any] = {"max_epochs": 2, "default_root_dir": str(out)}
        if not under_torchrun:
            trainer |= {"devices": 2, "launcher": launcher}
        else:
            trainer |= {"devices": "auto"}
        start_once.run(
            "train.py",
            json.dumps({"out": str(out), "trainer": trainer}),
            by=by if under_torchrun else (),
        )
        folders[launcher] = out
    return folders


@pytest.mark.parametrize("launcher", LAUNCHERS[1:])
def test_every_launcher_gives_the_same_run_bit_for_bit(
    launched: dict[str, Path], launcher: str
) -> None:
    expected, found = launched["script"], launched[launcher]
    assert (found / "done.json").read_text() == (expected / "done.json").read_text()
    for rank in (0, 1):
        assert _rows(found, rank) == _rows(expected, rank)
    assert _rows(found, 0, "batch") != _rows(found, 1, "batch")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_rank_0_writes_the_files_of_the_run(launched: dict[str, Path], launcher: str) -> None:
    names = {path.name for path in launched[launcher].iterdir()}
    assert {"metrics.csv", "hparams.json", "checkpoints"} <= names
    (saved,) = (launched[launcher] / "checkpoints").iterdir()
    assert saved.name == "epoch=1-step=12.ckpt"


def test_several_fits_in_one_script_run_in_the_same_processes(start: Starter) -> None:
    start.run("several_fits.py", str(start.folder))
    ranks = [json.loads((start.folder / f"several-{rank}.json").read_text()) for rank in (0, 1)]
    for rank, found in enumerate(ranks):
        assert found["world"] == [rank, 2]
        assert [found[f"after {n} fits"][0] for n in ("two", "three")] == [6, 12]
    same = {"after one fit", "after two fits", "after three fits", "validated"}
    assert {key: ranks[0][key] for key in same} == {key: ranks[1][key] for key in same}
    assert ranks[0]["metrics"]["val_loss"] == ranks[1]["metrics"]["val_loss"]
    assert ranks[0]["pid"] != ranks[1]["pid"]
    first, second = (ranks[0][f"after {n} fit{s}"][1] for n, s in (("one", ""), ("two", "s")))
    assert first != second


# Ranks together are one large process


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_two_ranks_equal_one_process_with_twice_the_batch(optimizer: str) -> None:
    """44 samples: the last step of an epoch is smaller, and ranks still share it evenly."""
    models, metrics = [], []
    for settings, batch in (({**QUIET, "devices": 1}, 8), (FORKED, 4)):
        seed_everything(2)
        model = Regression(optimizer, dropout=0.0)
        trainer = Trainer(**settings, max_epochs=3)
        trainer.fit(model, loader(44, batch), loader(15, batch, shuffle=False))
        models.append(model.state_dict())
        metrics.append(trainer.callback_metrics)
        assert trainer.global_step == 18
    for name, tensor in models[0].items():
        torch.testing.assert_close(models[1][name], tensor, msg=name)
    for name in ("loss_epoch", "size", "val_loss"):
        assert metrics[1][name] == pytest.approx(metrics[0][name], rel=1e-5), name
    assert metrics[0]["size"] == 44.0


def test_evaluation_on_two_ranks_sees_every_sample_once(tmp_path: Path) -> None:
    seed_everything(2)
    model = Regression("sgd")

    class Keeps(Callback):
        def on_predict_batch_end(
            self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            path = tmp_path / f"predicted-{trainer.world.rank}.jsonl"
            with path.open("a") as file:
                file.write(json.dumps(batch[2].tolist()) + "\n")

    class Predicts(Regression):
        def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.net(batch[0])

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("seen", float(len(batch[0])), reduce_fx="sum")

    alone = Trainer(**QUIET, devices=1).validate(model, loader(15, shuffle=False))
    trainer = Trainer(**FORKED, callbacks=[Keeps()])
    assert trainer.validate(model, loader(15, shuffle=False)) == pytest.approx(alone)
    model = Predicts("sgd")
    assert trainer.test(model, loader(15, shuffle=False)) == {"seen": 15.0}
    outputs = trainer.predict(model, loader(15, shuffle=False))
    drawn = [
        [number for line in path.read_text().splitlines() for number in json.loads(line)]
        for path in sorted(tmp_path.glob("predicted-*.jsonl"))
    ]
    assert sorted(drawn[0] + drawn[1]) == list(range(15))
    assert [len(output) for output in outputs] == [4, 4]  # those of rank 0


# Together


def test_early_stopping_stops_all_ranks_at_the_same_step(tmp_path: Path) -> None:
    """Each rank has another training loss; the decision is taken once."""
    seed_everything(2)
    trainer = Trainer(
        **FORKED,
        max_epochs=50,
        callbacks=[
            EarlyStopping("val_loss", patience=2, min_delta=0.2),
            Recorder(str(tmp_path)),
        ],
    )
    trainer.fit(Regression("sgd"), loader(), loader(16, shuffle=False))
    assert 0 < trainer.current_epoch < 50
    ends = [_rows(tmp_path, rank, "fit_end") for rank in (0, 1)]
    assert ends[0] == ends[1]
    assert ends[0][0]["step"] == trainer.global_step == 6 * trainer.current_epoch
    (stopper, *_) = trainer.callbacks
    assert stopper.stopped_epoch == trainer.current_epoch - 1


def test_a_module_whose_second_rank_asks_to_stop_stops_both(tmp_path: Path) -> None:
    """``should_stop`` is each rank's own; the callbacks that set it must agree, as these do."""

    class Stops(Callback):
        def on_train_batch_end(
            self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            trainer.should_stop = trainer.global_step == 3

    trainer = Trainer(**FORKED, max_epochs=5, callbacks=[Stops(), Recorder(str(tmp_path))])
    trainer.fit(Regression("sgd"), loader())
    assert [_rows(tmp_path, rank, "fit_end")[0]["step"] for rank in (0, 1)] == [3, 3]


COLLECTIVES = [
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "monitored_barrier",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "scatter_object_list",
    "send",
    "recv",
]


class CountsCollectives(Callback):
    """How many collectives there were between the first and the last batch of an epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.counts = dict.fromkeys(COLLECTIVES, 0)

    def on_train_start(self, trainer: Any, module: Any) -> None:
        for name in COLLECTIVES:
            setattr(dist, name, self._counted(name, getattr(dist, name)))

    def _counted(self, name: str, function: Any) -> Any:
        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.counts[name] += 1
            return function(*args, **kwargs)

        return counted

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.counts.update(dict.fromkeys(COLLECTIVES, 0))

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._write(trainer, "steps")

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self._write(trainer, "epoch")

    def _write(self, trainer: Any, when: str) -> None:
        path = self.folder / f"{when}-{trainer.world.rank}.json"
        path.write_text(json.dumps({key: n for key, n in self.counts.items() if n}))


class Talkative(Regression):
    """Logs, and wants step values reduced if asked."""

    sync: bool | None = None

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("one", loss, prog_bar=True, sync_dist=self.sync)
        self.log("two", loss * 2, prog_bar=True, sync_dist=self.sync)
        return loss


@pytest.mark.parametrize(
    ("sync", "expected"), [(None, {}), (True, {"all_reduce": 5})], ids=["default", "synced"]
)
def test_a_step_needs_no_collective_but_the_gradients(
    tmp_path: Path, sync: bool | None, expected: dict[str, int]
) -> None:
    """24 steps with six log points, the last of them after the last batch-end hook."""
    counter = CountsCollectives(tmp_path)
    model = Talkative("sgd")
    model.sync = sync
    trainer = Trainer(**FORKED, max_epochs=1, log_every_n_steps=4, callbacks=[counter])
    trainer.fit(model, loader(192))
    assert trainer.global_step == 24
    for rank in (0, 1):
        assert json.loads((tmp_path / f"steps-{rank}.json").read_text()) == expected
        at_the_end = json.loads((tmp_path / f"epoch-{rank}.json").read_text())
        # One for all values of the epoch together. Values that are synced per step take one more at
        # the sixth log point, and one for callbacks that look at the end of the epoch.
        assert at_the_end == {"all_reduce": 8 if sync else 1}


def test_ranks_that_differ_are_made_equal_at_the_start(tmp_path: Path) -> None:
    class Unlike(Regression):
        def setup(self, stage: str) -> None:
            with torch.no_grad():
                self.net[0].weight += self.trainer.world.rank

        def on_train_end(self) -> None:
            torch.save(self.state_dict(), tmp_path / f"{self.trainer.world.rank}.pt")

    Trainer(**FORKED, max_epochs=1).fit(Unlike("sgd"), loader())
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_an_object_strategy_takes_its_options_into_every_rank() -> None:
    """A loss that leaves out some parameters hangs or fails without the option."""
    from drivetrain_toolkit.strategies import DDPStrategy

    class Halves(Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(8, 1), nn.Linear(8, 1)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            side = self.left if batch_idx % 2 else self.right
            return side(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    strategy = DDPStrategy(find_unused_parameters=True)
    trainer = Trainer(**FORKED, strategy=strategy, max_epochs=1)
    trainer.fit(Halves(), loader())
    assert trainer.global_step == 6
    for name in ("ddp_find_unused_parameters_true",):
        trainer = Trainer(**FORKED, strategy=name, max_epochs=1)
        trainer.fit(Halves(), loader())
        assert trainer.global_step == 6


# An own loop


def _network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1))


def _own_loop(runtime: Any, folder: str, resume: bool) -> dict[str, Any]:
    """Three epochs, or the last of them after loading what the second had saved."""
    net = _network()
    step, (optimizer,) = runtime.setup(net, lambda parameters: torch.optim.Adam(parameters, 0.02))
    feed = runtime.loader(DataLoader(Samples(), 4 if runtime.world.size == 2 else 8, shuffle=True))
    path = f"{folder}/own.ckpt"
    first = runtime.load(path)["epoch"] + 1 if resume else 0
    for epoch in range(first, 3):
        for batch in feed.open(epoch):
            x, y, _ = runtime.feed(batch)
            loss = nn.functional.mse_loss(step(x), y)
            runtime.backward(loss)
            assert runtime.step(optimizer)
        if epoch == 1 and not resume:
            runtime.save(path, epoch=epoch)
    Path(folder, f"rank-{runtime.world.rank}").write_text(
        json.dumps([float(p.detach().sum()).hex() for p in net.parameters()])
    )
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def _runtime(ranks: int) -> Runtime:
    return Runtime(accelerator="cpu", devices=ranks, launcher="fork" if ranks > 1 else "auto")


def test_an_own_loop_runs_on_any_number_of_ranks_and_resumes(tmp_path: Path) -> None:
    found = {}
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        seed_everything(8)
        found[ranks] = _runtime(ranks).launch(_own_loop, str(folder), False)
        again = _runtime(ranks).launch(_own_loop, str(folder), True)
        for name, tensor in found[ranks].items():
            assert torch.equal(again[name], tensor), name
    texts = {(tmp_path / "2" / f"rank-{rank}").read_text() for rank in (0, 1)}
    assert len(texts) == 1, "the ranks are equal"
    for name, tensor in found[1].items():
        torch.testing.assert_close(found[2][name], tensor, msg=name)
    # What one rank saved goes on on two.
    moved = _runtime(2).launch(_own_loop, str(tmp_path / "1"), True)
    for name, tensor in found[1].items():
        torch.testing.assert_close(moved[name], tensor, msg=name)


def _whole_steps(runtime: Any) -> list[float]:
    def loss(net: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.mse_loss(net(batch[0]), batch[1])

    step, _ = runtime.train_step(
        _network(), [lambda parameters: torch.optim.SGD(parameters, 0.1)], loss, accumulate=2
    )
    feed = runtime.loader(DataLoader(Samples(), 4 if runtime.world.size == 2 else 8))
    batches = [runtime.feed(batch) for batch in feed.open(0)]
    with step:
        results = [step(batches[n : n + 2]) for n in range(0, len(batches), 2)]
    assert all(result.applied for result in results)
    collectives = runtime.stack.collectives
    mean = sum(collectives.all_gather(torch.stack([r.loss for r in results]))) / runtime.world.size
    return mean.tolist()


def test_an_own_loop_may_leave_the_whole_step_to_the_strategy() -> None:
    one, two = (_runtime(ranks).launch(_whole_steps) for ranks in (1, 2))
    assert len(one) == 3
    assert two == pytest.approx(one, rel=1e-5)
