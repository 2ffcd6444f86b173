"""What this installation of fusednn can do here, and what would have to be added for more.

Nothing that it says names the machine, its user or a folder outside the package.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from typing import Any

import torch

from ._version import __version__
from .core import native, settings

_DISTRIBUTIONS = ("triton", "numpy", "onnxruntime", "openvino")
_PEERS = {"onnxruntime": "onnx onnxscript onnxruntime", "openvino": "openvino"}  # and what pip is to install


def collect() -> dict[str, Any]:
    """Return the facts as plain values, ready for JSON.

    Keys: ``versions``, ``native`` (``loaded``, ``reason``, ``build``), ``cpu``, ``devices``, ``backends``
    (name to ``available`` and ``reason``), ``variables``, ``missing`` (each ``what``, ``why``, ``command``).
    """
    return {
        "versions": _versions(),
        "native": {
            "loaded": native.extension is not None,
            "reason": _without_paths(native.unavailable_reason),
            "build": native.build_info(),
        },
        "cpu": _cpu(),
        "devices": _devices(),
        "backends": {name: {"available": not why, "reason": why} for name, why in _backends().items()},
        "variables": _variables(),
        "missing": _missing(),
    }


def report(facts: dict[str, Any]) -> str:
    """Lay the facts of :func:`collect` out as text."""
    native, missing = facts["native"], facts["missing"]
    devices = [f"  {d['name']}, sm_{d['capability']}, {d['memory_gib']} GiB" for d in facts["devices"]]
    backends = {name: b["reason"] or "available" for name, b in facts["backends"].items()}
    variables = {name: "unset" if value is None else value for name, value in facts["variables"].items()}
    sections = {
        "versions": _table(facts["versions"]),
        "extension": [
            f"  {'loaded' if native['loaded'] else 'not loaded: ' + str(native['reason'])}",
            *_table(native["build"]),
        ],
        "processor": _table(facts["cpu"]),
        "CUDA devices": devices or ["  none"],
        "backends": _table(backends),
        "variables": [f"  {name:<22} {value}" for name, value in variables.items()],
        "missing": [f"  {m['what']}: {m['why']}\n      {m['command']}" for m in missing] or ["  nothing"],
    }
    return "\n\n".join("\n".join([title, *lines]) for title, lines in sections.items())


def _table(values: dict[str, Any]) -> list[str]:
    return [f"  {name:<12} {value or '-'}" for name, value in values.items()]


def _versions() -> dict[str, str | None]:
    return {
        "fusednn": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{name: _version(name) for name in _DISTRIBUTIONS},
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    extension = native.extension
    return {
        "isa": extension.cpu.isa() if extension is not None else None,
        "best_isa": extension.cpu.best_isa() if extension is not None else None,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _devices() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {
            "name": p.name,
            "capability": f"{p.major}{p.minor}",
            "memory_gib": round(p.total_memory / 2**30, 1),
            "processors": p.multi_processor_count,
        }
        for p in found
    ]


def _backends() -> dict[str, str | None]:
    """Backend to the reason why it serves nothing here; None: it serves."""
    return {
        "reference": None,
        "cpu": _without_paths(native.unavailable_reason),
        "cuda": _against_cuda(),
        "triton": _against_triton(),
        "torch": None,
    }


def _against_cuda() -> str | None:
    if "cuda" not in native.cuda_modules:
        return "this build has no CUDA kernels"
    return None if torch.cuda.is_available() else "no CUDA device"


def _against_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "no CUDA device; TRITON_INTERPRET=1 runs the kernels, slowly, on the CPU"


def _variables() -> dict[str, str | None]:
    """Every variable that settings.py documents, and those of our prefix that it doesn't know."""
    known = re.findall(r"^\| ``(FUSEDNN_\w+)``", settings.__doc__ or "", re.MULTILINE)
    others = sorted(name for name in os.environ if name.startswith("FUSEDNN_") and name not in known)
    found = {name: _without_paths(os.environ.get(name)) for name in known}
    return {**found, **{f"{name} (unknown)": _without_paths(os.environ[name]) for name in others}}


def _missing() -> list[dict[str, str]]:
    found = []
    if native.extension is None:
        why = _without_paths(native.unavailable_reason) or "not built"
        command = "unset FUSEDNN_NATIVE" if not settings.native_enabled() else native.REMEDY
        found.append({"what": "extension", "why": why, "command": command})
    if torch.cuda.is_available() and "cuda" not in native.cuda_modules:
        command = f"FUSEDNN_CUDA=1 {native.REMEDY}"
        found.append({"what": "CUDA kernels", "why": "a device is here; needs nvcc", "command": command})
    if _version("triton") is None and sys.platform == "linux":
        why = "Triton kernels on a GPU, and their tests without one"
        found.append({"what": "triton", "why": why, "command": "pip install 'triton>=3.6'"})
    for name, packages in _PEERS.items():
        if _version(name) is None:
            why = "one more peer in the benchmarks"
            found.append({"what": name, "why": why, "command": f"pip install {packages}"})
    return found


def _without_paths(text: str | None) -> str | None:
    """Keep of every absolute path its part from ``fusednn`` on, or its last one."""

    def cut(path: re.Match[str]) -> str:
        _, package, rest = path[0].rpartition("/fusednn/")
        return f"fusednn/{rest}" if package else path[0].rstrip("/").rsplit("/", 1)[-1]

    return None if text is None else re.sub(r"(?<![\w:./])/[^\s:;,'\"]+", cut, text)
