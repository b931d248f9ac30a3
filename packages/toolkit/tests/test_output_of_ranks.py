"""What ranks print comes back in whole lines, whoever prints beside whom."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING

import pytest

from drivetrain_toolkit.launchers.fresh import Lines, Pump

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def pipe() -> Callable[..., tuple[int, Pump]]:
    def pipe(target: io.StringIO, prefix: str, lines: Lines) -> tuple[int, Pump]:
        reading, writing = os.pipe()
        return writing, Pump(os.fdopen(reading, "rb"), target, prefix, lines)

    return pipe


def test_a_line_of_another_rank_does_not_begin_inside_a_line_that_is_not_ended(
    pipe: Callable[..., tuple[int, Pump]],
) -> None:
    target, lines = io.StringIO(), Lines()
    zero, of_zero = pipe(target, "", lines)
    one, of_one = pipe(target, "[rank 1] ", lines)
    os.write(zero, b"epoch 1")
    while "epoch 1" not in target.getvalue():
        pass
    os.write(one, b"told by 1\n")
    os.close(one)
    of_one.finish()
    os.write(zero, b" of 2\n")
    os.close(zero)
    of_zero.finish()
    assert target.getvalue() == "epoch 1\n[rank 1] told by 1\n of 2\n"


def test_a_progress_bar_that_goes_back_to_its_start_is_passed_on_as_it_comes(
    pipe: Callable[..., tuple[int, Pump]],
) -> None:
    target, lines = io.StringIO(), Lines()
    zero, of_zero = pipe(target, "", lines)
    os.write(zero, b"50 %\r100 %\r")
    os.close(zero)
    of_zero.finish()
    assert target.getvalue() == "50 %\r100 %\r"
