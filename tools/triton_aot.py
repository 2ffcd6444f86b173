"""Compiles every Triton kernel for every architecture, without a device, and reports registers and spills.

    python tools/triton_aot.py [--json FILE] [--arch 80 90] [--dtype fp32] [--jobs 2] [case ...]

The families of fusednn.triton_kernels list calls in their AOT_CASES. Each call is made on tensors without
memory, with a driver that names the architecture and launches nothing, so that a kernel is compiled for just
what its launcher passes. Exits with 1 if a kernel fails to compile or uses local memory, which these kernels
only do by spilling.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = (80, 90, 100, 120)
DTYPES = {
    "fp32": torch.float32,
    "fp64": torch.float64,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
WARP_SIZE = 32


@dataclass(frozen=True)
class Job:
    """One case of one module, compiled for one dtype and architecture; `options` go to Triton."""

    module: str
    case: str
    dtype: str
    arch: int
    options: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Result:
    """What came out of one kernel of a job; `error` is empty if all compiled."""

    kernel: str
    case: str
    dtype: str
    arch: int
    registers: int = 0
    stack_bytes: int = 0
    local_bytes: int = 0
    shared_bytes: int = 0
    error: str = ""

    @property
    def ok(self) -> bool:
        """Compiled, and without local memory."""
        return not self.error and self.stack_bytes == 0 and self.local_bytes == 0


def parse_resource_usage(text: str) -> dict[str, int]:
    """Numbers of the one kernel in the output of `cuobjdump --dump-resource-usage`."""
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    missing = {"REG", "STACK", "SHARED", "LOCAL"} - numbers.keys()
    if missing:
        raise ValueError(f"cuobjdump: got {text!r}, expected numbers for {sorted(missing)}")
    return numbers


def uses_stack(sass: str) -> bool:
    """Whether code loads or stores local memory: ptxas also reserves a few bytes that nothing touches."""
    return re.search(r"\b(?:LDL|STL)\b", sass) is not None


def _resource_usage(cubin: bytes) -> dict[str, int]:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        usage = parse_resource_usage(text)
        if usage["STACK"]:
            command = [knobs.nvidia.cuobjdump.path, "-sass", str(path)]
            code = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            if not uses_stack(code):
                usage["STACK"] = 0
    return usage


class _NoDevice:
    """What Triton asks of a driver before it launches; the device's number is the architecture."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, WARP_SIZE)


@contextlib.contextmanager
def without_device(arch: int, run: Callable[..., object]) -> Iterator[None]:
    """Every launch calls `run` with the kernel and what it was launched with."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(_NoDevice(arch))
    with mock.patch.object(JITFunction, "run", run):
        yield


def case_of(job: Job):
    """The case that a job names."""
    cases = importlib.import_module(job.module).AOT_CASES
    return next(case for case in cases if case.name == job.case)


def _compiled(job: Job) -> dict[str, bytes]:
    """The kernels that a case launches, by name; a second variant of a kernel has a number."""
    from triton.runtime.jit import JITFunction

    found: dict[str, bytes] = {}
    compile_for = JITFunction.run

    def run(kernel, *args, grid, warmup, **given):
        options = given | dict(job.options)
        cubin = compile_for(kernel, *args, grid=grid, warmup=True, **options).asm["cubin"]
        if cubin not in found.values():
            name = kernel.fn.__name__.removesuffix("_kernel")
            found[name if name not in found else f"{name} {len(found)}"] = cubin

    with without_device(job.arch, run):
        case_of(job).call(DTYPES[job.dtype])
    if not found:
        raise ValueError(f"{job.case}: got a call that launches nothing, expected a kernel")
    return found


def compile_case(job: Job) -> list[Result]:
    """Compiles one job's kernels in this process; failures are in the results."""
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted functions can't be compiled
    where = (job.case, job.dtype, job.arch)
    try:
        usages = {name: _resource_usage(cubin) for name, cubin in _compiled(job).items()}
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # the outer ones repeat the kernel's source
            cause = cause.__cause__
        return [Result("", *where, error=f"{type(cause).__name__}: {cause}")]
    return [
        Result(name, *where, usage["REG"], usage["STACK"], usage["LOCAL"], usage["SHARED"])
        for name, usage in usages.items()
    ]


def jobs_of(
    package: str, architectures: Iterable[int], dtypes: Iterable[str], cases: Iterable[str]
) -> list[Job]:
    """Every registered combination; `dtypes` and `cases` narrow it down unless empty."""
    dtypes, cases = set(dtypes) or set(DTYPES), set(cases)
    found = []
    for info in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        for case in getattr(importlib.import_module(info.name), "AOT_CASES", ()):
            if cases and case.name not in cases:
                continue
            names = [name for name, dtype in DTYPES.items() if name in dtypes and dtype in case.dtypes]
            found += [Job(info.name, case.name, name, arch) for name in names for arch in architectures]
    return found


def run(jobs: list[Job], workers: int) -> list[Result]:
    """Compiles the jobs in `workers` processes."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return [result for found in pool.map(compile_case, jobs) for result in found]


def table(results: list[Result]) -> str:
    """One line for each kernel, case and dtype: registers, marked if local memory is used or it failed."""
    architectures = sorted({r.arch for r in results})
    rows: dict[str, dict[int, str]] = {}
    for r in results:
        spilled = "" if r.ok else f" +{r.stack_bytes + r.local_bytes} B local"
        cells = rows.setdefault(f"{r.case} {r.dtype} {r.kernel}", {})
        cells[r.arch] = "FAILED" if r.error else f"{r.registers}{spilled}"
    lines = [f"{'registers':<64}" + "".join(f"{f'sm_{arch}':>16}" for arch in architectures)]
    lines += [
        f"{name:<64}" + "".join(f"{cells.get(arch, ''):>16}" for arch in architectures)
        for name, cells in rows.items()
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", help="names from AOT_CASES; all by default")
    parser.add_argument("--arch", nargs="*", type=int, default=list(ARCHITECTURES))
    parser.add_argument("--dtype", nargs="*", default=[])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args(argv)

    os.environ.pop("TRITON_INTERPRET", None)
    jobs = jobs_of("fusednn.triton_kernels", arguments.arch, arguments.dtype, arguments.cases)
    if not jobs:
        parser.error("nothing to compile")
    results = run(jobs, arguments.jobs)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps([asdict(r) | {"ok": r.ok} for r in results], indent=1) + "\n")
    print(table(results))
    bad = [r for r in results if not r.ok]
    for r in bad:
        reason = r.error or f"{r.stack_bytes + r.local_bytes} bytes of local memory"
        print(f"{r.case} {r.dtype} {r.kernel} sm_{r.arch}: {reason}", file=sys.stderr)
    print(f"{len(results) - len(bad)} of {len(results)} compiled without local memory")
    return 1 if bad else 0


sys.path.insert(0, str(ROOT))  # also in the worker processes, which import this file again

if __name__ == "__main__":
    sys.exit(main())
