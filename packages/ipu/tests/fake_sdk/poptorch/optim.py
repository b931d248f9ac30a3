"""PopTorch's optimizers, and what the device makes of them."""

import torch

from poptorch.rules import holds

_EXTRA = {
    "loss_scaling": 1.0, "velocity_scaling": 1.0, "use_combined_accum": False,
    "accum_type": torch.float32, "velocity_accum_type": torch.float32,
    "first_order_momentum_accum_type": torch.float32,
    "second_order_momentum_accum_type": torch.float32, "max_grad_norm": float("inf"),
    "bias_correction": True, "max_weight_norm": 65500.0, "use_tf_variant": False,
}  # fmt: skip
#: Attributes that each group has; all others are one for all.
GROUPED = {
    "SGD": ("lr", "momentum", "dampening", "weight_decay", "nesterov"),
    "Adam": ("lr", "betas", "eps", "weight_decay", "amsgrad"),
    "AdamW": ("lr", "betas", "eps", "weight_decay", "amsgrad"),
    "RMSprop": ("lr", "momentum", "weight_decay", "alpha", "eps", "centered"),
}
#: From names in torch's state to those on the device.
_STATE = {
    "SGD": {"momentum_buffer": "Accl1"},
    "Adam": {"exp_avg": "Accl1", "exp_avg_sq": "Accl2", "step": "Step"},
    "AdamW": {"exp_avg": "Accl1", "exp_avg_sq": "Accl2", "step": "Step"},
    "RMSprop": {"square_avg": "Accl1", "grad_avg": "Accl2", "momentum_buffer": "Accl3",
                "step": "Step"},
}  # fmt: skip


class VariableAttributes:
    """Which attributes may change after compilation."""

    def __init__(self, variable):
        self._variable = set(variable)

    def isConstant(self, attr):
        return attr not in self._variable

    def markAsConstant(self, attr):
        self._variable.discard(attr)

    def markAsVariable(self, attr):
        self._variable.add(attr)


class Optimizer:
    """The mix-in of all of them."""

    def _begin(self, base, params, given):
        given = {k: v for k, v in given.items() if v is not None and k not in ("self", "params")}
        given = {k: v for k, v in given.items() if not k.startswith("__")}
        self.variable_attrs = VariableAttributes(given)
        for name in [k for k in given if k in _EXTRA]:
            setattr(self, name, given.pop(name))
        base.__init__(self, params, **given)
        self._host = None
        self._executor = None
        self.dirty = False

    def __getattr__(self, name):
        if name in _EXTRA:
            return _EXTRA[name]
        raise AttributeError(name)

    def get_state_dict(self):
        if self._executor is not None and holds("state-read-back"):
            self._executor._read_state()
        return self._host

    def set_state_dict(self, state):
        self._host, self.dirty = state, True

    def has_state(self):
        return self._host is not None

    def state_dict(self):
        made = torch.optim.Optimizer.state_dict(self)
        found = self.get_state_dict() or {"ipu_state": None, "ipu_param": None}
        return {**made, **found}

    def load_state_dict(self, state):
        if not {"ipu_state", "ipu_param"} <= set(state):
            if holds("keys-of-state"):
                raise RuntimeError("Only IPU optimizer states can be loaded onto the IPU.")
            return
        rest = {k: v for k, v in state.items() if not k.startswith("ipu_")}
        torch.optim.Optimizer.load_state_dict(self, rest)
        self.set_state_dict({k: state[k] for k in ("ipu_state", "ipu_param")})

    def step(self, closure=None):
        raise AssertionError("PopTorch never runs the optimizer's Python")


class SGD(Optimizer, torch.optim.SGD):
    def __init__(self, params, lr, momentum=None, dampening=None, weight_decay=None, nesterov=None,
                 maximize=None, foreach=None, differentiable=None, loss_scaling=None,
                 velocity_scaling=None, use_combined_accum=None, accum_type=None,
                 velocity_accum_type=None, max_grad_norm=None):  # fmt: skip
        self._begin(torch.optim.SGD, params, dict(locals()))


class Adam(Optimizer, torch.optim.Adam):
    def __init__(self, params, lr=None, betas=None, eps=None, weight_decay=None, amsgrad=None,
                 foreach=None, maximize=None, capturable=None, differentiable=None, fused=None,
                 loss_scaling=None, accum_type=None, first_order_momentum_accum_type=None,
                 second_order_momentum_accum_type=None, max_grad_norm=None):  # fmt: skip
        self._begin(torch.optim.Adam, params, dict(locals()))


class AdamW(Optimizer, torch.optim.AdamW):
    def __init__(self, params, lr=None, betas=None, eps=None, weight_decay=None, amsgrad=None,
                 maximize=None, foreach=None, capturable=None, differentiable=None, fused=None,
                 loss_scaling=None, bias_correction=None, accum_type=None,
                 first_order_momentum_accum_type=None, second_order_momentum_accum_type=None,
                 max_grad_norm=None):  # fmt: skip
        self._begin(torch.optim.AdamW, params, dict(locals()))


