"""The data loader: combined batches, of this process's share."""

import torch

from poptorch.enums import DataLoaderMode
from poptorch.errors import Error
from poptorch.options import checked


class DataLoader(torch.utils.data.DataLoader):
    """Yields what one call of an executor takes."""

    def __init__(
        self,
        options,
        dataset,
        batch_size=1,
        shuffle=None,
        num_workers=0,
        drop_last=True,
        persistent_workers=None,
        auto_distributed_partitioning=True,
        mode=DataLoaderMode.Sync,
        async_options=None,
        rebatched_worker_size=None,
        batch_sampler=None,
        **kwargs,
    ):
        options = checked(options)
        self._options = options
        factor = options.device_iterations * options.Training.gradient_accumulation
        factor *= options.replication_factor // options.input_group_size
        self._combined = None if batch_size is None else batch_size * factor
        iterable = isinstance(dataset, torch.utils.data.IterableDataset)
        processes = options.Distributed.numProcesses
        if processes > 1 and auto_distributed_partitioning:
            if iterable:
                raise Error("An IterableDataset is not partitioned between processes")
            if batch_sampler is not None:
                raise Error("batch_sampler excludes automatic partitioning")
            if shuffle and not options.exists("random_seed"):
                raise Error("Shuffling over processes needs randomSeed")
            share = len(dataset) // processes
            start = share * options.Distributed.processId
            1 // (share // (self._combined or 1))  # as PopTorch, which divides by zero
            dataset = torch.utils.data.Subset(dataset, range(start, start + share))
        if batch_sampler is not None:
            super().__init__(
                dataset, batch_sampler=batch_sampler, num_workers=num_workers, **kwargs
            )
            return
        super().__init__(
            dataset,
            batch_size=self._combined,
            shuffle=None if iterable else shuffle,
            num_workers=num_workers,
            drop_last=drop_last,
            persistent_workers=bool(persistent_workers),
            **kwargs,
        )

    @property
    def combinedBatchSize(self):
        return self._combined

    @property
    def options(self):
        return self._options

    def terminate(self):
        pass

    def __len__(self):
        return super().__len__()

    def __iter__(self):
        return super().__iter__()
