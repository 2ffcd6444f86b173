"""Build fusednn: ask torch for its paths, run CMake, map the package folders.

Without torch, a compiler or ``FUSEDNN_NATIVE`` the package is pure Python and runs on its reference.
"""

from __future__ import annotations

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

ROOT = Path(__file__).resolve().parent
RECORD = "_build_info.json"  # read by fusednn._native before it loads the extension
PACKAGE_DIRS = {"fusednn": "python/fusednn", "fusednn.triton_kernels": "triton_kernels"}


def from_source(pattern: str, path: str) -> str:
    """Return what `pattern` finds in a source file: versions are written once."""
    return re.search(pattern, (ROOT / path).read_text())[1]


def packages() -> list[str]:
    """List fusednn and its subpackages."""
    source = ROOT / "python"
    found = [".".join(p.parent.relative_to(source).parts) for p in sorted(source.rglob("__init__.py"))]
    return [*found, "fusednn.triton_kernels"]


def native_extensions() -> list[Extension]:
    """Return the extension, or nothing, saying why, where it can't be built."""
    if os.environ.get("FUSEDNN_NATIVE", "1") == "0":
        return []
    try:
        import torch  # noqa: F401
    except ImportError:
        print(
            "fusednn: no torch in the build environment: building without the native extension; "
            "install torch first and use --no-build-isolation to have it",
            file=sys.stderr,
        )
        return []
    return [Extension("fusednn._C", sources=[])]


def wants_cuda(torch) -> bool:
    """Decide on the CUDA kernels: FUSEDNN_CUDA, else whether torch and nvcc allow them."""
    choice = os.environ.get("FUSEDNN_CUDA", "auto")
    possible = torch.version.cuda is not None and nvcc() is not None
    if choice == "1" and not possible:
        raise RuntimeError(
            f"FUSEDNN_CUDA=1: needs nvcc (found: {nvcc()}) and a CUDA torch ({torch.__version__})"
        )
    return possible if choice == "auto" else choice == "1"


def nvcc() -> str | None:
    """Find the CUDA compiler."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


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
        }
        if cuda:
            definitions["CMAKE_CUDA_COMPILER"] = nvcc()
            if archs := os.environ.get("FUSEDNN_CUDA_ARCHS"):
                definitions["FUSEDNN_CUDA_ARCHS"] = archs
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        flags = [f"-D{name}={value}" for name, value in definitions.items()]
        build.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cmake", "-S", ROOT, "-B", build, *generator, *flags], check=True)
        subprocess.run(["cmake", "--build", build, "--parallel", str(os.cpu_count() or 1)], check=True)
        record = {
            "torch": torch.__version__,
            "cuda": torch.version.cuda if cuda else None,
            "interface": int(from_source(r"INTERFACE_VERSION = (\d+)", "python/fusednn/_native.py")),
            "version": self.distribution.get_version(),
        }
        (output / RECORD).write_text(json.dumps(record, indent=2) + "\n")

    def copy_extensions_to_source(self) -> None:
        """Put the record beside the extension in an editable install too."""
        super().copy_extensions_to_source()
        if self.extensions:
            built = Path(self.build_lib).resolve() / "fusednn" / RECORD
            shutil.copyfile(built, ROOT / PACKAGE_DIRS["fusednn"] / RECORD)


setup(
    version=from_source(r'__version__ = "(.+)"', "python/fusednn/_version.py"),
    packages=packages(),
    package_dir=PACKAGE_DIRS,
    package_data={"fusednn": ["py.typed"]},
    ext_modules=native_extensions(),
    cmdclass={"build_ext": CMakeBuild},
    zip_safe=False,
)
