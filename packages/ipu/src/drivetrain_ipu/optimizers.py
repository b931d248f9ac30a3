"""Torch's optimizers as the device runs them, and their state in both worlds.

The user's optimizer stays what schedulers and callbacks look at. Beside it is one of
``poptorch.optim``, whose attributes follow it and whose state is on the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from drivetrain_interfaces import CheckpointError, ConfigurationError, UnsupportedError
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import nn
    from torch.optim import Optimizer

#: Hyperparameters that each group has on the device (PopTorch 3.4, ``optim.py``).
GROUPED: Mapping[type[Optimizer], tuple[str, ...]] = {
    torch.optim.SGD: ("lr", "momentum", "dampening", "weight_decay", "nesterov"),
    torch.optim.Adam: ("lr", "betas", "eps", "weight_decay"),
    torch.optim.AdamW: ("lr", "betas", "eps", "weight_decay"),
    torch.optim.RMSprop: ("lr", "alpha", "eps", "weight_decay", "momentum", "centered"),
}
#: Names of state in torch, and the prefixes that they have on the device (PopART's tensor names).
STATE: Mapping[type[Optimizer], Mapping[str, str]] = {
    torch.optim.SGD: {"momentum_buffer": "Accl1"},
    torch.optim.Adam: {"step": "Step", "exp_avg": "Accl1", "exp_avg_sq": "Accl2"},
    torch.optim.AdamW: {"step": "Step", "exp_avg": "Accl1", "exp_avg_sq": "Accl2"},
    torch.optim.RMSprop: {
        "step": "Step",
        "square_avg": "Accl1",
        "grad_avg": "Accl2",
        "momentum_buffer": "Accl3",
    },
}
_MARK = "___"


def check_optimizers(optimizers: Sequence[Optimizer], *, clips: bool) -> Optimizer:
    """The one optimizer of a step, if the device can run it.

    Args:
        optimizers: Of the step.
        clips: Whether ``max_grad_norm`` was asked for.

    Raises:
        ConfigurationError: There is none.
        UnsupportedError: There are several, or it is or does what the device cannot.
    """
    if not optimizers:
        raise ConfigurationError("A train step without an optimizer was asked for.", "Give it one.")
    if len(optimizers) > 1:
        raise UnsupportedError(
            f"{len(optimizers)} optimizers were asked for, and an IPU's program holds one.",
            "Put the parameters into groups of one optimizer.",
        )
    (optimizer,) = optimizers
    kind = _kind(optimizer)
    for problem in _problems(optimizer, kind, clips=clips):
        raise UnsupportedError(
            f"{type(optimizer).__name__} {problem}", "Change it, or use another optimizer."
        )
    return optimizer


def _kind(optimizer: Optimizer) -> type[Optimizer]:
    """The class of torch that it is."""
    theirs = type(optimizer).__module__.startswith("poptorch.")
    for kind in GROUPED:
        if type(optimizer) is kind or (theirs and type(optimizer).__name__ == kind.__name__):
            return kind
    raise UnsupportedError(
        f"{type(optimizer).__name__} was asked for, and an IPU's program runs no Python, so "
        "neither a step of one's own nor a closure.",
        f"Use one of {', '.join(kind.__name__ for kind in GROUPED)} of torch.optim.",
    )


def _problems(optimizer: Optimizer, kind: type[Optimizer], *, clips: bool) -> Iterable[str]:
    for group in optimizer.param_groups:
        for name in ("amsgrad", "maximize", "differentiable"):
            if group.get(name):
                yield f"was asked for with {name}=True, which an IPU ignores or refuses."
        for name in ("lr", "weight_decay"):
            if isinstance(group[name], Tensor):
                yield f"has a tensor for {name}, and an IPU wants a number."
        if any(p.is_sparse or p.layout is not torch.strided for p in group["params"]):
            yield "has sparse parameters, which an IPU does not update."
    if len({group.get("centered") for group in optimizer.param_groups}) > 1:
        yield "has groups that differ in centered, of which an IPU takes one value."
    if clips and kind is torch.optim.RMSprop:
        yield "was asked for with max_grad_norm, which an IPU has for SGD, Adam and AdamW."


class DeviceOptimizer:
    """The user's optimizer and the one that the device runs.

    Args:
        optimizer: The user's.
        sdk: The module ``poptorch``.
        variable: Hyperparameters that may change during training; others are compiled in.
        extras: Further arguments of the device's, such as ``max_grad_norm``.
    """

    def __init__(
        self, optimizer: Optimizer, sdk: Any, variable: Sequence[str], extras: Mapping[str, Any]
    ) -> None:
        self.mine = optimizer
        self.kind = _kind(optimizer)
        self._names = GROUPED[self.kind]
        self._variable = tuple(variable)
        if type(optimizer).__module__.startswith("poptorch."):
            self.device: Any = optimizer
        else:
            groups = [
                {"params": group["params"], **self._of(group)} for group in optimizer.param_groups
            ]
            made = getattr(sdk.optim, self.kind.__name__)
            self.device = made(groups, **self._of(optimizer.defaults), **extras)
            for name in (*self._names, *extras):
                if name in self._variable:
                    self.device.variable_attrs.markAsVariable(name)
                else:
                    self.device.variable_attrs.markAsConstant(name)
        self._last = self._now()

    def _of(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The hyperparameters of a group, as the device's constructor takes them."""
        made = {name: group[name] for name in self._names if name in group}
        made["lr"] = float(made["lr"])
        if "betas" in made:
            made["betas"] = tuple(made["betas"])
        return made

    def _now(self) -> list[dict[str, Any]]:
        return [self._of(group) for group in self.mine.param_groups]

    def changed(self) -> bool:
        """Let the device's follow the user's; whether anything was different.

        Raises:
            UnsupportedError: What changed was compiled in.
        """
        now = self._now()
        if now == self._last:
            return False
        names = {
            name
            for old, new in zip(self._last, now, strict=True)
            for name in new
            if old[name] != new[name]
        }
        fixed = sorted(names - set(self._variable))
        if fixed:
            raise UnsupportedError(
                f"{fixed[0]!r} of {self.kind.__name__} changed during training, and was compiled "
                "into the program.",
                f"Say so before: variable={(*self._variable, fixed[0])!r} of IpuStrategy.",
            )
        for group, values in zip(self.device.param_groups, now, strict=True):
            group.update(values)
        self._last = now
        return True

    def adopt(self) -> None:
        """Take what the user's has now, as after loading a state. Before compilation only."""
        self._last = self._now()
        for group, values in zip(self.device.param_groups, self._last, strict=True):
            group.update(values)

    def stepped(self) -> None:
        """Tell schedulers that updates happen, since ``step`` is never called."""
        self.mine._step_count = 1  # type: ignore[attr-defined]  # noqa: SLF001 - what they look at
        self.mine._opt_called = True  # type: ignore[attr-defined]  # noqa: SLF001 - and newer ones

    # State
    def pull(self, network: nn.Module) -> None:
        """Copy the device's state into the user's optimizer, under torch's names."""
        found = self.device.state_dict().get("ipu_state")
        if found is None:
            return
        inverse = {prefix: key for key, prefix in STATE[self.kind].items()}
        state: dict[str, dict[str, Tensor]] = {}
        for name, value in found.items():
            prefix, _, parameter = name.partition(_MARK)
            if prefix in inverse:
                key = inverse[prefix]
                made = value.detach().clone()
                made = made.reshape(()) if key == "step" else made
                state.setdefault(_plain(parameter), {})[key] = made
        names = {id(parameter): name for name, parameter in network.named_parameters()}
        if self.device is self.mine:
            return
        for group in self.mine.param_groups:
            for parameter in group["params"]:
                entries = state.get(names[id(parameter)], {})
                if self.kind is torch.optim.SGD and not group["momentum"]:
                    entries.pop("momentum_buffer", None)  # torch keeps none
                if entries:
                    self.mine.state[parameter] = entries

    def push(self, network: nn.Module) -> None:
        """Put the state of the user's optimizer in place of the device's, once it is compiled.

        Raises:
            CheckpointError: It does not fit what the program keeps.
        """
        if not self.mine.state or self.device is self.mine:
            return
        whole = self.device.state_dict()
        there = whole["ipu_state"]
        if there is None:
            return
        names = {id(p): name for name, p in network.named_parameters()}
        wanted = {
            (names[id(p)], key): value
            for p, entries in self.mine.state.items()
            for key, value in entries.items()
            if isinstance(value, Tensor) and key in STATE[self.kind]
        }
        prefixes = STATE[self.kind]
        places = {tuple(reversed(_parts(name))): name for name in there}
        made = dict(there)
        for (parameter, key), value in wanted.items():
            place = places.get((parameter, prefixes[key]))
            if place is None and key == "step":
                continue  # a program of RMSprop counts nothing
            if place is None or there[place].numel() != value.numel():
                raise CheckpointError(
                    f"The state {key!r} of {parameter!r} does not fit what the program keeps for "
                    f"{self.kind.__name__}.",
                    "Resume with the optimizer that the checkpoint was saved with.",
                )
            old = there[place]
            made[place] = value.detach().to(old.dtype).reshape(old.shape).clone()
        self.device.load_state_dict({**whole, "ipu_state": made})


def _parts(name: str) -> tuple[str, str]:
    prefix, _, parameter = name.partition(_MARK)
    return prefix, _plain(parameter)


def _plain(name: str) -> str:
    """The name in the user's module of what has one in the step module."""
    return name.rpartition("network.")[2]
