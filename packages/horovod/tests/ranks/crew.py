"""What two real processes over gloo do in tests: many cases in one group, since starting is slow.

``python crew.py RANK PORT CASES RESULTS`` is one of them. Each case is a function of ``cases.py``;
what it returns on rank 0 goes to the file.
"""

from __future__ import annotations

import os
import sys
import traceback

import torch
from drivetrain_interfaces import StrategyContext, World
from drivetrain_interfaces.discovery import load_backend


class Rank:
    """One process, with what strategies are bound with."""

    def __init__(self, rank: int, size: int, port: int) -> None:
        torch.set_num_threads(1)
        self.world = World(rank, size, rank, size, address="127.0.0.1", port=port)
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        os.environ.update(HOROVOD_STALL_CHECK_DISABLE="1")
        self.backend = load_backend("cpu").load()
        self.accelerator = self.backend.accelerator()
        self.accelerator.activate(rank, size)
        self.collectives = self.backend.collectives(self.world)

    def bind(self, strategy, precision="32-true", **options):
        """A strategy bound to this process."""
        if isinstance(precision, str):
            precision = self.backend.precision(precision)
        return strategy(
            StrategyContext(
                accelerator=self.accelerator,
                device_index=0,
                world=self.world,
                collectives=self.collectives,
                precision=precision,
                options=options,
            )
        )


def answer(mine: Rank, name: str):
    """What a case answers; a rank that fails ends at once, so that the other does not wait."""
    import cases

    try:
        return getattr(cases, name)(mine)
    except BaseException:  # noqa: BLE001 - it is printed, and this process ends
        print(f"rank {mine.world.rank}: {name}\n{traceback.format_exc()}", flush=True)
        os._exit(1)


def main() -> None:
    """Run the named cases and write what rank 0 answers."""
    rank, port, names, results = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    sys.path.insert(0, os.path.dirname(__file__))
    mine = Rank(rank, 2, port)
    answers = {name: answer(mine, name) for name in names.split(",")}
    if rank == 0:
        torch.save(answers, results)
    mine.collectives.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
