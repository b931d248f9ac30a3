"""Options of one instance among several."""

import poptorch
from poptorch.rules import holds

import popdist


def _refuse(name):
    if holds("popdist-refusals"):
        raise RuntimeError(f"Cannot call `{name}` with popdist.poptorch.Options")


class _Distributed:
    def __init__(self, inner):
        self._inner = inner

    processId = property(lambda self: self._inner.processId)
    numProcesses = property(lambda self: self._inner.numProcesses)

    def configureProcessId(self, process_id, num_processes):
        _refuse("Distributed.configureProcessId")

    def disable(self):
        _refuse("Distributed.disable")

    def setEnvVarNames(self, var_num_processes, var_process_id):
        _refuse("Distributed.setEnvVarNames")


class Options(poptorch.Options):
    """As ``poptorch.Options``, with what poprun decided."""

    def __init__(self, ipus_per_replica=None):
        super().__init__()
        poptorch.Options.replicationFactor(self, popdist.getNumLocalReplicas())
        self._Distributed.configureProcessId(popdist.getInstanceIndex(), popdist.getNumInstances())

    @property
    def Distributed(self):
        return _Distributed(self._Distributed)

    def replicationFactor(self, replication_factor):
        _refuse("replicationFactor")
        return poptorch.Options.replicationFactor(self, replication_factor)

    def useIpuId(self, ipu_id):
        _refuse("useIpuId")
        return poptorch.Options.useIpuId(self, ipu_id)
