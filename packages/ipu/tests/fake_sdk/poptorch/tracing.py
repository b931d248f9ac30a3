"""Tracing a module into a graph of operations that can be replayed, and finding its loss."""

import contextlib
import copy
import warnings

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from poptorch import blocks
from poptorch.errors import Error
from poptorch.rules import holds

_running = False
_MARK = torch.ops.aten.alias.default  # nothing else in a forward makes one
_F = torch.nn.functional
#: Functions that are losses by themselves.
_LOSSES = {
    _F.l1_loss,
    _F.mse_loss,
    _F.cross_entropy,
    _F.nll_loss,
    _F.binary_cross_entropy,
    _F.binary_cross_entropy_with_logits,
    _F.kl_div,
    _F.poisson_nll_loss,
    _F.hinge_embedding_loss,
    _F.smooth_l1_loss,
    _F.soft_margin_loss,
    _F.cosine_embedding_loss,
    _F.margin_ranking_loss,
    _F.triplet_margin_loss,
    _F.ctc_loss,
}


def isRunningOnIpu():
    """Whether a forward is being traced."""
    return _running


def identity_loss(x, reduction):
    """Mark a loss."""
    if reduction not in ("sum", "mean", "none"):
        raise Error(f"reduction {reduction!r} is unknown")
    value = x if reduction == "none" else getattr(x, reduction)()
    return _MARK(value) if _running else value.detach()


def narrowed(tensor):
    """What arrives on the device of a tensor of the host."""
    if not holds("narrow-types"):
        return tensor
    if tensor.is_complex():
        raise Error("complex numbers are not supported")
    if tensor.dtype is torch.int64:
        return tensor.to(torch.int32).to(torch.int64)  # computed as the host wants its indices
    if tensor.dtype in (torch.float64, torch.bfloat16):
        return tensor.float()
    return tensor


def returned(tensor):
    """What arrives on the host of a tensor of the device."""
    if holds("narrow-types") and tensor.dtype is torch.int64:
        return tensor.to(torch.int32)
    return narrowed(tensor)


class Program:
    """A traced module.

    Attributes:
        structure: Of what forward returned; leaves that are no tensors keep their value.
        found: The blocks, as they began.
    """

    def __init__(self, module, tensors, aliases, arguments, *, training):
        global _running
        self.names = list(tensors)
        leaves, self._inputs = pytree.tree_flatten(arguments)
        self._constants = [None if isinstance(v, torch.Tensor) else v for v in leaves]
        self._places = [n for n, v in enumerate(leaves) if isinstance(v, torch.Tensor)]
        self._template = {}

        def forward(values, inputs):
            given = dict(zip(self.names, values, strict=True))
            filled = list(self._constants)
            for place, value in zip(self._places, inputs, strict=True):
                filled[place] = value
            args, kwargs = pytree.tree_unflatten(filled, self._inputs)
            swapped = _Swapped(module, {name: given[first] for name, first in aliases.items()})
            with swapped:
                out = module.forward(*args, **kwargs)
                swapped.check()
            out_leaves, self.structure = pytree.tree_flatten(out)
            kept = [v for v in out_leaves if isinstance(v, torch.Tensor)]
            self._template = [None if isinstance(v, torch.Tensor) else v for v in out_leaves]
            return kept

        samples = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors.values()]
        inputs = [narrowed(leaves[n]) for n in self._places]
        before = torch.get_rng_state()
        _running, blocks.current = holds("running-on-ipu"), []
        try:
            with warnings.catch_warnings(), torch.set_grad_enabled(training), _Functions():
                warnings.simplefilter("ignore")
                with kernels():
                    self.graph = make_fx(forward)(samples, inputs)
        except RuntimeError as error:
            if "tracing tensor" not in str(error):
                raise
            raise Error(
                f"The forward reads a value, which a trace does not have: {error}"
            ) from error
        finally:
            _running, self.found, blocks.current = False, blocks.current, None
            torch.set_rng_state(before)
        self._module = module if not holds("traced-once") else None
        self._forward = forward
        self.graph.graph.set_codegen(torch.fx.graph.CodeGen())  # flat arguments and results
        if training:
            self._find_loss()
        self.graph.recompile()

    def _find_loss(self):
        nodes = list(self.graph.graph.nodes)
        marked = [node for node in nodes if node.target is _MARK]
        above = set()
        for node in marked:
            waiting = list(node.all_input_nodes)
            while waiting:
                each = waiting.pop()
                if each not in above:
                    above.add(each)
                    waiting += each.all_input_nodes
        last = [n for n in marked if n not in above]
        output = nodes[-1]
        if not last:
            if holds("loss-found"):
                raise Error("Couldn't find a loss in graph!")
            last = [output.args[0][0]]
        if len(last) > 1 and holds("one-loss"):
            raise Error(f"Multiple independent losses found in graph: {last}")
        output.args = ([*output.args[0], last[-1]],)

    def run(self, values, inputs):
        """Run it once: tensors of what forward returned, the loss last when training."""
        if self._module is not None:
            self._forward(values, inputs)
        return self.graph(*values, *inputs)

    def rebuilt(self, tensors):
        """What the user's forward returned, with these tensors in place of its own."""
        waiting = iter(tensors)
        leaves = [next(waiting) if v is None else v for v in self._template]
        # A leaf that was None is a None in the structure, not a leaf.
        return pytree.tree_unflatten(leaves, self.structure)


