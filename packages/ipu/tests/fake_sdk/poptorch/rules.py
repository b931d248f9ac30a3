"""Every rule of the simulator by name, so that tests can be tested without it."""

import os

RULES = frozenset(
    {
        "arguments-bind",
        "arguments-match",
        "attach-state",
        "batch-multiple",
        "buffers-not-reassigned",
        "compiled-once",
        "constant-attributes",
        "destroy-needs-compile",
        "exclusive-device",
        "frozen-options",
        "half-upcast",
        "host-edits-stay",
        "inference-no-accumulation",
        "instances-reduce",
        "keys-of-state",
        "loss-found",
        "maximize-ignored",
        "mean-reduction",
        "narrow-types",
        "no-gradients",
        "one-loss",
        "one-wrapper",
        "only-device-copy",
        "optimizer-types",
        "output-mode",
        "parameters-known",
        "pipeline-depth",
        "popdist-refusals",
        "power-of-two",
        "read-on-detach",
        "refresh-after-training",
        "replicas-and-buffers",
        "running-on-ipu",
        "stale-inference",
        "state-read-back",
        "torch-state-hidden",
        "traced-once",
    }
)
_OFF = os.environ.get("POPTORCH_SIMULATOR_WITHOUT", "")
if _OFF and _OFF not in RULES:
    raise ValueError(f"{_OFF!r} is no rule of the simulator")


def holds(rule):
    """Whether a rule is enforced."""
    assert rule in RULES, rule
    return rule != _OFF
