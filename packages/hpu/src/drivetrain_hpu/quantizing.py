"""Inference in float8 with Intel Neural Compressor. Training in float8 is ``precision="fp8"``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import UnavailableError

from drivetrain_hpu.bridge import FAILURES, core, described, load_bridge

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

_PACKAGE = "neural_compressor.torch.quantization"
#: Names of the same setter in newer and older releases, newest first.
_SETTERS = ("hpu_inference_set_env", "hpu_set_inference_env", "hpu_set_env")
_STARTERS = ("hpu_inference_initialize", "hpu_initialize")


def quantized(module: nn.Module, config: str | Mapping[str, Any]) -> nn.Module:
    """The module for inference in float8, or for measuring what that needs. It cannot be trained.

    Two runs make a quantized model: one measures (``"mode": "MEASURE"``) and ends with
    ``finish_measuring``; one quantizes by what was measured. Use what this returns: the module that
    was given may not be the one that was converted.

    Args:
        module: On the host, with its weights loaded.
        config: The path of a JSON file, or its content. Neither is changed.

    Raises:
        UnavailableError: The bridge or Neural Compressor does not import.
    """
    import torch

    load_bridge()
    package = _compressor()
    made = package.FP8Config
    settings = (
        made.from_json_file(config) if isinstance(config, str) else made.from_dict(dict(config))
    )
    habana = core()
    set_environment = _first(habana, _SETTERS)
    module = set_environment(module) or module
    turned = package.prepare if settings.measure else package.convert
    result: nn.Module = turned(module, settings)
    result = result.to(torch.device("hpu", 0))
    _first(habana, _STARTERS)(result, mark_only_scales_as_const=True)
    return result.eval()


def finish_measuring(module: nn.Module) -> None:
    """Write what was measured. Raises ``UnavailableError`` without Neural Compressor."""
    _compressor().finalize_calibration(module)


def _first(holder: Any, names: tuple[str, ...]) -> Any:
    found = next((getattr(holder, name) for name in names if hasattr(holder, name)), None)
    if found is None:
        raise UnavailableError(
            f"The Gaudi bridge was asked for {' or '.join(names)}, and it has none of them.",
            "Use a release of the Gaudi software from 1.16 to 1.24.",
        )
    return found


def _compressor() -> Any:
    try:
        return import_module(_PACKAGE)
    except FAILURES as error:
        raise UnavailableError(
            f"{_PACKAGE} was to be imported, and {described(error)}.",
            "Install neural-compressor-pt in the version for this Gaudi software.",
        ) from error
