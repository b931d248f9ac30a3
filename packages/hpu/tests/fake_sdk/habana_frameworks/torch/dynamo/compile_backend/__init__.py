"""The compiler of the fake: options are checked, and the graph runs as it is."""

from __future__ import annotations

OPTIONS = {
    "use_eager_fallback", "keep_input_mutations", "use_graph_freezing", "inference",
    "force_static_compile",
}  # fmt: skip
#: How many graphs were compiled.
COMPILED: list[int] = []


def hpu_backend(graph, example_inputs, options=None):
    unknown = set(options or {}) - OPTIONS
    if unknown:
        raise RuntimeError(f"hpu_backend has no options {sorted(unknown)}")
    COMPILED.append(len(example_inputs))
    return graph.forward
