"""Resumed inside an epoch on every kind of loader: the same batches, augmented in the same way."""

from __future__ import annotations

import json
import random
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from drivetrain import Callback, Trainer, seed_everything
from drivetrain.callbacks.base import Moment
from drivetrain_interfaces import CheckpointError
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, get_worker_info
from training_parts import Recorder, Regression

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SIZE, BATCH = 26, 4


def _augmented(index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A sample that depends on every generator of the host."""
    noise = torch.rand(8) + random.random() + float(np.random.rand())
    return torch.linspace(0, 1, 8) * index / SIZE + noise, torch.tensor([index / SIZE]), index


class Augmenting(Dataset[Any]):
    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        return _augmented(index)


class InBatches(Augmenting):
    """Reads a batch at once."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        assert type(indices) is list
        return [_augmented(index) for index in indices]


class Shuffling(BatchSampler):
    """A batch sampler that shuffles by the global generators, some of it while it goes."""

    def __init__(self) -> None:
        super().__init__(range(SIZE), BATCH, drop_last=False)

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(SIZE).tolist()
        random.shuffle(order)
        while order:
            drawn = [order.pop(random.randrange(len(order))) for _ in range(min(BATCH, len(order)))]
            yield drawn


def _share(size: int) -> list[int]:
    """The samples of this worker; unevenly, so that workers end at different times."""
    info = get_worker_info()
    if info is None:
        return list(range(size))
    cut = size * 2 // 3
    return list(range(cut)) if info.id == 0 else list(range(cut, size))


class Stream(IterableDataset[Any]):
    """Shuffles and augments by the global generators, and keeps no position."""

    def __iter__(self) -> Iterator[Any]:
        mine = _share(SIZE)
        random.shuffle(mine)
        for index in mine:
            yield _augmented(index)


class KeptStream(IterableDataset[Any]):
    """Keeps its position, and an order of its own."""

    def __init__(self) -> None:
        self.order: list[int] = []
        self.at = 0

    def __iter__(self) -> Iterator[Any]:
        if not self.order:
            self.order = _share(SIZE)
            random.shuffle(self.order)
        while self.at < len(self.order):
            self.at += 1
            yield _augmented(self.order[self.at - 1])
        self.order, self.at = [], 0  # not before: a state at the last sample is not a new epoch

    def state_dict(self) -> dict[str, Any]:
        return {"order": list(self.order), "at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order, self.at = list(state["order"]), state["at"]


class Shuffled:
    """Any iterable of batches: shuffles by the global generator when an epoch begins."""

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(SIZE).tolist()
        for begin in range(0, SIZE, BATCH):
            indices = torch.tensor(order[begin : begin + BATCH])
            x = indices.float()[:, None].expand(-1, 8) / SIZE
            yield x + random.random(), x[:, :1], indices


def _torchdata(dataset: Any, **more: Any) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(dataset, BATCH, **more)


workers = {"num_workers": 2}
kept_workers = {"num_workers": 2, "persistent_workers": True}
LOADERS: dict[str, Callable[[], Any]] = {
    "map": lambda: DataLoader(Augmenting(), BATCH, shuffle=True),
    "map, workers": lambda: DataLoader(Augmenting(), BATCH, shuffle=True, **workers),
    "map, persistent workers": lambda: DataLoader(
        Augmenting(), BATCH, shuffle=True, **kept_workers
    ),
    "map in batches, workers": lambda: DataLoader(InBatches(), BATCH, shuffle=True, **workers),
    "own batches": lambda: DataLoader(Augmenting(), batch_sampler=Shuffling()),
    "own batches, workers": lambda: DataLoader(Augmenting(), batch_sampler=Shuffling(), **workers),
    "stream": lambda: DataLoader(Stream(), BATCH),
    "stream, workers": lambda: DataLoader(Stream(), BATCH, **workers),
    "kept stream": lambda: DataLoader(KeptStream(), BATCH),
    "kept stream, workers": lambda: DataLoader(KeptStream(), BATCH, **workers),
    "kept stream, persistent workers": lambda: DataLoader(KeptStream(), BATCH, **kept_workers),
    "any iterable": Shuffled,
    "torchdata": lambda: _torchdata(Augmenting(), shuffle=True),
    "torchdata, stream": lambda: _torchdata(KeptStream()),
}


class SaveAlways(Callback):
    """Saves at every opportunity.

    Attributes:
        saved: Path by epoch, batch and moment, and how many events had happened.
    """

    saves_checkpoints = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved: dict[tuple[int, int, Moment], tuple[Path, int]] = {}

    def on_save_opportunity(self, trainer: Any, module: Any, moment: Moment) -> None:
        place = trainer.current_epoch, trainer.batch_idx, moment
        path = self.folder / f"{place[0]}-{place[1]}-{moment.value}.ckpt"
        trainer.save_checkpoint(path)
        self.saved[place] = path, len(_events(self.folder))


def _events(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "events-0.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _run(folder: Path, loader: Any, resume: Path | None = None) -> SaveAlways:
    folder.mkdir()
    seed_everything(5 if resume is None else 99)
    saver = SaveAlways(folder)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        callbacks=[saver, Recorder(str(folder))],
    )
    trainer.fit(Regression(), loader, ckpt_path=resume)
    return saver


# Said by torchdata 0.11 on torch 2.13.
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("kind", LOADERS)
def test_what_is_left_of_an_epoch_is_the_same_after_a_resume(tmp_path: Path, kind: str) -> None:
    """Also after a second resume, at the last batch of an epoch, and between two epochs."""
    whole = _run(tmp_path / "whole", LOADERS[kind]())
    expected = _events(tmp_path / "whole")
    batches = [event["samples"] for event in expected if event["event"] == "batch"]
    length = len(batches) // 2
    for epoch in (batches[:length], batches[length:]):
        assert sorted(index for batch in epoch for index in batch) == list(range(SIZE))

    def resumed(name: str, saver: SaveAlways, at: tuple[int, int, Moment], done: int) -> SaveAlways:
        path, _ = saver.saved[at]
        again = _run(tmp_path / name, LOADERS[kind](), path)
        assert _events(tmp_path / name)[1:] == expected[done:]
        return again

    def events_at(*at: Any) -> int:
        return whole.saved[at][1]

    step = Moment.STEP
    first = resumed("once", whole, (0, 2, step), events_at(0, 2, step))
    resumed("twice", first, (0, 5, step), events_at(0, 5, step))
    resumed("end", whole, (0, length, step), events_at(0, length, step))
    resumed("between", whole, (1, 0, Moment.EPOCH), events_at(1, 0, Moment.EPOCH))


def test_the_number_of_workers_of_a_map_style_data_set_does_not_matter(tmp_path: Path) -> None:
    loader = partial(DataLoader, Augmenting(), BATCH, shuffle=True)
    whole = _run(tmp_path / "whole", loader(num_workers=1))
    path, done = whole.saved[0, 3, Moment.STEP]
    _run(tmp_path / "rest", loader(num_workers=2), path)
    assert _events(tmp_path / "rest")[1:] == _events(tmp_path / "whole")[done:]


def test_another_number_of_workers_of_a_kept_stream_is_refused(tmp_path: Path) -> None:
    whole = _run(tmp_path / "whole", DataLoader(KeptStream(), BATCH, num_workers=1))
    path, _ = whole.saved[0, 3, Moment.STEP]
    with pytest.raises(CheckpointError, match="num_workers=1, and this loader has num_workers=0"):
        _run(tmp_path / "rest", DataLoader(KeptStream(), BATCH), path)


class Wishes(KeptStream):
    """Is changed by the user's code in a worker, as torch's own documentation does."""

    wish = 0


def _wish(worker: int) -> None:
    info = get_worker_info()
    assert info is not None
    assert type(info.dataset) is Wishes
    info.dataset.wish = worker + 1


def test_code_in_a_worker_meets_the_user_s_own_data_set(tmp_path: Path) -> None:
    loader = DataLoader(Wishes(), BATCH, num_workers=1, worker_init_fn=_wish)
    whole = _run(tmp_path / "whole", loader)
    path, done = whole.saved[0, 3, Moment.STEP]
    _run(tmp_path / "rest", loader, path)
    assert _events(tmp_path / "rest")[1:] == _events(tmp_path / "whole")[done:]
    assert type(loader.dataset) is Wishes
