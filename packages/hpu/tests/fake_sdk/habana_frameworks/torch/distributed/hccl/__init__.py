"""Which module a process is to open, by its rank."""

from __future__ import annotations

import os


def initialize_distributed_hpu(world_size=None, rank=None, local_rank=None):
    ours = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
    if None not in (world_size, rank, local_rank):
        given = dict(zip(ours, (world_size, rank, local_rank), strict=True))
        os.environ.update({name: str(value) for name, value in given.items()})
    elif not all(name in os.environ for name in ours):
        theirs = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
        if all(name in os.environ for name in theirs):
            for name, source in zip(ours, theirs, strict=True):
                os.environ[name] = os.environ[source]
        os.environ.setdefault("MASTER_ADDR", "localhost")
        os.environ.setdefault("MASTER_PORT", "12345")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "-1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "-1"))
    if "HLS_MODULE_ID" not in os.environ and local_rank != -1 and world_size != 1:
        named = os.environ.get("HABANA_VISIBLE_MODULES", "")
        if named:
            modules = named.split(",")
            assert local_rank < len(modules), "not enough modules in HABANA_VISIBLE_MODULES"
            os.environ["HLS_MODULE_ID"] = modules[local_rank]
        else:
            os.environ["HLS_MODULE_ID"] = str(local_rank)
    if rank != -1:
        os.environ["ID"] = str(rank)
    return world_size, rank, local_rank
