"""The mode, which is read once."""

from __future__ import annotations

import os

import fake_gaudi

_mode: list[bool] = []


def _read_mode() -> None:
    if not _mode:
        usual = "1" if fake_gaudi.option("lazy", False) else "0"
        _mode.append(os.environ.get("PT_HPU_LAZY_MODE", usual) != "0")


def is_lazy() -> bool:
    return _mode[0]
