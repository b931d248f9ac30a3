"""Which hooks are called, with which arguments, and in which order."""

from __future__ import annotations

from functools import partial

import pytest
from drivetrain_interfaces import StepHook

from drivetrain.callbacks import Callback
from drivetrain.hooks import Hooks, ordered, overrides, trimmed
from drivetrain.module import Module

TRAINER = object()


class Silent(Callback):
    """Overrides nothing."""


class Watcher(Callback):
    def __init__(self, name, said, *, saves=False):
        self.name, self.said, self.saves_checkpoints = name, said, saves

    def on_train_start(self, trainer, module):
        assert trainer is TRAINER
        self.said.append((self.name, module))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.said.append((self.name, outputs, batch, batch_idx))

    def on_after_backward(self, trainer, module):
        """Wanted inside the step."""


class Net(Module):
    def __init__(self, said):
        super().__init__()
        self.said = said

    def on_train_start(self):
        self.said.append(("module",))

    def on_train_batch_end(self, outputs, batch):
        self.said.append(("module", outputs, batch))

    def on_before_backward(self, loss):
        """Wanted inside the step."""


# Overrides
def test_an_inherited_hook_is_no_override():
    assert not overrides(Silent(), Callback, "on_train_start")
    assert not overrides(Module(), Module, "on_train_start")


def test_a_subclass_of_a_subclass_overrides_what_its_parents_do():
    class Further(Watcher):
        pass

    assert overrides(Further("a", []), Callback, "on_train_start")


def test_a_function_set_on_the_object_is_an_override():
    module = Module()
    module.on_train_start = lambda: None
    assert overrides(module, Module, "on_train_start")


def test_what_neither_has_is_no_override():
    assert not overrides(Silent(), Callback, "on_something_else")


# Trimming
def taking_two(a, b):
    return (a, b)


@pytest.mark.parametrize(
    ("call", "got"),
    [
        (lambda: (), ()),
        (lambda a: (a,), (1,)),
        (taking_two, (1, 2)),
        (lambda a, b, c: (a, b, c), (1, 2, 3)),
        (lambda a, b, c, d=0: (a, b, c, d), (1, 2, 3, 0)),
        (lambda *all_of_them: all_of_them, (1, 2, 3)),
        (lambda a, *, key=5: (a, key), (1, 5)),
        (lambda a, **more: (a, more), (1, {})),
        (lambda a, /, b: (a, b), (1, 2)),
        (partial(taking_two, 9), (9, 1)),
    ],
)
def test_a_hook_gets_the_leading_arguments_that_it_takes(call, got):
    assert trimmed(call, 3)(1, 2, 3) == got


def test_a_hook_that_takes_everything_is_called_directly():
    assert trimmed(taking_two, 2) is taking_two


# Order
def test_callbacks_run_in_list_order_then_savers_then_the_module():
    said = []
    callbacks = [
        Watcher("saver 1", said, saves=True),
        Watcher("a", said),
        Silent(),
        Watcher("saver 2", said, saves=True),
        Watcher("b", said),
    ]
    net = Net(said)
    Hooks(TRAINER, net, callbacks).call("on_train_start")
    assert said == [("a", net), ("b", net), ("saver 1", net), ("saver 2", net), ("module",)]
    assert [type(each).__name__ for each in ordered(callbacks)][2:] == ["Watcher"] * 3


def test_the_table_of_a_hook_that_nobody_overrides_is_empty():
    hooks = Hooks(TRAINER, Module(), [Silent()])
    assert hooks.table("on_train_batch_end", 3) == ()
    hooks.call("on_train_epoch_start")


def test_callbacks_and_module_get_their_own_arguments():
    said = []
    hooks = Hooks(TRAINER, Net(said), [Watcher("a", said)])
    for call in hooks.table("on_train_batch_end", 3):
        call("outputs", "batch", 7)
    assert said == [("a", "outputs", "batch", 7), ("module", "outputs", "batch")]


def test_a_table_is_made_once():
    hooks = Hooks(TRAINER, Net([]), [Watcher("a", [])])
    assert hooks.table("on_train_batch_end", 3) is hooks.table("on_train_batch_end", 3)


def test_values_that_a_hook_returns_reach_the_loop():
    class Ending(Module):
        def on_train_batch_start(self, batch, batch_idx):
            return -1

    (call,) = Hooks(TRAINER, Ending(), []).table("on_train_batch_start", 2)
    assert call("batch", 0) == -1


# Who wants something inside the step
def test_moments_inside_the_step_are_listed_with_their_owners():
    hooks = Hooks(TRAINER, Net([]), [Silent(), Watcher("a", [])])
    assert hooks.step_hooks() == {
        StepHook.BEFORE_BACKWARD: ["Net.on_before_backward"],
        StepHook.AFTER_BACKWARD: ["Watcher.on_after_backward"],
    }


def test_every_moment_inside_the_step_is_a_hook_of_callbacks_and_modules():
    for hook in StepHook:
        assert callable(getattr(Callback, f"on_{hook.value}"))
        assert callable(getattr(Module, f"on_{hook.value}"))


def test_callbacks_have_every_hook_that_modules_have():
    steps = {"on_before_batch_transfer", "on_after_batch_transfer"}
    ours = {name for name in vars(Module) if name.startswith("on_")} - steps
    theirs = {name for name in vars(Callback) if name.startswith("on_")}
    assert ours <= theirs
    assert theirs - ours == {
        "on_exception",
        "on_sanity_check_start",
        "on_sanity_check_end",
        "on_save_opportunity",
    }
