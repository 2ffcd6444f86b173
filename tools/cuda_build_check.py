"""Compiles every CUDA file for every target, without a device, and reports registers, stack and spills.

    python tools/cuda_build_check.py [--json FILE] [--arch 80 90] [--jobs 2] [--no-bindings]

Kernels: csrc/*/cuda/*.cu by nvcc. Bindings: csrc/*/bindings/*.cpp that need CUDA headers, by the host
compiler against the installed torch, whose CPU build ships those headers too. Exits with 1 if anything fails
to compile or spills. What has not changed since it compiled without is not compiled again (tools/proofs.py).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from proofs import Proof, prerequisites, version

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
NVCC_FLAGS = ("-std=c++20", "-O3", "-Xptxas", "-v")
HOST_FLAGS = ("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Werror")


@dataclass(frozen=True)
class Kernel:
    """One entry function on one architecture, as ptxas saw it."""

    name: str
    arch: int
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int

    @property
    def spills(self) -> bool:
        """Whether values travel through local memory."""
        return self.spill_store_bytes > 0 or self.spill_load_bytes > 0


_ENTRY = re.compile(r"Compiling entry function '([^']+)' for 'sm_(\d+)\w*'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


def parse_ptxas(text: str) -> list[Kernel]:
    """Kernels in the output of `ptxas -v`.

    Raises ValueError if an entry function lacks its numbers, lest a changed format pass for no spills.
    """
    kernels = []
    # Functions that were not inlined report a frame too; they come after the numbers of their entry function.
    entries = list(_ENTRY.finditer(text))
    for entry, end in zip(entries, [e.start() for e in entries[1:]] + [len(text)]):
        section = text[entry.end() : end]
        frame, registers = _FRAME.search(section), _REGISTERS.search(section)
        if frame is None or registers is None:
            raise ValueError(f"ptxas: got no frame or registers for {entry[1]}, in {section!r}")
        frames = [tuple(map(int, found.groups())) for found in _FRAME.finditer(section)]
        stack, stores, loads = (max(column) for column in zip(*frames))
        kernels.append(Kernel(entry[1], int(entry[2]), int(registers[1]), stack, stores, loads))
    return kernels


def short_name(mangled: str) -> str:
    """`lstm_forward_kernel f 4` from the Itanium-mangled name of an instance of a kernel template."""
    for length in re.finditer(r"\d+", mangled):
        # The digits may begin in the hash of an anonymous namespace: try each end of them as the length.
        for start in range(length.start(), length.end()):
            end = length.end() + int(mangled[start : length.end()])
            name = mangled[length.end() : end]
            if name.endswith("_kernel"):
                found = re.match(r"I(?:\d+_*)?(\w*?)E+v", mangled[end:])
                return name + " " + re.sub(r"Li(\d+)E?", r" \1", found[1]) if found else name
    return mangled


def find_nvcc() -> str | None:
    """The nvcc of CUDA_HOME, of PATH, or of the usual folder."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [str(Path(home, "bin", "nvcc")) for home in homes if home]
    candidates += [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    return next((path for path in candidates if path and os.access(path, os.X_OK)), None)


def toolkit_of(nvcc: str) -> Path:
    """The toolkit's folder as nvcc itself sees it: the nvcc on PATH may be a wrapper elsewhere."""
    command = [nvcc, "--dryrun", "-x", "cu", "-c", "-o", os.devnull, os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"^#\$ TOP=(.+)$", done.stdout + done.stderr, re.MULTILINE)
    if found is None:
        raise ValueError(f"{nvcc} --dryrun: got no TOP= in {done.stderr!r}")
    return Path(found[1]).resolve()


@dataclass(frozen=True)
class Compilation:
    """One compiler call: what it said, and the kernels in it."""

    source: str
    target: str
    returncode: int
    output: str
    kernels: tuple[Kernel, ...] = ()


def name_of(source: Path) -> str:
    """A source's path below csrc: `rnn/cuda/forward.cu`."""
    return str(source.resolve().relative_to(CSRC)) if source.resolve().is_relative_to(CSRC) else source.name


def compile_kernels(nvcc: str, source: Path, arch: int, extra: tuple[str, ...] = ()) -> Compilation:
    """Compiles one .cu file for one architecture; for the newest, the host code and the PTX too."""
    if arch == ARCHITECTURES[-1]:
        target = (f"-gencode=arch=compute_{arch},code=[sm_{arch},compute_{arch}]", "-c")
    else:
        target = (f"-gencode=arch=compute_{arch},code=sm_{arch}", "-cubin")
    command = [nvcc, *NVCC_FLAGS, *extra, *target, f"-I{CSRC}", str(source)]
    return proved(command, name_of(source), f"sm_{arch}", version(nvcc) + version(host_compiler()))


def proved(command: list[str], source: str, target: str, versions: str) -> Compilation:
    """Runs a compiler, unless it is known what it would say; keeps what has no fault."""
    proof = Proof(*command, target, versions)
    known = proof.known()
    if known is not None:
        kernels = tuple(Kernel(**kernel) for kernel in known.pop("kernels"))
        return Compilation(**known, kernels=kernels)
    with tempfile.TemporaryDirectory() as folder:
        rule = Path(folder, "rule")
        done = subprocess.run(
            [*command, "-o", str(Path(folder, "out")), "-MD", "-MF", str(rule)],
            capture_output=True,
            text=True,
        )
        output = done.stdout + done.stderr
        kernels = tuple(parse_ptxas(output)) if done.returncode == 0 and target != "host" else ()
        compilation = Compilation(source, target, done.returncode, output, kernels)
        if not faults([compilation]):
            proof.keep(asdict(compilation), prerequisites(rule.read_text()))
    return compilation


def host_compiler() -> str:
    """The C++ compiler of the bindings."""
    return os.environ.get("CXX", "g++")


def binding_sources() -> list[Path]:
    """The bindings that only a CUDA build compiles."""
    return sorted(p for p in CSRC.glob("*/bindings/*.cpp") if "cuda" in p.stem)


def compile_binding(toolkit: Path, source: Path) -> Compilation:
    """Compiles one binding against the headers of the installed torch."""
    from torch.utils.cpp_extension import include_paths

    systems = [*include_paths(), sysconfig.get_paths()["include"], str(toolkit / "include")]
    command = [
        host_compiler(), *HOST_FLAGS, "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE",
        f"-I{CSRC}", *(f"-isystem{path}" for path in systems), "-c", str(source),
    ]  # fmt: skip
    return proved(command, name_of(source), "host", version(host_compiler()))


def run(nvcc: str, architectures: list[int], workers: int, bindings: bool) -> list[Compilation]:
    """Everything, `workers` compilers at a time; the slow bindings first."""
    toolkit = toolkit_of(nvcc)
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(compile_binding, toolkit, source) for source in binding_sources() if bindings]
        for source in sorted(CSRC.glob("*/cuda/*.cu")):
            futures += [pool.submit(compile_kernels, nvcc, source, arch) for arch in architectures]
        return [future.result() for future in futures]


