"""A simulator of PopDist: what ``poprun`` put into the environment."""

import os


def isPopdistEnvSet():
    return "POPDIST_NUM_TOTAL_REPLICAS" in os.environ


def _number(name):
    return int(os.environ["POPDIST_" + name])


def init():
    pass


def getNumTotalReplicas():
    return _number("NUM_TOTAL_REPLICAS")


def getNumLocalReplicas():
    return _number("NUM_LOCAL_REPLICAS")


def getNumIpusPerReplica():
    return _number("NUM_IPUS_PER_REPLICA")


def getReplicaIndexOffset():
    return _number("REPLICA_INDEX_OFFSET")


def getInstanceIndex():
    return getReplicaIndexOffset() // getNumLocalReplicas()


def getNumInstances():
    return getNumTotalReplicas() // getNumLocalReplicas()


def getLocalInstanceIndex():
    return _number("LOCAL_INSTANCE_INDEX")


def getDeviceId(ipusPerReplica=0):
    return 0
