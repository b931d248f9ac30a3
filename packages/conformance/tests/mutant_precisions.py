"""Precisions that each break one rule. At module level, since a precision has to pickle."""

from __future__ import annotations

from typing import Any

import torch
from drivetrain_interfaces import PrecisionPolicy
from drivetrain_toolkit.precision import (
    AutocastPrecision,
    FullPrecision,
    ScaledAutocastPrecision,
    TruePrecision,
    make_precision,
)
from mutant_parts import Good

MIXED = ("bf16-mixed", "16-mixed")
TRUE = ("16-true", "bf16-true", "64-true")


def only(name: str, make: Any) -> dict[str, Any]:
    """One precision that something else makes."""
    return {name: make}


class Precise(Good):
    """A backend whose precisions of some names are made by something else."""

    others: Any = ()

    def precision(self, name: str) -> Any:
        super().precision(name)
        return dict(self.others).get(name, lambda n: make_precision(n, "cpu"))(name)


class WrongPolicy(AutocastPrecision):
    policy = PrecisionPolicy()


class policy_of_another(Precise):
    others = only("bf16-mixed", lambda _: WrongPolicy("cpu"))


class Converting(FullPrecision):
    def convert(self, module: Any) -> Any:
        return module.float()


class full_precision_converts(Precise):
    others = only("32-true", lambda _: Converting())


class Replacing(TruePrecision):
    def convert(self, module: Any) -> Any:
        super().convert(module)
        for part in module.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                setattr(part, name, torch.nn.Parameter(parameter.detach().clone()))
        return module


class converting_replaces_parameters(Precise):
    others = dict.fromkeys(TRUE, Replacing)


class Closing(TruePrecision):
    def convert(self, module: Any) -> Any:
        super().convert(module)
        module.register_forward_pre_hook(lambda *_: None)
        return module


class converted_modules_do_not_pickle(Precise):
    others = dict.fromkeys(TRUE, Closing)


class Coarse(TruePrecision):
    def convert(self, module: Any) -> Any:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(parameter.half())
                parameter.add_(2.0**-12)
        return super().convert(module)


class converting_changes_values(Precise):
    others = only("64-true", Coarse)


class CastsAll(TruePrecision):
    """Casts every floating tensor that the user's function makes, targets too."""

    def convert(self, module: Any) -> Any:
        self._FORMATS[self.name][1](module)
        dtype = self._dtype
        module.register_forward_pre_hook(_CastEverything(dtype), with_kwargs=True)
        return module


