"""Find what a native build needs, and say what is missing. Used by setup.py and tools/setup_env.py."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

CMAKE_MINIMUM = (3, 22)  # as cmake_minimum_required in CMakeLists.txt
PROBE = "#include <bit>\n#include <concepts>\nstatic_assert(std::integral<int>);\nint main() {}\n"


def find_tool(name: str) -> str | None:
    """Return the path of a program: on PATH, beside this Python, or inside the package of that name."""
    folders = [sysconfig.get_path("scripts")]
    spec = importlib.util.find_spec(name)
    for location in (spec.submodule_search_locations or []) if spec else []:
        folders += [os.path.join(location, "data", "bin"), os.path.join(location, "bin")]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def nvcc() -> str | None:
    """Return the path of the CUDA compiler: on PATH, else under CUDA_HOME."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def compiler() -> str | None:
    """Return the C++ compiler that CMake would take."""
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


def against_cmake() -> list[str]:
    """Reasons why CMake can't serve; none: it can."""
    cmake = find_tool("cmake")
    if cmake is None:
        return ["CMake was not found: pip install cmake ninja"]
    said = subprocess.run([cmake, "--version"], capture_output=True, text=True).stdout
    version = re.search(r"(\d+)\.(\d+)", said)
    if version is None or tuple(map(int, version.groups())) < CMAKE_MINIMUM:
        wanted = ".".join(map(str, CMAKE_MINIMUM))
        return [
            f"got {said.splitlines()[0] if said else 'no version from CMake'}, expected {wanted} or newer"
        ]
    return []


def against_compiler() -> list[str]:
    """Reasons why the C++ compiler can't serve; none: it can."""
    cxx = compiler()
    if cxx is None:
        wanted = os.environ.get("CXX", "c++, g++ or clang++")
        return [f"no C++ compiler ({wanted}) was found: install GCC 11 or clang 14, or newer"]
    command = [cxx, "-std=c++20", "-fopenmp", "-fsyntax-only", "-x", "c++", "-"]
    probe = subprocess.run(command, input=PROBE, capture_output=True, text=True)
    if probe.returncode:
        name = Path(cxx).name
        said = (probe.stderr.strip().splitlines() or ["no message"])[0]
        return [f"{name} can't compile C++20 with OpenMP ({said}): install GCC 11 or clang 14, or newer"]
    return []
