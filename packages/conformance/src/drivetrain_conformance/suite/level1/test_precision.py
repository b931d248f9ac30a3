"""Numeric formats: what is cast and what never is, and contexts that leave no trace."""

from __future__ import annotations

import json
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from drivetrain_interfaces import EvalSpec

from drivetrain_conformance.outcomes import BY_DECLARATION
from drivetrain_conformance.support.problems import mean_square, microbatches, perceptron

if TYPE_CHECKING:
    from drivetrain_interfaces import Backend, BackendSpec

    from drivetrain_conformance.fixtures import Bind, Build

#: What the contract says of the names that it gives a meaning to: parameters, products, scale.
MEANINGS = {
    "32-true": ("float32", "float32", False),
    "64-true": ("float64", "float64", False),
    "bf16-true": ("bfloat16", "bfloat16", False),
    "16-true": ("float16", "float16", False),
    "bf16-mixed": ("float32", "bfloat16", False),
    "16-mixed": ("float32", "float16", True),
    "fp8": ("float32", "bfloat16", False),
}


def autocast_enabled(kind: str) -> bool:
    """Whether autocast is on for a type of device; torch before 2.4 is asked in other words."""
    try:
        return torch.is_autocast_enabled(kind)
    except TypeError:
        older = torch.is_autocast_cpu_enabled if kind == "cpu" else torch.is_autocast_enabled
        return bool(older())


def test_a_policy_says_what_the_name_means(backend: Backend, declared_precision: str) -> None:
    """An engine applies the policy itself.

    R: P2
    """
    if declared_precision not in MEANINGS:
        pytest.skip(f"{BY_DECLARATION}the contract gives {declared_precision!r} no meaning")
    policy = backend.precision(declared_precision).policy
    found = (policy.parameters, policy.compute, policy.loss_scaling)
    assert found == MEANINGS[declared_precision], (
        f"P2: policy says the same as the name; (parameters, products, scale) of "
        f"{declared_precision!r} are {MEANINGS[declared_precision]}, and its policy says {found}"
    )


@pytest.mark.needs("32-true")
def test_full_precision_changes_and_installs_nothing(backend: Backend) -> None:
    """A module that was built in another format stays in it.

    R: P3
    """
    precision = backend.precision("32-true")
    module = torch.nn.Linear(2, 2, dtype=torch.float64)
    hooks = len(module._forward_pre_hooks) + len(module._forward_hooks)  # noqa: SLF001 - no other way
    converted = precision.convert(module)
    assert converted is module, "P3: 32-true changes nothing; convert returned another module"
    assert module.weight.dtype is torch.float64, "P3: a module in another format stays in it"
    assert len(module._forward_pre_hooks) + len(module._forward_hooks) == hooks, (  # noqa: SLF001
        "P3: 32-true installs nothing"
    )


def test_converting_keeps_parameters_the_same_objects(
    device_backend: Backend, declared_precision: str
) -> None:
    """Ties between modules, and optimizers that exist already, go on working.

    R: P4, P5
    """
    precision = device_backend.precision(declared_precision)
    module = perceptron()
    before = list(module.parameters())
    converted = precision.convert(precision.convert(module))
    assert all(a is b for a, b in zip(before, converted.parameters(), strict=True)), (
        f"P4: parameters stay the same objects; {declared_precision!r} replaced some"
    )


def test_a_converted_module_pickles(bind: Bind, declared_precision: str) -> None:
    """It goes to other processes.

    R: P5
    """
    strategy = bind(declared_precision)
    module = strategy.prepare(perceptron()).to("cpu")
    copy = pickle.loads(pickle.dumps(module))  # noqa: S301 - made in this line
    assert set(copy.state_dict()) == set(module.state_dict()), "P5: a converted module pickles"


