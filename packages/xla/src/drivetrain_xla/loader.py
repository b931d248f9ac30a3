"""Batches that are on their way to the device while the one before is being trained on."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

#: What the thread puts last; seconds after which it looks whether anybody still wants batches.
_END = object()
_PATIENCE_S = 0.1


class PrefetchLoader:
    """Reads a loader ahead in a thread and feeds its batches to the device.

    Unlike the loaders of torch_xla it loses no exception: what the loader raises is raised where
    the batch would have come. The thread ends when the iterator does, or is closed, or is dropped.

    Args:
        loader: Any iterable of batches that can be read once per epoch.
        feed: Puts a batch on the device, such as ``strategy.feed``.
        ahead: Batches that may wait on the device.

    Raises:
        ConfigurationError: ``ahead`` is not positive.
    """

    def __init__(
        self, loader: Iterable[Any], feed: Callable[[Any], Any], *, ahead: int = 2
    ) -> None:
        if ahead < 1:
            raise ConfigurationError(
                f"PrefetchLoader(ahead={ahead!r}) was asked for.", "Give 1 or more."
            )
        self._loader = loader
        self._feed = feed
        self._ahead = ahead

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]  # its own TypeError says what is missing

    def __iter__(self) -> Iterator[Any]:
        batches: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(self._ahead)
        done = threading.Event()
        thread = threading.Thread(
            target=_read, args=(self._loader, self._feed, batches, done), daemon=True
        )
        thread.start()
        try:
            while True:
                batch, error = batches.get()
                if error is not None:
                    raise error
                if batch is _END:
                    return
                yield batch
        finally:
            done.set()
            thread.join()


def _read(
    loader: Iterable[Any],
    feed: Callable[[Any], Any],
    batches: queue.Queue[tuple[Any, BaseException | None]],
    done: threading.Event,
) -> None:
    last: tuple[Any, BaseException | None] = (_END, None)
    try:
        for batch in loader:
            if not _put(batches, (feed(batch), None), done):
                return
    except BaseException as error:  # noqa: BLE001 - raised where the batch would have come
        last = (_END, error)
    _put(batches, last, done)


def _put(batches: queue.Queue[Any], item: Any, done: threading.Event) -> bool:
    """Whether the item was put before nobody wanted it any more."""
    while not done.is_set():
        try:
            batches.put(item, timeout=_PATIENCE_S)
        except queue.Full:
            continue
        return True
    return False
