"""Checkpoints in DeepSpeed's own format: written, read without an engine, and made universal.

The files are pickles, so that reading one runs what is in it. Nothing here reads one that its
caller did not declare to be trusted.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import CheckpointError, NotFoundError

from drivetrain_deepspeed.engine import import_deepspeed

if TYPE_CHECKING:
    import os

    from torch import Tensor

_DIVIDED = 3
_UNIVERSAL = "_universal"


@dataclass(frozen=True, slots=True)
class Native:
    """A checkpoint of DeepSpeed's, as its file names tell.

    Attributes:
        folder: What was given to ``save_checkpoint``.
        tag: The folder inside it.
        stages: The ZeRO stages that may have written it.
        ranks: How many ranks wrote it; 0 at stage 0, where one has it all.
        universal: Whether it was made universal.
    """

    folder: Path
    tag: str
    stages: frozenset[int]
    ranks: int
    universal: bool

    @property
    def path(self) -> Path:
        """Where its files are."""
        return self.folder / self.tag


def find(folder: str | os.PathLike[str], tag: str | None = None) -> Native:
    """What is in a folder, without reading any pickle.

    Args:
        folder: What was given to ``save_checkpoint``.
        tag: The folder inside it; None takes what the file ``latest`` says.

    Raises:
        NotFoundError: There is no such checkpoint.
    """
    root = Path(folder)
    latest = root / "latest"
    if tag is None and latest.is_file():
        tag = latest.read_text(encoding="utf-8").strip()
    if tag is None or not (root / tag).is_dir():
        raise NotFoundError(
            f"A checkpoint in DeepSpeed's own format was asked for in {str(root)!r}, tag {tag!r}, "
            "and there is none.",
            "Give the folder that save_checkpoint was given, and a tag if it has no file 'latest'.",
        )
    path = root / tag
    if (path / "zero").is_dir():
        return Native(root, tag, frozenset({1, 2, 3}), 0, universal=True)
    ranks = len(list(path.glob("*zero_pp_rank_*_optim_states.pt")))
    if any(path.glob("*zero_pp_rank_*_model_states.pt")):
        stages = frozenset({_DIVIDED})
    else:
        stages = frozenset({1, 2}) if ranks else frozenset({0})
    return Native(root, tag, stages, ranks, universal=False)


def read_native(
    folder: str | os.PathLike[str], tag: str | None = None, *, trusted: bool = False
) -> dict[str, Tensor]:
    """The whole float32 weights of a checkpoint in DeepSpeed's own format, by parameter name.

    Needs no process but this one, whatever the number of ranks that wrote it.

    Args:
        folder: What was given to ``save_checkpoint``.
        tag: The folder inside it; None takes what the file ``latest`` says.
        trusted: That the files come from somebody who may run code here: they are pickles.

    Raises:
        NotFoundError: There is no such checkpoint.
        CheckpointError: It was not declared to be trusted, is universal, or cannot be read.
    """
    found = find(folder, tag)
    check_trusted(found.path, trusted=trusted)
    import torch

    import_deepspeed_for_files()
    if found.stages == frozenset({0}):
        with _named(found.path):
            states = torch.load(
                found.path / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False
            )
            return {name: value.float() for name, value in states["module"].items()}
    if found.universal:  # its files have no shapes
        raise CheckpointError(
            f"The whole weights of {str(found.path)!r} were to be read, which is universal.",
            "Read the checkpoint that it was made from.",
        )
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with _named(found.path), _quietly():
        made: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(
            str(found.folder), found.tag
        )
    return dict(made)


def make_universal(
    folder: str | os.PathLike[str], tag: str | None = None, *, trusted: bool = False
) -> str:
    """Make a universal checkpoint beside one of stage 1, 2 or 3; returns its tag.

    Any of these stages loads it, with ``DeepSpeedStrategy(config={"checkpoint": {"load_universal":
    True}})`` and ``load_native``. One process does this.

    Args:
        folder: What was given to ``save_checkpoint``.
        tag: The folder inside it; None takes what the file ``latest`` says.
        trusted: That the files come from somebody who may run code here: they are pickles.

    Raises:
        NotFoundError: There is no such checkpoint.
        CheckpointError: It was not declared to be trusted, is of stage 0, or cannot be read.
    """
    found = find(folder, tag)
    check_trusted(found.path, trusted=trusted)
    if found.universal or not found.ranks:
        what = "is universal already" if found.universal else "was saved at stage 0"
        raise CheckpointError(
            f"{str(found.path)!r} was to be made universal, and it {what}.",
            "Give a checkpoint of stage 1, 2 or 3.",
        )
    import_deepspeed_for_files()
    from deepspeed.checkpoint.ds_to_universal import main

    output = found.folder / f"{found.tag}{_UNIVERSAL}"
    settings = SimpleNamespace(
        input_folder=str(found.path),
        output_folder=str(output),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=_DIVIDED not in found.stages,  # which engines of 1 and 2 leave out
    )
    with _named(found.path), _quietly():
        main(settings)
    return output.name


def mend_universal(optimizer: Any, found: Native) -> None:
    """Give parameter groups their own settings, and flat tensors their own counts of updates.

    DeepSpeed gives all groups the settings of the first, and all flat tensors of stage 3 one count
    together, which then grows once for each of them in an update.

    Args:
        optimizer: The user's, inside the engine.
        found: What was loaded; universal.
    """
    import torch

    path = found.path / "zero" / "optimizer_state.pt"
    if path.is_file():
        states = torch.load(path, map_location="cpu", weights_only=False)
        groups = states.get("optimizer_state_dict", {}).get("param_groups", [])
        if len(groups) == len(optimizer.param_groups):
            for mine, saved in zip(optimizer.param_groups, groups, strict=True):
                mine.update({key: value for key, value in saved.items() if key != "params"})
    for entry in optimizer.state.values():
        if isinstance(entry.get("step"), torch.Tensor):
            entry["step"] = entry["step"].clone()


def check_trusted(path: Path, *, trusted: bool) -> None:
    """Stop before a pickle is read that nobody vouched for.

    Raises:
        CheckpointError: It was not declared to be trusted.
    """
    if not trusted:
        raise CheckpointError(
            f"{str(path)!r} is in DeepSpeed's own format, whose files are pickles that run code "
            "when they are read.",
            "If you trust who wrote it, say trusted=True.",
        )


def check_fits(found: Native, stage: int, world_size: int, *, universal: bool) -> None:
    """Refuse what DeepSpeed would load wrongly, or fail at without a reason.

    Raises:
        CheckpointError: It is of another ZeRO stage or number of ranks, or universal or not.
    """
    text = ""
    if found.universal != universal:
        kinds = {True: "universal", False: "not universal"}
        text = f"is {kinds[found.universal]}, and the configuration's is {kinds[universal]}"
    elif stage not in found.stages:
        stages = " or ".join(map(str, sorted(found.stages)))
        text = f"was saved at stage {stages}, and this run is at stage {stage}"
    elif found.ranks and found.ranks != world_size:
        text = f"was saved by {found.ranks} ranks, and this run has {world_size}"
    if text:
        raise CheckpointError(
            f"{str(found.path)!r} is in DeepSpeed's own format and {text}.",
            "Make it universal with make_universal, and set checkpoint.load_universal in config, "
            "or load its weights with read_native; checkpoints of the trainer fit any stage.",
        )


def import_deepspeed_for_files() -> None:
    """DeepSpeed, for what needs no engine; set up for whatever it was set up for before."""
    import os

    import_deepspeed(os.environ.get("DS_ACCELERATOR", "cpu"))


@contextlib.contextmanager
def _named(path: Path) -> Any:
    """Say which checkpoint could not be read."""
    try:
        yield
    except (OSError, ValueError, AssertionError, KeyError, EOFError, RuntimeError) as error:
        raise CheckpointError(
            f"{str(path)!r} could not be read as a checkpoint of DeepSpeed's: "
            f"{type(error).__name__}: {error}.",
            "Use another one, or one that the trainer saved.",
        ) from error


@contextlib.contextmanager
def _quietly() -> Any:
    """Without DeepSpeed's progress on standard output."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
