"""Records the loss curves of the reference models.

Run it with ``python -m drivetrain_conformance.reference_record``. They are computed in float64 on
the host, by torch alone. With ``--check`` nothing is written, and the exit code says whether the
recordings still hold.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from drivetrain_conformance.reference import as_double
from drivetrain_conformance.reference_models import MODELS, ReferenceModel, cross_entropy

RECORDINGS = Path(__file__).with_name("reference_curves.json")
#: What another version of torch may differ by, in float64.
NOISE = 1e-9


def record(model: ReferenceModel) -> dict[str, Any]:
    """The losses of all updates, and that of an evaluation after them."""
    module = model.make(0.0).double()
    optimizers = model.optimizers(module)
    losses = []
    for (batch,) in model.windows():
        loss = cross_entropy(module, as_double(batch))
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    module.eval()
    with torch.no_grad():
        evaluation = float(cross_entropy(module, as_double(model.batches[0])))
    return {"losses": losses, "evaluation": evaluation}


def recordings() -> dict[str, Any]:
    """What was recorded, by the name of the model."""
    models: dict[str, Any] = json.loads(RECORDINGS.read_text(encoding="utf-8"))["models"]
    return models


def differing(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Names of the models whose curves differ by more than noise."""
    names = sorted(set(found) | set(wanted))
    return [name for name in names if not _close(found.get(name), wanted.get(name))]


def _close(found: dict[str, Any] | None, wanted: dict[str, Any] | None) -> bool:
    if found is None or wanted is None:
        return False
    pairs = [*zip(found["losses"], wanted["losses"], strict=True)]
    pairs.append((found["evaluation"], wanted["evaluation"]))
    return all(abs(a - b) <= NOISE * max(abs(b), 1.0) for a, b in pairs)


def main(arguments: list[str]) -> int:
    """Record, or check what was recorded."""
    models = {name: record(model) for name, model in MODELS.items()}
    if "--check" in arguments:
        wrong = differing(models, recordings())
        print("differing:", ", ".join(wrong) or "none")  # noqa: T201 - a command
        return 1 if wrong else 0
    content = {"format": "float64 on the host", "torch": torch.__version__, "models": models}
    RECORDINGS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {RECORDINGS}")  # noqa: T201 - a command
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
