"""The modules that are traced: the user's step, and what leaves the device besides its result.

Python runs while a step is traced, and never again. So what user code does there besides computing
is taken down: calls of ``log`` are repeated on the host with the values of each run, and a number
that it reads is noted, because it has become a constant.
"""

from __future__ import annotations

import operator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from drivetrain_interfaces import UserCodeError
from torch import Tensor, nn

from drivetrain_ipu.batches import Tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from drivetrain_interfaces import Precision

_RECORDED = ("log", "log_dict")


class Notes:
    """Calls of ``log`` and ``log_dict`` in a traced step.

    Attributes:
        values: The tensors among their arguments, which become outputs.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._calls: list[tuple[str, Tree]] = []
        self.values: list[Tensor] = []

    @contextmanager
    def taking(self) -> Iterator[None]:
        """Inside, the network's calls are taken down instead of made."""
        self._calls, self.values = [], []
        kept = self._network.__dict__
        names = [n for n in _RECORDED if callable(getattr(self._network, n, None))]
        before = {name: kept[name] for name in names if name in kept}
        kept.update({name: self._recorder(name) for name in names})
        try:
            yield
        finally:
            for name in names:
                del kept[name]
            kept.update(before)

    def _recorder(self, name: str) -> Callable[..., None]:
        def record(*args: Any, **kwargs: Any) -> None:
            tree = Tree((args, kwargs))
            self._calls.append((name, tree))
            self.values += [
                t.detach() if t.dim() == 0 else t.detach().float().mean() for t in tree.tensors
            ]

        return record

    def replay(self, values: Sequence[Tensor]) -> None:
        """Make the calls, with what came out of a run: one scalar for each tensor."""
        waiting = iter(values)
        for name, tree in self._calls:
            args, kwargs = tree.rebuilt([next(waiting) for _ in tree.tensors])
            getattr(self._network, name)(*args, **kwargs)


class TrainModule(nn.Module):
    """Loss of one microbatch, as PopTorch wants it: the last thing that forward computes.

    Args:
        network: The user's module.
        loss: Called with it and a microbatch.
        precision: The numeric format.
        sdk: The module ``poptorch``.
        tree: How a microbatch is made of tensors.
        weighted: Whether the last input is the weight of the microbatch.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Callable[[nn.Module, Any], Tensor],
        precision: Precision,
        sdk: Any,
        tree: Tree,
        *,
        weighted: bool,
    ) -> None:
        super().__init__()
        self.network = network
        self.notes = Notes(network)
        self._loss = loss
        self._precision = precision
        self._sdk = sdk
        self._tree = tree
        self._scalars = tuple(tensor.dim() == 0 for tensor in tree.tensors)
        self._weighted = weighted
        self.training = network.training

    def train(self, mode: bool = True) -> TrainModule:  # noqa: FBT001, FBT002 - torch's signature
        """Only this module: what is inside keeps the mode that the user gave it."""
        self.training = mode
        return self

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What is trained on, the user's loss, and what was logged."""
        tensors = inputs[:-1] if self._weighted else inputs
        microbatch = self._tree.rebuilt(_shaped(tensors, self._scalars))
        with self.notes.taking(), self._precision.forward():
            loss = usable_loss(self._loss(self.network, microbatch))
        marked = loss * inputs[-1].reshape(()).to(loss.dtype) if self._weighted else loss
        if self._sdk.isRunningOnIpu():
            # Also a loss that PopTorch knows: a formula around one would not be found otherwise.
            marked = self._sdk.identity_loss(marked, "none")
        return (marked, loss.detach(), *self.notes.values)


def usable_loss(loss: Any) -> Tensor:
    """The loss as a scalar. Raises ``UserCodeError`` if it cannot be one."""
    if not isinstance(loss, Tensor):
        what = f"{loss!r}" if loss is None else f"a {type(loss).__name__}, not a tensor"
        raise UserCodeError(
            f"The loss is {what}.", "Return a scalar tensor that requires a gradient."
        )
    if loss.numel() != 1:
        raise UserCodeError(
            f"The loss has shape {tuple(loss.shape)}.", "Return a scalar, such as its mean()."
        )
    return loss.reshape(())