class RMSprop(Optimizer, torch.optim.RMSprop):
    def __init__(self, params, lr=None, alpha=None, eps=None, weight_decay=None, momentum=None,
                 centered=None, foreach=None, maximize=None, differentiable=None,
                 loss_scaling=None, accum_type=None, first_order_momentum_accum_type=None,
                 second_order_momentum_accum_type=None, use_tf_variant=None):  # fmt: skip
        self._begin(torch.optim.RMSprop, params, dict(locals()))


def kind_of(optimizer):
    """The name of what the device runs: of subclasses, the one that is nearest."""
    for name in ("AdamW", "Adam", "RMSprop", "SGD"):
        if isinstance(optimizer, getattr(torch.optim, name)):
            return name
    if holds("optimizer-types"):
        raise AssertionError(f"Unsupported optimizer type {type(optimizer).__name__}")
    return "SGD"


def attributes(optimizer):
    """What PopTorch reads of an optimizer: by group, and for all."""
    kind = kind_of(optimizer)
    groups = [{n: g[n] for n in GROUPED[kind] if n in g} for g in optimizer.param_groups]
    for group in groups:
        if group.pop("amsgrad", False):
            raise ValueError("amsgrad is not supported")
        if not isinstance(group["lr"], float) or not isinstance(group.get("betas", ()), tuple):
            raise ValueError("lr must be a number, and betas a tuple")
    shared = {n: getattr(optimizer, n) for n in _EXTRA if isinstance(optimizer, Optimizer)}
    if not holds("maximize-ignored"):
        for group, mine in zip(optimizer.param_groups, groups, strict=True):
            mine["maximize"] = group.get("maximize", False)
    return groups, shared


def constants(optimizer, found):
    """The attributes that are compiled in, with their values."""
    groups, shared = found
    if not isinstance(optimizer, Optimizer):
        return {}
    names = {name for group in groups for name in group} | set(shared)
    fixed = [n for n in sorted(names) if optimizer.variable_attrs.isConstant(n)]
    return {n: (*(g.get(n) for g in groups), shared.get(n)) for n in fixed}


class OnDevice:
    """An optimizer on the device: the same arithmetic, on copies, with a state of its own."""

    def __init__(self, optimizer, names, values):
        self.kind = kind_of(optimizer)
        by_storage = dict(names)
        self._names = []
        groups = []
        for group in optimizer.param_groups:
            mine = []
            for parameter in group["params"]:
                key = id(parameter)
                if key not in by_storage:
                    if holds("parameters-known"):
                        raise KeyError(f"parameter of shape {tuple(parameter.shape)}")
                    continue
                self._names.append(by_storage[key])
                mine.append(values[by_storage[key]])
            groups.append({"params": mine})
        self.inner = getattr(torch.optim, self.kind)(groups, lr=0.0, foreach=False)
        self.clip = float("inf")

    def configure(self, found):
        groups, shared = found
        for mine, theirs in zip(self.inner.param_groups, groups, strict=True):
            mine.update(theirs)
        self.clip = shared.get("max_grad_norm", float("inf"))

    def update(self):
        if self.clip != float("inf"):
            parameters = [p for g in self.inner.param_groups for p in g["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.clip, foreach=False)
        self.inner.step()
        self.inner.zero_grad(set_to_none=True)

    def _keys(self, group):
        """What the device keeps for the parameters of a group."""
        kept = dict(_STATE[self.kind])
        if self.kind in ("SGD", "RMSprop") and not group["momentum"]:
            del kept["momentum_buffer"]
        if self.kind == "RMSprop" and not group["centered"]:
            del kept["grad_avg"]
        return kept

    def _each(self):
        names = iter(self._names)
        for group in self.inner.param_groups:
            for parameter in group["params"]:
                yield next(names), parameter, self._keys(group)

    def read(self):
        state = {}
        for name, parameter, keys in self._each():
            for key, prefix in keys.items():
                value = self.inner.state.get(parameter, {}).get(key)
                if value is None:  # the device has its state from the beginning
                    value = torch.tensor(0.0) if key == "step" else torch.zeros_like(parameter)
                # Some optimizers of older torch count in Python.
                state[f"{prefix}___{name}"] = torch.as_tensor(value).detach().clone()
        rates = {
            f"learningRate___specific___{n}": torch.tensor(self.inner.param_groups[0]["lr"])
            for n in self._names
        }
        return {"ipu_state": state, "ipu_param": rates}

    def write(self, found):
        given = found["ipu_state"] or {}
        for name, parameter, keys in self._each():
            mine = {}
            for key, prefix in keys.items():
                value = given.get(f"{prefix}___{name}")
                if value is not None:
                    mine[key] = value.detach().clone()
            if mine and float(mine.get("step", 1)):
                self.inner.state[parameter] = mine
