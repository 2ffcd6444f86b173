"""Build fusednn: ask torch for its paths, run CMake, map the package folders.

``FUSEDNN_NATIVE=0`` asks for a pure-Python package, which runs on its reference. Without CMake or a C++20
compiler it becomes one too, and its version, which pip shows, ends in ``+pure.python``; ``FUSEDNN_NATIVE=1``
makes that an error. Without torch nothing is built: an isolated build can't see the one to compile for.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))
import toolchain  # noqa: E402

RECORD = "_build_info.json"  # read by fusednn.core.native before it loads the extension
PACKAGE_DIRS = {"fusednn": "python/fusednn", "fusednn.triton_kernels": "triton_kernels"}
# The commands that end in an installed package, as pip and people give them.
BUILDS = {"bdist_wheel", "build", "build_ext", "develop", "dist_info", "editable_wheel", "install"}
WITHOUT_TORCH = """\
fusednn: there is no torch in the build environment, and the kernels are compiled for one: yours.
pip builds in an environment of its own unless told otherwise. In yours, type

    pip install torch setuptools wheel cmake ninja
    pip install --no-build-isolation .

or, for a pure-Python package that runs on plain PyTorch, without compiled kernels:

    FUSEDNN_NATIVE=0 pip install .
"""


def from_source(pattern: str, path: str) -> str:
    """Return what `pattern` finds in a source file: versions are written once."""
    found = re.search(pattern, (ROOT / path).read_text())
    if found is None:
        raise RuntimeError(f"{path}: nothing matches {pattern}")
    return found[1]


def packages() -> list[str]:
    """List fusednn, its subpackages, and the Triton kernels'."""
    found = []
    for source, prefix in (("python", ()), ("triton_kernels", ("fusednn", "triton_kernels"))):
        for path in sorted((ROOT / source).rglob("__init__.py")):
            found.append(".".join((*prefix, *path.parent.relative_to(ROOT / source).parts)))
    return found


def native_or_pure() -> dict[str, object]:
    """Return what a package with the extension and one without it tell setup() differently."""
    version = from_source(r'__version__ = "(.+)"', "python/fusednn/_version.py")
    pure = {"version": version, "install_requires": [from_source(r'serves = "(torch.+?)"', "pyproject.toml")]}
    choice = os.environ.get("FUSEDNN_NATIVE")
    if choice == "0" or BUILDS.isdisjoint(sys.argv):  # a source distribution is the same wherever it is made
        return pure
    if importlib.util.find_spec("torch") is None:
        raise SystemExit(WITHOUT_TORCH)
    reasons = [*toolchain.against_cmake(), *toolchain.against_compiler()]
    if not reasons:
        torch = ".".join(importlib.metadata.version("torch").split(".")[:2])
        requires = [f"torch=={torch}.*"]  # the extension is loaded under no other minor version
        return {**pure, "install_requires": requires, "ext_modules": [Extension("fusednn._C", sources=[])]}
    listed = "".join(f"\n  - {reason}" for reason in reasons)
    if choice == "1":
        raise SystemExit(f"fusednn: FUSEDNN_NATIVE=1, but the extension can't be built:{listed}")
    print(f"fusednn: pure Python, without the compiled kernels:{listed}", file=sys.stderr)
    return {**pure, "version": f"{version}+pure.python"}


def wants_cuda(torch) -> bool:
    """Decide on the CUDA kernels: FUSEDNN_CUDA, else whether torch and nvcc allow them."""
    choice = os.environ.get("FUSEDNN_CUDA", "auto")
    found = toolchain.nvcc()
    possible = torch.version.cuda is not None and found is not None
    if choice == "1" and not possible:
        raise SystemExit(
            f"fusednn: FUSEDNN_CUDA=1 needs nvcc (found: {found}) and a CUDA torch ({torch.__version__})"
        )
    return possible if choice == "auto" else choice == "1"


