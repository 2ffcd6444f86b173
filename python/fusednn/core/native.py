"""Load the compiled extension ``fusednn._C``, or keep the reason why that was not possible.

The extension is tied to the torch it was built with, so the record written beside it at build time is read
before anything is loaded: a stale binary is refused with words rather than with a crash.
"""

from __future__ import annotations

import importlib
import json
import logging
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import settings

logger = logging.getLogger("fusednn")

# FUSEDNN_NATIVE=1: what the build lacks is then an error that names it.
_IN_PLACE = "-e " if (Path(__file__).parents[3] / "setup.py").is_file() else ""
REMEDY = f"FUSEDNN_NATIVE=1 pip install --no-build-isolation {_IN_PLACE}.  # in fusednn's source folder"


def _build_record() -> dict[str, Any] | None:
    path = Path(__file__).parents[1] / "_build_info.json"
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and "torch" in record else None


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _load() -> tuple[Any, str | None]:
    if not settings.native_enabled():
        return None, "FUSEDNN_NATIVE=0"
    record = _build_record()
    if record is None:
        return None, "the extension fusednn._C was not built"
    if _minor(str(record["torch"])) != _minor(torch.__version__):
        return (
            None,
            f"fusednn._C was built for torch {record['torch']}, and this is torch {torch.__version__}",
        )
    try:
        return importlib.import_module("fusednn._C"), None
    except ImportError as error:
        return None, f"fusednn._C can't be loaded: {error}"


def _warn() -> None:
    logger.warning("%s; layers run on plain PyTorch. To build it: %s", unavailable_reason, REMEDY)


extension, unavailable_reason = _load()

if extension is None and settings.native_enabled():
    _warn()


def compare(op: str, arguments: tuple[str, ...]) -> None:
    """Refuse an extension with a kernel that takes other arguments than the op of its name: it is stale."""
    global extension, unavailable_reason
    if extension is None:
        return
    for module in (extension.cpu, getattr(extension, "cuda", extension.cpu)):
        taken = tuple(getattr(module, "signatures", {op: ()}).get(op, arguments))
        if taken != arguments:
            extension = None
            unavailable_reason = f"fusednn._C is stale: {op}: got arguments {taken}, expected {arguments}"
            cuda_modules.clear()
            _warn()
            return


def build_info() -> dict[str, Any]:
    """What the extension was built with; empty if there is none."""
    return (_build_record() or {}) if extension is not None else {}


def _apply_settings() -> None:
    """Hand the extension what the environment asks of it."""
    if extension is None:
        return
    cap = settings.cpu_isa()
    if cap is not None:
        try:
            extension.cpu.set_isa(cap)
        except ValueError as error:
            logger.warning("FUSEDNN_CPU_ISA is ignored: %s", error)


_apply_settings()

# Modules with the CUDA launchers by the device type that they serve. Tests add the emulated ones for "cpu".
cuda_modules: dict[str, ModuleType] = {}

if extension is not None and hasattr(extension, "cuda"):
    cuda_modules["cuda"] = extension.cuda
