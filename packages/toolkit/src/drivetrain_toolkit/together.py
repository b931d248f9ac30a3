"""One checkpoint that several processes write, each its own file.

They meet in the draft, by notes that appear there as a whole:

``plan-R``    what process R has: names and sizes of its tensors and shards, and its tree
``part-R``    what it has written, durably
``failed-R``  why it cannot
``left-R``    that it has seen a failure, and touches the draft no more

From the same plans every process reads the same division of work: whatever several of them hold is
written by the one that has least to write so far. Process 0 begins the draft and publishes it.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from drivetrain_interfaces.errors import CheckpointError

from drivetrain_toolkit import durable
from drivetrain_toolkit.codecs import TAG, dtype_name
from drivetrain_toolkit.manifest import STATE, ShardEntry, TensorFacts, tiling_problem, volume
from drivetrain_toolkit.reading import parse_manifest
from drivetrain_toolkit.tensorfile import write_tensors
from drivetrain_toolkit.writing import manifest_for, manifest_text, state_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from drivetrain_interfaces.checkpoint import SaveGroup

    from drivetrain_toolkit.stores import Draft, Store
    from drivetrain_toolkit.writing import Origin, Staged

_SHORTEST_NAP: Final = 0.0005
_LONGEST_NAP: Final = 0.05
_FAREWELL: Final = 10.0  # seconds that process 0 waits for the others before it tidies up


@dataclass(frozen=True, slots=True, order=True)
class _Piece:
    """A tensor, or a box of one, that some process could write."""

    name: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    whole: tuple[int, ...]
    dtype: str
    size: int


class JointSave:
    """This process's part in a save by several.

    Args:
        store: Where to.
        path: The checkpoint.
        group: Who saves.
        origin: For the manifest.
    """

    def __init__(self, store: Store, path: str, group: SaveGroup, origin: Origin) -> None:
        self._store = store
        self._path = path
        self._group = group
        self._origin = origin
        self._neighbours: dict[int, int] = {}  # pids of processes of this machine, by rank

    def run(self, staged: Staged) -> None:
        """Write this process's part; return once the checkpoint is published.

        Raises:
            CheckpointError: Another process failed or is missing, or shards do not fit together.
            StorageError: A file cannot be written.
        """
        draft = self._meet()
        try:
            self._work(draft, staged)
        except BaseException as error:
            self._give_up(draft, error)
            raise

    def fail(self, error: BaseException) -> None:
        """Tell the others that this process has nothing to write."""
        self._give_up(self._meet(), error)

    def _work(self, draft: Draft, staged: Staged) -> None:
        mine = _pieces(staged)
        draft.tell(self._own("plan"), _plan_text(mine, staged.state))
        plans = [json.loads(note) for note in self._all(draft, "plan")]
        tasks = _divided([_planned(plan) for plan in plans])[self._group.rank]
        file = draft.name(f"tensors-{self._group.rank:05d}.safetensors")
        tensors = _keyed(tasks)
        part: dict[str, Any] = {
            "file": None,
            "pieces": {key: _piece_body(piece) for key, piece in tensors.items()},
        }
        if tensors:
            size, digest = draft.write(
                file,
                lambda write: write_tensors({k: mine[p] for k, p in tensors.items()}, write),
                sum(piece.size for piece in tasks),
            )
            part["file"] = [file, size, digest]
        draft.tell(self._own("part"), json.dumps(part).encode("ascii"))
        if self._group.rank:
            self._await_publication(draft)
        else:
            parts = [json.loads(note) for note in self._all(draft, "part")]
            self._publish(draft, parts, merged([plan["state"] for plan in plans]))

    def _publish(self, draft: Draft, parts: Sequence[Mapping[str, Any]], state: Any) -> None:
        files = {part["file"][0]: tuple(part["file"][1:]) for part in parts if part["file"]}
        name, text = draft.name(STATE), state_text(state, sum(size for size, _ in files.values()))
        files[name] = draft.write(name, lambda write: write(text))
        manifest = manifest_for(self._origin, files, _facts(parts), name)
        draft.publish(manifest_text(manifest))

    def _meet(self) -> Draft:
        if self._group.rank == 0:
            return self._store.begin(self._path, self._group.token)
        found: list[Draft] = []

        def look() -> bool:
            draft = self._store.join(self._path, self._group.token)
            found.extend([draft] if draft is not None else [])
            return bool(found)

        self._until(look, lambda: None, "process 0 to begin")
        return found[0]

    def _all(self, draft: Draft, kind: str) -> list[bytes]:
        names = [f"{kind}-{rank}" for rank in range(self._group.size)]
        found: dict[str, bytes] = {}

        def complete() -> bool:
            for name in sorted(self._notes(draft).keys() & (set(names) - found.keys())):
                found[name] = draft.note(name)
                self._note_neighbour(name, found[name])
            return len(found) == len(names)

        def missing() -> str:
            there = draft.notes()
            return ", ".join(str(r) for r, name in enumerate(names) if name not in there)

        self._until(complete, draft.notes, f"the {kind}s of processes", missing, draft.longest_nap)
        return [found[name] for name in names]

    def _note_neighbour(self, name: str, note: bytes) -> None:
        """Of a process of this machine it can be seen whether it still runs."""
        machine, pid = json.loads(note).get("process", ("", 0))
        if machine and machine == durable.machine():
            self._neighbours[int(name.rpartition("-")[2])] = pid

    def _await_publication(self, draft: Draft) -> None:
        self._until(
            lambda: not self._notes(draft, gone=True),
            draft.notes,
            "process 0 to publish",
            longest_nap=draft.longest_nap,
        )
        if self._published_id() != self._group.token:
            raise CheckpointError(
                f"The checkpoint {self._path!r} was to be saved by {self._group.size} processes, "
                "and process 0 gave up.",
                "See the error of process 0.",
            )

    def _published_id(self) -> str:
        try:
            source = self._store.open(self._path)
        except CheckpointError:
            return ""
        try:
            return parse_manifest(source).id
        finally:
            source.close()

    def _notes(self, draft: Draft, *, gone: bool = False) -> Mapping[str, int]:
        """What is there; raises if another process has said that it failed."""
        notes = draft.notes()
        failed = sorted(name for name in notes if name.startswith("failed-"))
        if failed:
            raise CheckpointError(
                f"The checkpoint {self._path!r} was to be saved by {self._group.size} processes, "
                f"and process {failed[0].partition('-')[2]} could not write its part: "
                f"{draft.note(failed[0]).decode()}",
                "See the error of that process.",
            )
        if not notes and not gone:
            raise CheckpointError(
                f"The checkpoint {self._path!r} was to be saved by {self._group.size} processes, "
                "and its draft was deleted meanwhile.",
                "See the error of process 0, and let nobody else save to that path.",
            )
        return notes

    def _until(
        self,
        reached: Callable[[], bool],
        progress: Callable[[], Any],
        what: str,
        missing: Callable[[], str] = lambda: "",
        longest_nap: float = _LONGEST_NAP,
    ) -> None:
        nap = _SHORTEST_NAP
        seen, since = progress(), time.monotonic()
        while not reached():
            # What ended between the two looks may have done its part before.
            if (over := self._over()) is not None and not reached():
                raise over
            time.sleep(nap)
            nap = min(2 * nap, longest_nap)
            if (now := progress()) != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > self._group.timeout:
                raise CheckpointError(
                    f"The checkpoint {self._path!r} was to be saved by {self._group.size} "
                    f"processes, and process {self._group.rank} waited {self._group.timeout:g} s "
                    f"for {' '.join((what, missing())).strip()}.",
                    "Make sure that all processes save, and that they see the same directory.",
                )

    def _over(self) -> Exception | None:
        """Why what is waited for will never come, if that is known."""
        if self._group.check is not None:
            try:
                self._group.check()
            except Exception as error:  # noqa: BLE001 - raised by who asked
                return error
        for rank, pid in self._neighbours.items():
            if not durable.runs(pid):
                return CheckpointError(
                    f"The checkpoint {self._path!r} was to be saved by {self._group.size} "
                    f"processes, and process {rank} (pid {pid}) has ended before it was done.",
                    "See how that process ended.",
                )
        return None

    def _give_up(self, draft: Draft, error: BaseException) -> None:
        """Say why, unless somebody else's failure is the reason; process 0 tidies up."""
        try:
            if not any(name.startswith("failed-") for name in draft.notes()):
                draft.tell(self._own("failed"), str(error).encode("utf-8", "replace"))
            draft.tell(self._own("left"), b"")
        except OSError:
            pass  # the directory is gone or full; the error that led here is the one to show
        if self._group.rank == 0:
            self._see_off(draft)

    def _see_off(self, draft: Draft) -> None:
        ends = time.monotonic() + min(_FAREWELL, self._group.timeout)
        names = {f"left-{rank}": rank for rank in range(1, self._group.size)}

        def expected() -> set[str]:
            gone = {rank for rank, pid in self._neighbours.items() if not durable.runs(pid)}
            return {name for name, rank in names.items() if rank not in gone}

        while not expected() <= draft.notes().keys() and time.monotonic() < ends:
            time.sleep(_LONGEST_NAP)
        draft.abandon()

    def _own(self, kind: str) -> str:
        return f"{kind}-{self._group.rank}"