def cuda_definitions(torch) -> dict[str, object]:
    """CMake definitions of a CUDA build; ``native`` is asked of torch, older CMakes don't know it."""
    archs = os.environ.get("FUSEDNN_CUDA_ARCHS")
    if archs == "native":
        if not torch.cuda.is_available():
            raise SystemExit("fusednn: FUSEDNN_CUDA_ARCHS=native, but torch sees no CUDA device")
        devices = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        archs = ";".join(f"{major}{minor}-real" for major, minor in sorted(devices))
    definitions: dict[str, object] = {"CMAKE_CUDA_COMPILER": toolchain.nvcc()}
    if archs:
        definitions["FUSEDNN_CUDA_ARCHS"] = archs
    return definitions


def configure(build: Path, definitions: dict[str, object]) -> None:
    """Run CMake's first half; a folder made with another generator starts afresh."""
    ninja = toolchain.find_tool("ninja")
    generator = "Ninja" if ninja else "Unix Makefiles"
    flags = [f"-D{name}={value}" for name, value in definitions.items()]
    if ninja:
        flags.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
    if "FUSEDNN_CUDA_ARCHS" not in definitions:
        flags.append("-UFUSEDNN_CUDA_ARCHS")  # the cache would keep an earlier choice
    cache = build / "CMakeCache.txt"
    if cache.exists() and f"CMAKE_GENERATOR:INTERNAL={generator}\n" not in cache.read_text():
        shutil.rmtree(build)
    build.mkdir(parents=True, exist_ok=True)
    cmake = toolchain.find_tool("cmake")
    subprocess.run([cmake, "-S", ROOT, "-B", build, "-G", generator, *flags], check=True)


class CMakeBuild(build_ext):
    """Run CMake and put the extension, with a record of what it was built for, where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        """Configure and build `_C`; a second run rebuilds only what changed."""
        import torch
        from torch.utils import cpp_extension

        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        cuda = wants_cuda(torch)
        test_modules = os.environ.get("FUSEDNN_TEST_MODULES", "0") == "1"
        definitions = {
            "FUSEDNN_PYTHON_INCLUDE_DIR": sysconfig.get_path("include"),
            "FUSEDNN_PYTHON_EXT_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            "FUSEDNN_TORCH_INCLUDE_DIRS": ";".join(cpp_extension.include_paths()),
            "FUSEDNN_TORCH_LIB_DIR": cpp_extension.TORCH_LIB_PATH,
            "FUSEDNN_TORCH_CXX11_ABI": int(torch.compiled_with_cxx11_abi()),
            "FUSEDNN_OUTPUT_DIR": output,
            "FUSEDNN_CUDA": "ON" if cuda else "OFF",
            "FUSEDNN_TEST_MODULES": "ON" if test_modules else "OFF",
            "FUSEDNN_TEST_MODULE_DIR": ROOT / "build" / "test_modules",
            **(cuda_definitions(torch) if cuda else {}),
        }
        configure(build, definitions)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run(
            [toolchain.find_tool("cmake"), "--build", build, "--parallel", jobs],
            check=True,
        )
        record = {
            "torch": torch.__version__,
            "cuda": torch.version.cuda if cuda else None,
            "version": self.distribution.get_version(),
        }
        (output / RECORD).write_text(json.dumps(record, indent=2) + "\n")

    def copy_extensions_to_source(self) -> None:
        """Put the record beside the extension in an editable install too."""
        super().copy_extensions_to_source()
        if self.extensions:
            built = Path(self.build_lib).resolve() / "fusednn" / RECORD
            shutil.copyfile(built, ROOT / PACKAGE_DIRS["fusednn"] / RECORD)


class FreshPython(build_py):
    """Copy the packages into an empty folder: what an earlier version left there is no part of this one."""

    def run(self) -> None:
        """Empty the folder, then copy."""
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "fusednn", ignore_errors=True)
        super().run()


setup(
    **native_or_pure(),
    license="Apache-2.0",
    packages=packages(),
    package_dir=PACKAGE_DIRS,
    package_data={"fusednn": ["py.typed"]},
    cmdclass={"build_ext": CMakeBuild, "build_py": FreshPython},
    zip_safe=False,
)