class Seeing(torch.nn.Module):
    """A linear layer that notes which dtypes it is called with, and an integer table."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.table = torch.nn.Embedding(4, 3)
        self.seen: list[torch.dtype] = []

    def forward(self, features: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """One product."""
        self.seen = [features.dtype, index.dtype]
        result: torch.Tensor = self.linear(features + self.table(index).to(features.dtype))
        return result


def test_integers_and_targets_are_never_cast(build: Build, declared_precision: str) -> None:
    """A class index beyond 256 is no number in bfloat16, and a target is not an input.

    R: P4
    """
    seen: list[torch.dtype] = []

    def loss(module: torch.nn.Module, item: Any) -> torch.Tensor:
        features, index, target = item
        seen.append(target.dtype)
        assert index.dtype is torch.int64
        value: torch.Tensor = (module(features, index) - target).square().mean()
        return value

    item = (torch.ones(4, 3), torch.tensor([0, 1, 2, 3]), torch.ones(4, 2))
    module = Seeing()
    setup = build(declared_precision, module=module, loss=loss)
    setup.train([[item]])
    assert module.seen[1] is torch.int64, "P4: integers are never cast"
    assert seen[0] is torch.float32, f"P4: targets are never cast; this one became {seen[0]}"


def test_products_are_made_in_the_format_of_the_policy(
    bind: Bind, backend: Backend, declared_precision: str
) -> None:
    """Whatever format the batch comes in.

    R: P4, P7, S24
    """
    strategy = bind(declared_precision)
    module = strategy.prepare(torch.nn.Linear(3, 2))
    spec = EvalSpec(module, lambda m, x: m(x), inference_mode=False)
    with strategy.eval_step(spec) as step:
        made = step(strategy.feed(torch.ones(4, 3)))
    wanted = backend.precision(declared_precision).policy.compute
    assert str(made.dtype) == f"torch.{wanted}", (
        f"P7: products are made in {wanted} in {declared_precision!r}; this one is {made.dtype}"
    )


def test_mixed_precision_is_torchs_autocast(
    bind: Bind, spec: BackendSpec, backend: Backend, declared_precision: str
) -> None:
    """Which operations are done in which format is torch's to say.

    R: P7
    """
    policy = backend.precision(declared_precision).policy
    if policy.parameters == policy.compute or policy.parameters != "float32":
        pytest.skip(f"{BY_DECLARATION}{declared_precision!r} is not mixed")
    strategy = bind(declared_precision)
    module = strategy.prepare(perceptron())
    batch = strategy.feed(microbatches(1)[0])
    with strategy.eval_step(EvalSpec(module, mean_square, inference_mode=False)) as step:
        found = step(batch)
    dtype = getattr(torch, policy.compute)
    with torch.no_grad(), torch.autocast(spec.facts.autocast_type, dtype=dtype):
        wanted = mean_square(module, batch)
    assert found.dtype is wanted.dtype, (
        f"P7: mixed precisions compute what torch.autocast computes, here a {wanted.dtype}; it is "
        f"a {found.dtype}"
    )
    assert float(found) == pytest.approx(float(wanted), rel=1e-6), (
        f"P7: mixed precisions compute what torch.autocast computes, here {float(wanted)!r}; it is "
        f"{float(found)!r}"
    )


def test_contexts_nest_and_leave_no_trace(
    bind: Bind, spec: BackendSpec, backend: Backend, declared_precision: str
) -> None:
    """Also after an exception.

    R: P6
    """
    bind(declared_precision)
    precision = backend.precision(declared_precision)
    kind = spec.facts.autocast_type

    def surroundings() -> tuple[bool, torch.dtype]:
        return autocast_enabled(kind), torch.get_default_dtype()

    before = surroundings()
    with precision.forward():
        inside = surroundings()
        with precision.forward():
            assert surroundings() == inside, "P6: contexts nest"
        assert surroundings() == inside, "P6: the inner context restores what it found"
    assert surroundings() == before, f"P6: a context restores what it found, {before}"
    with pytest.raises(OSError, match="the user's own"), precision.forward():
        raise OSError("the user's own")
    assert surroundings() == before, "P6: a context restores what it found also on exceptions"


@pytest.mark.needs("64-true")
def test_new_tensors_are_double_in_double_precision(build: Build) -> None:
    """A constant in the user's forward would break the chain otherwise.

    R: P6
    """
    seen: list[torch.dtype] = []

    def loss(module: torch.nn.Module, item: Any) -> torch.Tensor:
        seen.append(torch.zeros(1).dtype)
        return mean_square(module, item)

    build("64-true", loss=loss).train([microbatches(1)])
    assert seen == [torch.float64], f"P6: new tensors are float64 in 64-true; this one is {seen[0]}"
    assert torch.zeros(1).dtype is torch.float32, "P6: and float32 again outside"


class NotingBackward(torch.autograd.Function):
    """Notes whether backward runs inside autocast."""

    seen: list[bool]

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, kind: str, seen: list[bool]) -> torch.Tensor:
        """The value as it is."""
        ctx.kind, ctx.seen = kind, seen
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """The gradient as it is, and a note."""
        ctx.seen.append(autocast_enabled(ctx.kind))
        return grad, None, None


def test_backward_runs_outside_of_autocast(
    build: Build, spec: BackendSpec, declared_precision: str
) -> None:
    """Also if the step is called within it.

    R: P8
    """
    kind = spec.facts.autocast_type
    seen: list[bool] = []

    def loss(module: torch.nn.Module, item: Any) -> torch.Tensor:
        made: torch.Tensor = NotingBackward.apply(mean_square(module, item), kind, seen)  # type: ignore[no-untyped-call]
        return made

    setup = build(declared_precision, loss=loss)
    setup.train([microbatches(1)])
    assert seen, "S9: a step calls backward"
    assert not any(seen), f"P8: backward runs outside of autocast in {declared_precision!r}"


def test_the_state_of_a_precision_can_be_saved(
    device_backend: Backend, declared_precision: str
) -> None:
    """JSON values and tensors only; and an empty state changes nothing.

    R: P13
    """
    precision = device_backend.precision(declared_precision)
    state = precision.state_dict()
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            json.dumps({key: value})
    precision.load_state_dict({})
    assert set(precision.state_dict()) == set(state), "P13: an empty state changes nothing"


def test_a_precision_pickles(device_backend: Backend, declared_precision: str) -> None:
    """It goes to other processes as part of a plan.

    R: P16
    """
    precision = device_backend.precision(declared_precision)
    copy = pickle.loads(pickle.dumps(precision))  # noqa: S301 - made in this line
    assert copy.name == declared_precision, "P16: a precision pickles, and keeps its name"
    with copy.forward():
        pass
