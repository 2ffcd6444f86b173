"""The machine and the software of a run, without host names, user names or paths."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

ISA_FLAGS = (
    "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_fp16",
    "amx_bf16", "amx_tile", "asimd", "sve", "sve2", "bf16",
)  # fmt: skip
PACKAGES = ("torch", "fusednn", "triton", "numpy", "onnxruntime", "openvino")
SETTINGS = ("FUSEDNN_BACKEND", "FUSEDNN_CPU_ISA", "FUSEDNN_NATIVE", "OMP_NUM_THREADS")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return a JSON-ready description of what the numbers were taken on."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "isa": isa_flags(),
        "memory_gib": memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
        "gpu": gpu(device),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "environment": {name: os.environ[name] for name in SETTINGS if name in os.environ},
        "commit": git_commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def machine_slug(machine: dict[str, Any]) -> str:
    """Return a folder name for the machine: the GPU, or the CPU with its cores and widest vectors."""
    if machine["gpu"]:
        name = machine["gpu"]["name"]
    else:
        widest = next((f for f in ("avx512f", "avx2", "sve", "asimd") if f in machine["isa"]), "")
        name = f"{machine['cpu']} {machine['cores']} cores {widest}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def without_paths(text: str) -> str:
    """Return the first line of `text` with every path cut down to its last part."""
    line = text.strip().splitlines()[0] if text.strip() else ""
    return re.sub(r"(?<!\w)(?:~|\.{1,2})?(?:/[^\s/'\":,;()]+)*/([^\s/'\":,;()]+)", r"\1", line)


def cpu_model() -> str:
    """Return the CPU's name as the system gives it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def isa_flags() -> list[str]:
    """Return which of `ISA_FLAGS` the CPU has; empty where the system doesn't tell."""
    present = set((_cpuinfo("flags") or _cpuinfo("Features")).split())
    return [flag for flag in ISA_FLAGS if flag in present]


def memory_gib() -> int | None:
    """Return the size of the memory, rounded to GiB."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (ValueError, OSError):
        return None


def gpu(device: torch.device) -> dict[str, Any] | None:
    """Return the GPU's name, memory, capability and driver; None for a run on the CPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30),
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    }


def version(package: str) -> str | None:
    """Return the installed version; for fusednn in a source checkout, its own."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pass
    if package == "fusednn":
        try:
            import fusednn
        except ModuleNotFoundError:
            return None
        return getattr(fusednn, "__version__", None)
    return None


def git_commit() -> str | None:
    """Return the short commit of this checkout, marked where files differ from it; None outside git."""
    root = str(Path(__file__).resolve().parent)
    commit = _run("git", "-C", root, "rev-parse", "--short=12", "HEAD")
    if commit is None:
        return None
    return commit + (
        " with local changes" if _run("git", "-C", root, "status", "--porcelain", "-uno") else ""
    )


def _cpuinfo(key: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    found = re.search(rf"^{re.escape(key)}\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else ""


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.strip().splitlines()), None)