def merged(states: Sequence[Any]) -> Any:
    """Trees of several processes laid over each other; the first counts where they disagree."""
    first = states[0]
    plain = [each for each in states if isinstance(each, dict) and TAG not in each]
    if isinstance(first, dict) and TAG not in first:
        keys = dict.fromkeys(key for each in plain for key in each)
        return {key: merged([each[key] for each in plain if key in each]) for key in keys}
    if isinstance(first, list):
        alike = [each for each in states if isinstance(each, list) and len(each) == len(first)]
        return [merged(items) for items in zip(*alike, strict=True)]
    return first


def _pieces(staged: Staged) -> dict[_Piece, torch.Tensor]:
    """What this process could write. Parts without items are left to who has some."""
    found = {}
    for name, tensor in staged.shelf.tensors.items():
        shape = tuple(tensor.shape)
        found[_piece(name, (0,) * len(shape), shape, tensor)] = tensor
    for name, shard in staged.shelf.shards.items():
        whole, data, start = tuple(shard.shape), shard.data, tuple(shard.start)
        if not volume(whole):
            data, start = data.new_empty(whole), (0,) * len(whole)
        if data.numel() or not volume(whole):
            found[_piece(name, start, whole, data)] = data
    return found


def _piece(
    name: str, start: tuple[int, ...], whole: tuple[int, ...], tensor: torch.Tensor
) -> _Piece:
    size = tensor.numel() * tensor.element_size()
    return _Piece(name, start, tuple(tensor.shape), whole, dtype_name(tensor.dtype), size)


