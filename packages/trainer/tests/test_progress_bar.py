from __future__ import annotations

import ast
import inspect
import io
import math
import subprocess
import sys
import threading

import pytest
from drivetrain_interfaces import ConfigurationError

from drivetrain import callbacks, loggers
from drivetrain.callbacks import ProgressBar
from drivetrain.callbacks.base import Moment
from drivetrain.callbacks.display import Lines, Live, View, duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves when told to."""
    now = [1000.0]
    monkeypatch.setattr("drivetrain.callbacks.progress.monotonic", lambda: now[0])

    def move(seconds):
        now[0] += seconds

    return move


@pytest.fixture
def stream():
    return io.StringIO()


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


class Forbidden:
    """A value that must not be read between two drawings."""

    def __float__(self):
        raise AssertionError("a metric was read")


def batches(trainer, clock, count, seconds):
    for _ in range(count):
        clock(seconds)
        trainer.global_step += 1
        trainer.batch_idx += 1
        trainer.hook("on_save_opportunity", Moment.STEP)


def begin(trainer, stream, **options):
    trainer.start(ProgressBar(stream=stream, **options))
    trainer.hook("on_train_start")
    trainer.hook("on_train_epoch_start")


def test_plain_lines_come_every_few_seconds(trainer, stream, clock):
    trainer.num_training_batches = 100
    begin(trainer, stream)
    trainer.progress_bar_metrics["loss"] = 0.123456
    batches(trainer, clock, 12, 1.0)
    assert stream.getvalue().splitlines() == [
        "epoch 1/2 | 5/100 | 1 it/s | loss=0.1235",
        "epoch 1/2 | 10/100 | 1 it/s | loss=0.1235",
    ]


def test_epochs_and_validations_leave_a_line(trainer, stream, clock):
    trainer.num_val_batches = [2, 1]
    begin(trainer, stream)
    batches(trainer, clock, 4, 0.5)
    trainer.hook("on_validation_start")
    for index, loader in ((0, 0), (1, 0), (0, 1)):
        clock(0.25)
        trainer.hook("on_validation_batch_end", None, None, index, loader)
    trainer.publish({"val_loss": 0.5})
    trainer.hook("on_validation_end")
    trainer.hook("on_train_epoch_end")
    assert stream.getvalue().splitlines() == [
        "epoch 1/2 validation | 3/3 | 0.8 s | 4 it/s | val_loss=0.5",
        "epoch 1/2 | 4/4 | 2.0 s | 2 it/s | val_loss=0.5",
    ]


def test_an_epoch_that_is_resumed_counts_from_where_it_was(trainer, stream, clock):
    trainer.batch_idx = 40
    trainer.num_training_batches = 50
    trainer.start(ProgressBar(stream=stream))
    trainer.hook("on_train_start")
    batches(trainer, clock, 10, 1.0)
    trainer.hook("on_train_epoch_end")
    assert stream.getvalue().splitlines() == [
        "epoch 1/2 | 45/50 | 1 it/s",
        "epoch 1/2 | 50/50 | 1 it/s",
        "epoch 1/2 | 50/50 | 10.0 s | 1 it/s",
    ]


def test_an_epoch_without_length_shows_a_question_mark(trainer, stream, clock):
    trainer.num_training_batches = math.inf
    trainer.max_epochs = None
    begin(trainer, stream)
    batches(trainer, clock, 5, 1.0)
    assert stream.getvalue() == "epoch 1 | 5/? | 1 it/s\n"


def test_the_sanity_check_leaves_no_line(trainer, stream, clock):
    trainer.num_val_batches = [1]
    trainer.start(ProgressBar(stream=stream))
    trainer.sanity_checking = True
    trainer.validate({})
    trainer.sanity_checking = False
    assert stream.getvalue() == ""


@pytest.mark.parametrize("kind", ["validation", "test", "predict"])
def test_evaluation_by_itself_is_shown(trainer, stream, clock, kind):
    trainer.callbacks = [ProgressBar(stream=stream)]
    trainer.hook("setup", kind)
    trainer.hook(f"on_{kind}_start")
    for index in range(6):
        clock(1.0)
        trainer.hook(f"on_{kind}_batch_end", None, None, index, 0)
    trainer.hook(f"on_{kind}_end")
    assert stream.getvalue().splitlines() == [
        f"{kind} | 5/? | 1 it/s",
        f"{kind} | 6/? | 6.0 s | 1 it/s",
    ]


def test_nothing_is_read_between_two_drawings(trainer, stream, clock):
    begin(trainer, stream)
    trainer.progress_bar_metrics["loss"] = Forbidden()
    batches(trainer, clock, 1000, 0.001)
    assert stream.getvalue() == ""
    with pytest.raises(AssertionError, match="was read"):
        batches(trainer, clock, 5, 1.0)


def test_other_ranks_show_nothing(ranks, stream, clock):
    trainer = ranks[1]
    trainer.num_val_batches = [1]
    begin(trainer, stream)
    batches(trainer, clock, 50, 1.0)
    trainer.validate({"val_loss": 1.0})
    trainer.hook("on_train_epoch_end")
    trainer.hook("teardown", "fit")
    assert stream.getvalue() == ""


def test_a_terminal_is_redrawn_ten_times_a_second_at_most(trainer, terminal, clock, monkeypatch):
    drawn = []
    monkeypatch.setattr(Live, "update", lambda self, view: drawn.append(view.done))
    trainer.num_training_batches = 1000
    begin(trainer, terminal)
    batches(trainer, clock, 1000, 0.001)
    assert 8 <= len(drawn) <= 10
    assert drawn == sorted(drawn)


def test_a_terminal_shows_a_bar_and_gets_its_cursor_back(trainer, terminal, clock):
    threads = threading.active_count()
    trainer.num_training_batches = 100
    begin(trainer, terminal)
    trainer.progress_bar_metrics["loss"] = 0.25
    batches(trainer, clock, 50, 0.1)
    text = terminal.getvalue()
    assert "50/100" in text
    assert "loss=0.25" in text
    assert "━" in text
    assert "\x1b[?25l" in text
    assert threading.active_count() == threads
    trainer.hook("on_exception", RuntimeError())
    assert terminal.getvalue().count("\x1b[?25h") == 1
    before = terminal.getvalue()
    batches(trainer, clock, 5, 1.0)
    trainer.hook("teardown", "fit")
    assert terminal.getvalue() == before


def test_what_a_user_prints_keeps_its_stream(trainer, terminal, clock, monkeypatch):
    output = io.StringIO()
    monkeypatch.setattr(sys, "stdout", output)
    begin(trainer, terminal)
    batches(trainer, clock, 5, 1.0)
    print("a result")
    assert output.getvalue() == "a result\n"
    assert "a result" not in terminal.getvalue()
    trainer.hook("teardown", "fit")
    assert sys.stdout is output


def test_a_terminal_that_cannot_redraw_gets_lines(trainer, terminal, clock, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    begin(trainer, terminal)
    batches(trainer, clock, 5, 1.0)
    assert terminal.getvalue() == "epoch 1/2 | 5/4 | 1 it/s\n"


def test_plain_may_be_asked_for(trainer, terminal, clock):
    begin(trainer, terminal, plain=True)
    batches(trainer, clock, 5, 1.0)
    assert terminal.getvalue() == "epoch 1/2 | 5/4 | 1 it/s\n"


def test_views_leave_out_what_is_not_known(stream):
    Lines(stream).update(View("test", 3, math.inf, metrics={"n": 4.0, "big": 1.5e9}))
    assert stream.getvalue() == "test | 3/? | n=4  big=1.5e+09\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, ""), (3.21, "3.2 s"), (245, "4:05"), (3723, "1:02:03")]
)
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text


def test_intervals_that_are_not_positive_are_refused():
    with pytest.raises(ConfigurationError, match="refresh_per_second=0"):
        ProgressBar(0)


@pytest.mark.parametrize("package", [callbacks, loggers])
def test_lazy_names_are_those_that_type_checkers_see(package):
    tree = ast.parse(inspect.getsource(package))
    seen = [
        alias.name
        for node in tree.body
        if isinstance(node, ast.If)
        for line in node.body
        for alias in line.names
    ]
    assert sorted(seen) == package.__all__ == dir(package)
    assert all(isinstance(getattr(package, name), type) for name in package.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = package.Nothing


def test_importing_callbacks_and_loggers_imports_neither_rich_nor_tensorboard():
    code = (
        "import sys\n"
        "from drivetrain.callbacks import *\n"
        "from drivetrain.loggers import *\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('rich', 'tensorboard')])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True
    )
    assert done.stdout == "[]\n"