class EvalModule(nn.Module):
    """The user's evaluation of one batch.

    Args:
        network: The user's module.
        function: Called with it and the arguments.
        precision: The numeric format.
        tree: How the arguments are made of tensors.

    Attributes:
        record: What the trace left; PopTorch traces a copy of this module, which shares it.
    """

    def __init__(
        self, network: nn.Module, function: Callable[..., Any], precision: Precision, tree: Tree
    ) -> None:
        super().__init__()
        self.network = network
        self.record = Record(network, tree)
        self._function = function
        self._precision = precision
        self._tree = tree
        self._scalars = tuple(tensor.dim() == 0 for tensor in tree.tensors)
        self.training = network.training

    def train(self, mode: bool = True) -> EvalModule:  # noqa: FBT001, FBT002 - torch's signature
        """Only this module, as in training."""
        self.training = mode
        return self

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The tensors of what the function returned, and what was logged."""
        record = self.record
        arguments = self._tree.rebuilt(_shaped(inputs, self._scalars), record.numbers)
        with record.notes.taking(), torch.no_grad(), self._precision.forward():
            return record.taken(self._function(self.network, *arguments))


class Record:
    """What is known of an evaluation once it was traced.

    Args:
        network: The user's module.
        tree: The arguments of the first call.

    Attributes:
        constants: Those of its arguments that are no tensors.
        numbers: The same, with numbers that note whether they are read.
    """

    def __init__(self, network: nn.Module, tree: Tree) -> None:
        self.notes = Notes(network)
        self.constants = list(tree.constants)
        self.numbers = [Number(value) if type(value) is int else value for value in tree.constants]
        self._results = Tree(())
        self._kinds: list[tuple[int, torch.dtype]] = []

    def taken(self, results: Any) -> tuple[Tensor, ...]:
        """What the program returns, of what the function returned in the trace."""
        self._results = Tree(results)
        self._kinds = [(tensor.dim(), tensor.dtype) for tensor in self._results.tensors]
        made = (*self._results.tensors, *self.notes.values)
        self._results.tensors = []  # those of the trace mean nothing afterwards
        self.notes.values = []
        return made

    def returned(self, tensors: Sequence[Tensor]) -> Any:
        """What the function returned, from the tensors of a run, in the types that it gave them."""
        count = len(self._kinds)
        given = []
        for tensor, (dims, dtype) in zip(tensors[:count], self._kinds, strict=True):
            made = tensor.to(dtype) if dtype is torch.int64 else tensor
            given.append(made if dims else _scalar(made))
        self.notes.replay([_scalar(tensor) for tensor in tensors[count:]])
        return self._results.rebuilt(given)

    def read(self) -> frozenset[int]:
        """Places of numbers among the constants that the function looked at."""
        return frozenset(
            place
            for place, number in enumerate(self.numbers)
            if isinstance(number, Number) and number.used
        )


def _shaped(tensors: Sequence[Tensor], scalars: Sequence[bool]) -> list[Tensor]:
    """Inputs as the user made them: without the dimension that makes a row of a single number."""
    return [t.reshape(()) if s else t for t, s in zip(tensors, scalars, strict=True)]


def _scalar(values: Tensor) -> Tensor:
    """One number from those of all replicas and iterations."""
    if not values.dim():
        return values
    return values.float().mean() if values.is_floating_point() else values.reshape(-1)[-1]


class Number:
    """An integer of the host in a traced step, such as the number of a batch.

    It can be used like one; then the program holds its value and is for this value alone.

    Attributes:
        used: Whether anybody looked.
    """

    __slots__ = ("_value", "used")

    def __init__(self, value: int) -> None:
        self._value = value
        self.used = False

    def __index__(self) -> int:
        self.used = True
        return self._value

    __int__ = __index__

    def __hash__(self) -> int:
        return hash(self.__index__())

    def __bool__(self) -> bool:
        return bool(self.__index__())

    def __str__(self) -> str:
        return str(self.__index__())

    __repr__ = __str__

    def __format__(self, form: str) -> str:
        return format(self.__index__(), form)


def _add_operators() -> None:
    binary = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
    compared = ("eq", "ne", "lt", "le", "gt", "ge")

    def made(name: str, *, swapped: bool = False) -> Callable[[Number, Any], Any]:
        function = getattr(operator, name)

        def apply(self: Number, other: Any) -> Any:
            value = self.__index__()
            theirs = other.__index__() if isinstance(other, Number) else other
            return function(theirs, value) if swapped else function(value, theirs)

        return apply

    for name in (*binary, *compared):
        setattr(Number, f"__{name}__", made(name))
    for name in binary:
        setattr(Number, f"__r{name}__", made(name, swapped=True))


_add_operators()


def modes(network: nn.Module) -> tuple[bool, ...]:
    """Which modules are in training mode; a program holds that too."""
    return tuple(module.training for module in network.modules())