def table(compilations: list[Compilation]) -> str:
    """One line for each kernel; a cell is registers, followed by stack and spills where there are any."""
    kernels = [kernel for c in compilations for kernel in c.kernels]
    architectures = sorted({kernel.arch for kernel in kernels})
    rows: dict[str, dict[int, str]] = {}
    for k in kernels:
        extra = f" +{k.stack_bytes} B stack" if k.stack_bytes else ""
        extra += f" {k.spill_store_bytes}/{k.spill_load_bytes} B SPILLED" if k.spills else ""
        rows.setdefault(short_name(k.name), {})[k.arch] = f"{k.registers}{extra}"
    width = max([len(name) for name in rows] + [10]) + 2
    lines = [f"{'registers':<{width}}" + "".join(f"{f'sm_{arch}':>8}" for arch in architectures)]
    for name, cells in sorted(rows.items()):
        lines.append(f"{name:<{width}}" + "".join(f"{cells.get(arch, ''):>8}" for arch in architectures))
    return "\n".join(lines)


def faults(compilations: list[Compilation]) -> list[str]:
    """What must not be: failures, files without kernels, spills."""
    found = []
    for c in compilations:
        if c.returncode != 0:
            found.append(f"{c.source} {c.target}: failed to compile\n{c.output}")
        elif c.target != "host" and not c.kernels:
            found.append(f"{c.source} {c.target}: no kernel in it")
        found += [
            f"{c.source} {c.target}: {short_name(k.name)} spills {k.spill_store_bytes} bytes out and "
            f"{k.spill_load_bytes} in"
            for k in c.kernels
            if k.spills
        ]
    return found


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="*", type=int, default=list(ARCHITECTURES))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="write the kernels here")
    parser.add_argument("--no-bindings", action="store_true", help="kernels only")
    arguments = parser.parse_args(argv)

    nvcc = find_nvcc()
    if nvcc is None:
        parser.error("nvcc was found neither in CUDA_HOME nor in PATH nor in /usr/local/cuda")
    compilations = run(nvcc, arguments.arch, arguments.jobs, not arguments.no_bindings)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        kernels = [asdict(k) | {"source": c.source} for c in compilations for k in c.kernels]
        arguments.json.write_text(json.dumps(kernels, indent=1) + "\n")
    print(table(compilations))
    found = faults(compilations)
    print("\n".join(found), file=sys.stderr, end="\n" if found else "")
    print(
        f"{len(compilations)} compilations, {sum(len(c.kernels) for c in compilations)} kernels, "
        f"{len(found)} faults"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
