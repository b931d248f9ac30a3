"""Executors: one call is a program that was traced and compiled before."""

import inspect
import os

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

from poptorch import blocks, devices, enums
from poptorch import optim as optimizers
from poptorch.errors import Error
from poptorch.options import checked
from poptorch.rules import holds
from poptorch.tracing import Program, kernels, returned, shallow
from poptorch.wrapping import plain, unwrap, wrap


class PoplarExecutor:
    """What ``trainingModel`` and ``inferenceModel`` return."""

    def __init__(self, module, options, training, optimizer):
        self._options = checked(options).clone()
        self._training = training
        self._user = module
        self._program = None
        self._attached = False
        self._stale = False
        self._values = {}
        self._device_optimizer = None
        self._optimizer = None
        self._generator = None
        self.traces = 0
        self.uploads = 0
        accumulation = self._options.Training.gradient_accumulation
        if not training and accumulation != 1 and holds("inference-no-accumulation"):
            raise Error("Gradient accumulation must be 1 for inference")
        if training:
            wrap(module, self)
            self._module = shallow(module)
            self._adopt(optimizer or torch.optim.SGD(module.parameters(), lr=0.01))
        else:
            self._module = shallow(module)
        # An evaluation of what is being trained asks that program for its weights.
        self._source = None if training else module.__dict__.get("_poptorch_executor")

    # What it is
    @property
    def model(self):
        return self._user

    @property
    def options(self):
        return self._options

    @property
    def rng_state(self):
        assert self._program is not None, "rng_state needs a compiled executor"
        return self._generator.tolist()

    @rng_state.setter
    def rng_state(self, state):
        self._generator = torch.tensor(state, dtype=torch.uint8)

    def isCompiled(self):
        return self._program is not None

    def isAttachedToDevice(self):
        return self._attached

    # Compiling
    def compile(self, *args, **kwargs):
        if self._program is not None and holds("compiled-once"):
            return
        options = self._options
        self._check_binding(args, kwargs)
        leaves, self._structure = pytree.tree_flatten((args, kwargs))
        self._first = leaves
        self._check_batch(leaves)
        factor = self._factor()
        small = [v[: v.shape[0] // factor] if _rows(v) else v for v in leaves]
        arguments = pytree.tree_unflatten(small, self._structure)
        parameters = dict(self._module.named_parameters())
        aliases = _aliases(self._module)
        host = {n: plain(t).requires_grad_(n in parameters and t.requires_grad)
                for n, t in self._tensors().items()}  # fmt: skip
        self._program = Program(self._module, host, aliases, arguments, training=self._training)
        self.traces += 1
        self._ipus = blocks.ipus_of(self._program.found) * options.replication_factor
        if (
            self._ipus & (self._ipus - 1)
            and not options.auto_round_num_ipus
            and holds("power-of-two")
        ):
            self._program = None
            raise Error(f"{self._ipus} IPUs are no power of two; use autoRoundNumIPUs")
        self._check_depth()
        seed = options._values.get("random_seed")
        made = torch.Generator()
        made.manual_seed(int.from_bytes(os.urandom(4), "little") if seed is None else seed)
        self._generator = made.get_state()
        if options.connection_type != enums.ConnectionType.Never:
            self.attachToDevice()

    def _check_depth(self):
        options = self._options
        strategy = options.execution_strategy
        depth = blocks.stages_of(self._program.found, strategy)
        if depth == 1 or isinstance(strategy, blocks.ShardedExecution):
            return
        wanted = 2 * depth - 1 if self._training else depth
        there = (
            options.Training.gradient_accumulation if self._training else options.device_iterations
        )
        if there < wanted and holds("pipeline-depth"):
            self._program = None
            what = "gradient accumulation" if self._training else "deviceIterations"
            raise Error(f"A pipeline of {depth} stages needs {what} of {wanted}, not {there}")

    def _factor(self):
        options = self._options
        replicas = options.replication_factor // options.input_group_size
        accumulation = options.Training.gradient_accumulation if self._training else 1
        return options.device_iterations * replicas * accumulation

    def _check_batch(self, leaves):
        factor = self._factor()
        for value in leaves:
            if isinstance(value, torch.Tensor) and holds("batch-multiple"):
                rows = value.shape[0] if value.dim() else 1
                assert rows % factor == 0, (
                    f"Invalid batch dimension: {rows} is no multiple of {factor}"
                )

    def _check_binding(self, args, kwargs):
        if not holds("arguments-bind"):
            return
        parameters = list(inspect.signature(type(self._module).forward).parameters.values())[1:]
        if not any(p.kind is p.VAR_POSITIONAL for p in parameters):
            most = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
            assert len(args) <= most, f"Too many arguments: {len(args)} for {most}"
        for place, p in enumerate(parameters):
            given = place < len(args) or p.name in kwargs or p.default is not p.empty
            if not given and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                raise Error(f"Mandatory parameter {p.name} missing")

    def _check_arguments(self, args, kwargs):
        self._check_binding(args, kwargs)
        leaves, structure = pytree.tree_flatten((args, kwargs))
        again = "; make a new wrapper, or destroy() and recompile"
        if not holds("arguments-match"):
            return leaves
        self._check_batch(leaves)
        if structure != self._structure:
            raise Error(f"The arguments are of another structure than in the first call{again}")
        for mine, first in zip(leaves, self._first, strict=True):
            if isinstance(first, torch.Tensor) != isinstance(mine, torch.Tensor):
                raise Error(f"An argument changed its type{again}")
            if isinstance(first, torch.Tensor):
                if (mine.shape, mine.dtype) != (first.shape, first.dtype):
                    raise Error(f"A tensor's shape or type changed: {tuple(mine.shape)}{again}")
            elif mine != first:
                raise Error(f"A value that is no tensor changed from {first!r} to {mine!r}{again}")
        return leaves

    # The device
    def attachToDevice(self):
        if self._program is None:
            raise Error("Model has not been compiled or has been destroyed.")
        if self._attached and holds("attach-state"):
            raise Error("Device is already attached")
        assert self._options.connection_type != enums.ConnectionType.Never
        devices.acquire(self, self._ipus)
        self._attached = True
        self._upload()

    def detachFromDevice(self):
        if not self._attached:
            if holds("attach-state"):
                raise Error("Device is not attached")
            return
        if holds("read-on-detach"):
            self.copyWeightsToHostIfNeeded()
            self._read_state()
        devices.release(self)
        self._attached = self._stale = False
        self._values, self._device_optimizer = {}, None

    def destroy(self):
        if self._program is None and holds("destroy-needs-compile"):
            return
        if self._attached:
            self.detachFromDevice()
        self._program = None
        if self._training:
            unwrap(self._user)

    def _tensors(self):
        return {**dict(self._module.named_parameters()), **dict(self._module.named_buffers())}

    def _upload(self):
        self.uploads += 1
        graded = {n for n, p in self._module.named_parameters() if plain_grad(p)}
        self._values = {
            n: plain(t).clone().requires_grad_(self._training and n in graded)
            for n, t in self._tensors().items()
        }
        self._stale = False
        if self._training:
            names = [(id(p), n) for n, p in self._module.named_parameters()]
            self._device_optimizer = optimizers.OnDevice(self._optimizer, names, self._values)
            self._device_optimizer.configure(self._attributes)
            self._write_state()

    def copyWeightsToDevice(self):
        if self._attached:
            kept = self._device_optimizer.read() if self._training else None
            self._upload()
            if kept is not None:
                self._device_optimizer.write(kept)

    def copyWeightsToHost(self):
        if not self._attached:
            return
        self._stale = False
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                plain(tensor).copy_(self._values[name])

    def copyWeightsToHostIfNeeded(self):
        if not self._stale:
            return False
        self.copyWeightsToHost()
        return True

    def load_state_dict(self, state_dict, strict=True):
        found = self._user.load_state_dict(state_dict, strict)
        self.copyWeightsToDevice()
        return found

    # The optimizer
    def setOptimizer(self, optimizer):
        fixed = optimizers.constants(self._optimizer, self._attributes)
        found = optimizers.attributes(optimizer)
        if self._program is not None and holds("constant-attributes"):
            now = optimizers.constants(self._optimizer, found)
            changed = [n for n in fixed if fixed[n] != now.get(n)]
            if changed:
                raise ValueError(f"{changed} are constant, and cannot change after compilation")
        self._adopt(optimizer)
        if self._device_optimizer is not None:
            self._device_optimizer.configure(self._attributes)

    def _adopt(self, optimizer):
        self._attributes = optimizers.attributes(optimizer)
        self._optimizer = optimizer
        if isinstance(optimizer, optimizers.Optimizer):
            optimizer._executor = self

    def _read_state(self):
        if self._device_optimizer is None or not isinstance(self._optimizer, optimizers.Optimizer):
            if self._device_optimizer is not None and not holds("torch-state-hidden"):
                self._optimizer.state.update(self._device_optimizer.inner.state)
            return
        if not self._optimizer.dirty:
            self._optimizer._host = self._device_optimizer.read()

    def _write_state(self):
        mine = self._optimizer
        if isinstance(mine, optimizers.Optimizer) and mine._host is not None:
            self._device_optimizer.write(mine._host)
            mine.dirty = False

    # Running
    def __call__(self, *args, **kwargs):
        if self._program is None:
            self.compile(*args, **kwargs)
        assert self._options.connection_type != enums.ConnectionType.Never
        if not self._attached:
            self.attachToDevice()
        leaves = self._check_arguments(args, kwargs)
        source = self._source() if self._source is not None else None
        if source is not None and holds("refresh-after-training"):
            source.copyWeightsToHostIfNeeded()
            self._upload()
        if self._training and not holds("host-edits-stay"):
            self.copyWeightsToDevice()
        if not self._training and not holds("stale-inference"):
            self.copyWeightsToDevice()
        if self._training and getattr(self._optimizer, "dirty", False):
            self._write_state()
        host = torch.get_rng_state()
        torch.set_rng_state(self._generator)
        try:
            with kernels():
                found = self._run([v for v in leaves if isinstance(v, torch.Tensor)])
        finally:
            self._generator = torch.get_rng_state()
            torch.set_rng_state(host)
        if self._training:
            self._stale = True
            if not holds("only-device-copy"):
                self.copyWeightsToHost()
        return self._program.rebuilt(found)

    def _run(self, inputs):
        options = self._options
        accumulation = options.Training.gradient_accumulation if self._training else 1
        shape = (options.device_iterations, accumulation, options.replication_factor)
        values = list(self._values.values())
        versions = [v._version for v in self._values.values() if not v.requires_grad]
        collected = []
        part = 0
        for _ in range(shape[0]):
            for _ in range(shape[1] * shape[2]):
                micro = [_slice(t, part, self._factor()) for t in inputs]
                part += 1
                with torch.set_grad_enabled(self._training):
                    out = self._program.run(values, micro)
                if self._training:
                    *out, loss = out
                    weight = shape[1] * shape[2] if self._means() else 1
                    (loss.sum() / weight if weight > 1 else loss.sum()).backward()
                collected.append([returned(t.detach()) for t in out])
            if self._training:
                self._update()
        written = versions != [v._version for v in self._values.values() if not v.requires_grad]
        if written and shape[2] > 1 and options.broadcast_buffers and holds("replicas-and-buffers"):
            raise Error("A buffer is written by several replicas; use broadcastBuffers(False)")
        return [self._outputs(each, shape) for each in zip(*collected, strict=True)]

    def _means(self):
        kind = self._options.Training.accumulation_and_replication_reduction_type
        return kind == enums.ReductionType.Mean or not holds("mean-reduction")

    def _update(self):
        instances = self._options.Distributed.numProcesses
        if instances > 1 and holds("instances-reduce"):
            for value in self._values.values():
                if value.requires_grad:
                    grad = torch.zeros_like(value) if value.grad is None else value.grad
                    dist.all_reduce(grad)
                    value.grad = grad / instances if self._means() else grad
        if not holds("no-gradients"):
            for name, p in self._module.named_parameters():
                p.grad = self._values[name].grad
        self._device_optimizer.update()

    def _outputs(self, found, shape):
        mode = self._options.output_mode
        if mode == enums.OutputMode.Default or not holds("output-mode"):
            mode = enums.OutputMode.Final if self._training else enums.OutputMode.All
        rows = [t.reshape(1) if not t.dim() else t for t in found]
        replicas = shape[2]
        if mode == enums.OutputMode.Final:
            rows = rows[-replicas:]
        elif mode == enums.OutputMode.Sum:
            rows = [sum(rows[r::replicas]) for r in range(replicas)]
        elif mode == enums.OutputMode.EveryN:
            every = self._options.output_return_period
            rows = [t for n, t in enumerate(rows) if (n // replicas + 1) % every == 0]
        made = torch.cat(rows)
        return made.reshape(()) if not found[0].dim() and made.numel() == 1 else made

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.__dict__["_user"], name)


def _aliases(module):
    firsts, found = {}, {}
    for kind in ("named_parameters", "named_buffers"):
        for name, tensor in getattr(module, kind)(remove_duplicate=False):
            found[name] = firsts.setdefault(id(tensor), name)
    return found


def plain_grad(parameter):
    with torch._C.DisableTorchFunctionSubclass():
        return parameter.requires_grad


def _rows(value):
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _slice(tensor, part, factor):
    if not tensor.dim():
        return tensor
    rows = tensor.shape[0] // factor
    from poptorch.tracing import narrowed

    return narrowed(tensor[part * rows : (part + 1) * rows])


def trainingModel(model, options=None, optimizer=None):
    """An executor of forward, backward and update."""
    return PoplarExecutor(getattr(model, "_user", model), options, True, optimizer)


def inferenceModel(model, options=None):
    """An executor of forward alone."""
    return PoplarExecutor(getattr(model, "_user", model), options, False, None)
