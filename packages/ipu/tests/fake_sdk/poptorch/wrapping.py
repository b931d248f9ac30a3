"""What PopTorch makes of a module that it trains: classes that fetch weights when looked at."""

import weakref

import torch

from poptorch.errors import Error
from poptorch.rules import holds


def _fresh(tensor):
    owner = tensor.__dict__.get("_poptorch_owner", lambda: None)()
    if owner is not None:
        owner.copyWeightsToHostIfNeeded()


def _function(cls, func, types, args=(), kwargs=None):
    for value in args:
        if isinstance(value, (PoptorchParameter, PoptorchBuffer)):
            _fresh(value)
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **(kwargs or {}))


class PoptorchParameter(torch.nn.Parameter):
    """A parameter whose value may be on the device."""

    __torch_function__ = classmethod(_function)


class PoptorchBuffer(torch.Tensor):
    """A buffer whose value may be on the device."""

    __torch_function__ = classmethod(_function)


class _Wrapped:
    def state_dict(self, *args, **kwargs):
        self.__dict__["_poptorch_executor"]().copyWeightsToHostIfNeeded()
        found = super().state_dict(*args, **kwargs)
        return type(found)((k, plain(v)) for k, v in found.items())


def plain(value):
    """The tensor as torch's own class, sharing memory."""
    if not isinstance(value, torch.Tensor):
        return value
    with torch._C.DisableTorchFunctionSubclass():
        return value.detach().as_subclass(torch.Tensor)


def wrap(module, executor):
    """Change the classes of a module, its parameters and its buffers."""
    wrapped = isinstance(module, _Wrapped) or any(
        isinstance(p, PoptorchParameter) for p in module.parameters()
    )
    if wrapped and holds("one-wrapper"):
        raise RuntimeError("Model has already been wrapped in 'poptorch.trainingModel'.")
    if wrapped:
        return
    for name, buffer in module.named_buffers():
        if type(buffer) is not torch.Tensor:
            raise Error(f"The buffer {name} is a {type(buffer).__name__}")
    kind = type(module)
    module.__class__ = type(f"Poptorch{kind.__name__}", (_Wrapped, kind), {})
    reference = weakref.ref(executor)
    module.__dict__["_poptorch_executor"] = reference
    for p in module.parameters():
        p._poptorch_owner = reference
        p.__class__ = PoptorchParameter
    for buffer in module.buffers():
        buffer._poptorch_owner = reference
        buffer.__class__ = PoptorchBuffer


def unwrap(module):
    """Give everything its own class back."""
    for p in module.parameters():
        if isinstance(p, PoptorchParameter):
            p.__class__ = torch.nn.Parameter
            del p._poptorch_owner
    for buffer in module.buffers():
        if isinstance(buffer, PoptorchBuffer):
            buffer.__class__ = torch.Tensor
            del buffer._poptorch_owner
    if isinstance(module, _Wrapped):
        module.__dict__.pop("_poptorch_executor")
        module.__class__ = type(module).__bases__[1]