_PRODUCTS = {
    torch.nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__,
    torch.bmm, torch.mm, torch.conv1d, torch.conv2d, torch.conv3d,
}  # fmt: skip


class _Functions(torch.overrides.TorchFunctionMode):
    """What PopTorch makes of functions: losses are marked, products of mixed types upcast."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _PRODUCTS and holds("half-upcast"):
            dtypes = {v.dtype for v in args if isinstance(v, torch.Tensor)}
            if {torch.float16, torch.float32} <= dtypes:
                args = [v.float() if isinstance(v, torch.Tensor) else v for v in args]
        if func in _LOSSES and _running:
            return _MARK(func(*args, **(kwargs or {})))
        if func is torch.nn.functional.batch_norm:
            # Statistics in float32 beside weights in float16 are usual on an IPU.
            dtype = args[0].dtype
            made = [v.float() if _half(v) else v for v in args]
            more = {k: v.float() if _half(v) else v for k, v in (kwargs or {}).items()}
            return func(*made, **more).to(dtype)
        return func(*args, **(kwargs or {}))


def _half(value):
    return isinstance(value, torch.Tensor) and value.dtype is torch.float16


def kernels():
    """Where operations run: with those in float16 that a CPU lacks in older torch."""
    lacks = torch.__version__.startswith(("2.0.", "2.1."))
    return _HalfKernels() if lacks else contextlib.nullcontext()


class _HalfKernels(TorchDispatchMode):
    """Computes in float32 what cannot be computed in float16, and rounds what comes of it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        try:
            return func(*args, **(kwargs or {}))
        except RuntimeError as error:
            if "not implemented for 'Half'" not in str(error):
                raise
        args, kwargs = pytree.tree_map(
            lambda v: v.float() if _half(v) else v, (tuple(args), kwargs or {})
        )
        return pytree.tree_map(
            lambda v: v.half() if isinstance(v, torch.Tensor) and v.is_floating_point() else v,
            func(*args, **kwargs),
        )


class _Swapped:
    """A module whose parameters and buffers are other tensors inside."""

    def __init__(self, module, given):
        self._places = []
        for name, tensor in given.items():
            owner_name, _, attribute = name.rpartition(".")
            owner = module.get_submodule(owner_name)
            table = owner._parameters if attribute in owner._parameters else owner._buffers
            self._places.append((owner, table, attribute, tensor, table[attribute]))

    def __enter__(self):
        for _, table, attribute, tensor, _ in self._places:
            table[attribute] = tensor

    def check(self):
        for owner, table, attribute, tensor, _ in self._places:
            norm = isinstance(owner, torch.nn.modules.batchnorm._BatchNorm)
            moved = table.get(attribute) is not tensor
            if moved and not norm and holds("buffers-not-reassigned"):
                raise Error(f"The forward re-assigned {attribute!r}; update it in place")

    def __exit__(self, *_):
        for _, table, attribute, _, kept in self._places:
            table[attribute] = kept


def shallow(module):
    """A copy of the top object, whose submodules are the same."""
    made = copy.copy(module)
    made.__dict__ = dict(module.__dict__)
    return made
