"""Blocks, stages and execution strategies, as far as they decide on IPUs and depths."""

from poptorch.enums import AutoStage
from poptorch.errors import Error

_NAMES = "_poptorch_blocks"


class Block:
    """A part of the model on one IPU."""

    def __init__(self, user_id=None, ipu_id=None):
        self.user_id, self.ipu_id = user_id, ipu_id

    def __enter__(self):
        note(self.user_id, self.ipu_id)
        return self

    def __exit__(self, *_):
        pass

    @staticmethod
    def useAutoId():
        """Number blocks by themselves."""

    @staticmethod
    def start(user_id=None, ipu_id=None):
        """Begin a block."""
        note(user_id, ipu_id)


class Stage:
    """Blocks that run together."""

    def __init__(self, *block_ids):
        self._blocks, self._ipu = list(block_ids), None

    def ipu(self, ipu):
        """On which IPU."""
        self._ipu = ipu
        return self

    @property
    def blocks(self):
        """Their names."""
        return self._blocks


class _Strategy:
    def __init__(self, *args):
        for value in args:
            if not isinstance(value, (AutoStage, Stage, str, Block)):
                raise Error(f"{value!r} is neither a stage, a block, nor an AutoStage")
        self.args = args


class PipelinedExecution(_Strategy):
    """All stages work at the same time."""


class ShardedExecution(_Strategy):
    """One stage after the other."""


def BeginBlock(layer_to_call, user_id=None, ipu_id=None):
    """Let a block begin where a layer is called."""
    if getattr(layer_to_call, _NAMES, None) is not None:
        raise Error("A block has already been assigned to this layer")
    handle = layer_to_call.register_forward_pre_hook(lambda *_: note(user_id, ipu_id))
    setattr(layer_to_call, _NAMES, handle)
    return layer_to_call


#: Of the trace that is going on: (name, IPU) in the order of their beginning.
current = None


def note(user_id, ipu_id):
    """A block begins."""
    if current is not None:
        current.append((user_id, ipu_id))


def removeBlocks(module):
    """Take all blocks away."""
    for layer in module.modules():
        handle = layer.__dict__.pop(_NAMES, None)
        if handle is not None:
            handle.remove()


def ipus_of(found):
    """How many IPUs a replica takes."""
    return 1 + max((ipu for _, ipu in found if ipu is not None), default=0)


def stages_of(found, strategy):
    """How many stages the forward pass has."""
    if strategy is not None and strategy.args and strategy.args[0] == AutoStage.AutoIncrement:
        return max(len(found), 1)
    merged = [ipu for n, (_, ipu) in enumerate(found) if not n or found[n - 1][1] != ipu]
    return max(len(merged), 1)