class _CastEverything:
    """Integers, too."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, _: Any, args: Any, kwargs: Any) -> Any:
        return tuple(a.to(self.dtype) if isinstance(a, torch.Tensor) else a for a in args), kwargs


class casts_integers(Precise):
    others = dict.fromkeys(TRUE, CastsAll)


class NoContext(AutocastPrecision):
    def forward(self) -> Any:
        return FullPrecision().forward()


class mixed_without_autocast(Precise):
    others = only("bf16-mixed", lambda _: NoContext("cpu"))


class CastsParameters(AutocastPrecision):
    def convert(self, module: Any) -> Any:
        return TruePrecision("bf16-true").convert(module)


class mixed_casts_parameters(Precise):
    others = only("bf16-mixed", lambda _: CastsParameters("cpu"))


class _Leaking:
    """Turns autocast on and never off."""

    def __enter__(self) -> None:
        torch.set_autocast_enabled("cpu", True)
        torch.set_autocast_dtype("cpu", torch.bfloat16)

    def __exit__(self, *exc: object) -> None:
        if exc[0] is None:
            torch.set_autocast_enabled("cpu", False)


class Leaks(AutocastPrecision):
    def forward(self) -> Any:
        return _Leaking()


class context_leaks_on_errors(Precise):
    others = only("bf16-mixed", lambda _: Leaks("cpu"))


class Plain(TruePrecision):
    def forward(self) -> Any:
        return FullPrecision().forward()


class double_makes_single_tensors(Precise):
    others = only("64-true", Plain)


class Inside(AutocastPrecision):
    def backward(self, loss: torch.Tensor) -> None:
        with self.forward():
            loss.backward()


class backward_inside_autocast(Precise):
    others = only("bf16-mixed", lambda _: Inside("cpu"))


class Locked(FullPrecision):
    def __init__(self) -> None:
        self.kept = lambda: None


class precision_does_not_pickle(Precise):
    others = only("32-true", lambda _: Locked())


class Stateful(FullPrecision):
    def state_dict(self) -> dict[str, Any]:
        return {"made": complex(1, 1)}


class precision_state_is_no_json(Precise):
    others = only("32-true", lambda _: Stateful())


# Loss scales


class Applies(ScaledAutocastPrecision):
    def __init__(self, name: str) -> None:
        super().__init__("cpu")

    def step(self, optimizers: Any, prepare: Any) -> bool:
        super().step(optimizers, prepare)
        return True


class claims_to_have_applied(Precise):
    others = only("16-mixed", Applies)


class Moves(ScaledAutocastPrecision):
    def __init__(self, name: str) -> None:
        super().__init__("cpu")

    def step(self, optimizers: Any, prepare: Any) -> bool:
        applied = super().step(optimizers, prepare)
        if not applied:
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        if parameter.grad is not None:
                            parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
                optimizer.step()
        return applied


class moves_what_is_not_finite(Precise):
    others = only("16-mixed", Moves)


class Each(ScaledAutocastPrecision):
    """Each optimizer decides for itself."""

    def __init__(self, name: str) -> None:
        super().__init__("cpu")

    def step(self, optimizers: Any, prepare: Any) -> bool:
        if len(optimizers) == 1:
            return super().step(optimizers, prepare)
        applied = [super(Each, self).step([o], prepare) for o in optimizers]
        return all(applied)


class decides_for_each_optimizer(Precise):
    others = only("16-mixed", Each)


class Stubborn(ScaledAutocastPrecision):
    def __init__(self, name: str) -> None:
        super().__init__("cpu", backoff_factor=1.0 - 2.0**-20)


class scale_hardly_shrinks(Precise):
    others = only("16-mixed", Stubborn)


class ScaledHooks(ScaledAutocastPrecision):
    """Unscales after the hooks rather than before."""

    def __init__(self, name: str) -> None:
        super().__init__("cpu")

    def step(self, optimizers: Any, prepare: Any) -> bool:
        if self._scaler.started:
            prepare()
        return super().step(optimizers, lambda: None)


class prepares_before_it_unscales(Precise):
    others = only("16-mixed", ScaledHooks)


class Forgets(ScaledAutocastPrecision):
    def __init__(self, name: str) -> None:
        super().__init__("cpu")

    def state_dict(self) -> dict[str, Any]:
        return {}


class scale_is_not_saved(Precise):
    others = only("16-mixed", Forgets)


class Deaf(ScaledAutocastPrecision):
    def __init__(self, name: str) -> None:
        super().__init__("cpu")

    def load_state_dict(self, state: Any) -> None:
        pass


class scale_is_not_loaded(Precise):
    others = only("16-mixed", Deaf)


class Eager(ScaledAutocastPrecision):
    def __init__(self, name: str) -> None:
        super().__init__("cpu")

    def step(self, optimizers: Any, prepare: Any) -> bool:
        if not self._scaler.started:
            for optimizer in optimizers:
                optimizer.step()
            return True
        return super().step(optimizers, prepare)


class updates_before_any_backward(Precise):
    others = only("16-mixed", Eager)


class Halves(ScaledAutocastPrecision):
    def __init__(self, name: str) -> None:
        super().__init__("cpu")

    def convert(self, module: Any) -> Any:
        return module


class scales_half_parameters(Precise):
    others = only("16-mixed", Halves)


class Early(ScaledAutocastPrecision):
    """The scale changes at once, also between two updates of one backward."""

    def __init__(self, name: str) -> None:
        super().__init__("cpu", growth_interval=1)

    def step(self, optimizers: Any, prepare: Any) -> bool:
        applied = super().step(optimizers, prepare)
        self._settle()
        return applied


class scale_changes_between_updates(Precise):
    others = only("16-mixed", Early)