def _piece_body(piece: _Piece) -> list[Any]:
    return [piece.name, piece.start, piece.shape, piece.whole, piece.dtype, piece.size]


def _keyed(pieces: Sequence[_Piece]) -> dict[str, _Piece]:
    """What a file calls each piece: its name, if it is whole."""
    found: dict[str, _Piece] = {}
    for piece in sorted(pieces, key=lambda each: each.shape != each.whole):
        key = piece.name
        if piece.shape != piece.whole:
            key += f"@{','.join(map(str, piece.start))}"
        while key in found:
            key += "'"
        found[key] = piece
    return found


def _plan_text(pieces: Mapping[_Piece, Any], state: Any) -> bytes:
    body = {
        "pieces": [_piece_body(piece) for piece in pieces],
        "state": state,
        "process": (durable.machine(), os.getpid()),
    }
    return json.dumps(body).encode("ascii")


def _planned(body: Mapping[str, Any]) -> list[_Piece]:
    return [_from_body(each) for each in body["pieces"]]


def _from_body(body: Sequence[Any]) -> _Piece:
    name, start, shape, whole, dtype, size = body
    return _Piece(name, tuple(start), tuple(shape), tuple(whole), dtype, size)


def _divided(plans: Sequence[Sequence[_Piece]]) -> list[list[_Piece]]:
    """What each process writes: every piece once, the large ones first, so that loads even out."""
    owners: dict[_Piece, list[int]] = {}
    for rank, pieces in enumerate(plans):
        for piece in pieces:
            owners.setdefault(piece, []).append(rank)
    loads = [0] * len(plans)
    tasks: list[list[_Piece]] = [[] for _ in plans]
    for piece in sorted(owners, key=lambda each: (-each.size, each)):
        rank = min(owners[piece], key=lambda each: (loads[each], each))
        loads[rank] += piece.size
        tasks[rank].append(piece)
    return tasks


def _facts(parts: Sequence[Mapping[str, Any]]) -> dict[str, TensorFacts]:
    """What the manifest says of each tensor. Raises if its shards do not make it up."""
    by_name: dict[str, list[tuple[_Piece, str, str]]] = {}
    for part in parts:
        for key, body in part["pieces"].items():
            piece = _from_body(body)
            by_name.setdefault(piece.name, []).append((piece, part["file"][0], key))
    facts = {}
    for name, found in by_name.items():
        kinds = {(piece.dtype, piece.whole) for piece, *_ in found}
        dtype, shape = min(kinds)
        shards = tuple(
            ShardEntry(file, key, piece.start, piece.shape)
            for piece, file, key in sorted(found, key=lambda each: each[0].start)
        )
        problem = tiling_problem(shape, [(shard.start, shard.shape) for shard in shards])
        if len(kinds) > 1:
            problem = "processes hold " + " and ".join(
                f"{d} of shape {s}" for d, s in sorted(kinds)
            )
        if problem:
            raise CheckpointError(
                f"A checkpoint was to hold {name!r}, which several processes have: {problem}.",
                "Correct the shards that the strategy gives.",
            )
        facts[name] = TensorFacts(dtype, shape, shards)
    return facts
