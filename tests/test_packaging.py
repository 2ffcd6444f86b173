"""What a wheel and a source distribution hold, and how an install without the native extension behaves."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("csrc", "python", "tools", "triton_kernels", "CHANGELOG.md", "CMakeLists.txt", "LICENSE")
SOURCES += ("MANIFEST.in", "README.md", "pyproject.toml", "setup.py")
# An editable install of another checkout would stand in for what the unpacked wheel lacks.
ALONE = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in f.__module__]\n"
NO_COPIES = shutil.ignore_patterns("*.so", "_build_info.json", "*.egg-info", "__pycache__")

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def wheel_of(source: Path, out: Path, **environment: str) -> Path:
    pip = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index")
    run(*pip, "-w", out, source, cwd=out.parent, **environment)
    (wheel,) = out.glob("*.whl")
    return wheel


def copy_of_sources(target: Path) -> Path:
    target.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=NO_COPIES)
        elif source.exists():
            shutil.copyfile(source, target / name)
    return target


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A checkout with leftovers, none of which belongs in a distribution."""
    copy = copy_of_sources(tmp_path_factory.mktemp("packaging") / "checkout")
    (copy / "python/fusednn/_C.cpython-00.so").write_text("left by a build in place")
    (copy / "python/fusednn/_build_info.json").write_text("{}")
    stale = copy / "build/lib/fusednn/removed_long_ago.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    return copy


@pytest.fixture(scope="module")
def sdist(source) -> Path:
    """The unpacked source distribution."""
    out = source.parent / "sdist"
    run(sys.executable, "setup.py", "-q", "sdist", "-d", out, cwd=source, FUSEDNN_NATIVE="0")
    (archive,) = out.glob("*.tar.gz")
    shutil.unpack_archive(archive, out, filter="data")
    (folder,) = [path for path in out.iterdir() if path.is_dir()]
    return folder


@pytest.fixture(scope="module")
def pure_wheel(sdist) -> Path:
    """A pure-Python wheel, made from the source distribution alone."""
    return wheel_of(sdist, sdist.parent / "pure", FUSEDNN_NATIVE="0")


@pytest.fixture(scope="module")
def installed(pure_wheel) -> Path:
    """The pure wheel, unpacked where it can be imported from."""
    target = pure_wheel.parent / "site"
    with zipfile.ZipFile(pure_wheel) as archive:
        archive.extractall(target)
    return target


def files_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def python_files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.py")}


def test_sdist_holds_what_a_build_needs(sdist):
    for name in ("csrc", "triton_kernels"):
        files = [p for p in (ROOT / name).rglob("*") if p.is_file() and p.suffix != ".pyc"]
        wanted = {p.relative_to(ROOT) for p in files}
        assert [path for path in sorted(wanted) if not (sdist / path).is_file()] == []
    for name in ("CMakeLists.txt", "LICENSE", "pyproject.toml", "setup.py", "tools/toolchain.py"):
        assert (sdist / name).is_file(), name
    assert (sdist / "python/fusednn/py.typed").is_file()


def test_sdist_holds_nothing_that_was_built(sdist):
    built = [p for pattern in ("*.so", "_build_info.json", "*.pyc", "*.o") for p in sdist.rglob(pattern)]
    assert built == []


def test_wheel_of_the_sdist_holds_the_packages(pure_wheel):
    files = files_of(pure_wheel)
    wanted = {f"fusednn/{name}" for name in python_files(ROOT / "python/fusednn")}
    wanted |= {f"fusednn/triton_kernels/{name}" for name in python_files(ROOT / "triton_kernels")}
    package = {name for name in files if ".dist-info/" not in name}
    assert package == wanted | {"fusednn/py.typed"}
    assert pure_wheel.name.endswith("-py3-none-any.whl")


def test_wheel_takes_no_name_but_its_own(pure_wheel):
    top = {name.split("/")[0] for name in files_of(pure_wheel)}
    assert {name for name in top if not name.endswith(".dist-info")} == {"fusednn"}


def test_metadata(pure_wheel):
    with zipfile.ZipFile(pure_wheel) as archive:
        names = archive.namelist()
        (path,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        metadata = archive.read(path).decode()
    assert re.search(r"^License(-Expression)?: Apache-2.0$", metadata, re.MULTILINE)
    assert any(name.endswith("LICENSE") for name in names)
    assert "\nRequires-Dist: torch>=2.11\n" in metadata
    assert "\nRequires-Python: >=3.10\n" in metadata


def test_stale_files_of_an_earlier_build_stay_out(source):
    wheel = wheel_of(source, source.parent / "from_checkout", FUSEDNN_NATIVE="0")
    files = files_of(wheel)
    assert "fusednn/removed_long_ago.py" not in files
    assert not any(name.endswith((".so", "_build_info.json")) for name in files)


def test_pure_install_computes_and_says_what_it_lacks(installed):
    code = (
        f"{ALONE}import torch, fusednn\n"
        "cell, theirs = fusednn.LSTMCell(3, 5), torch.nn.LSTMCell(3, 5)\n"
        "cell.load_state_dict(theirs.state_dict())\n"
        "x = torch.randn(4, 3)\n"
        "torch.testing.assert_close(cell(x), theirs(x))\n"
        "print(fusednn.__file__)\n"
    )
    said = run(sys.executable, "-W", "ignore", "-c", code, cwd=installed, PYTHONPATH=str(installed))
    assert str(installed) in said
    assert "was not built" in said
    assert said.count("To build it") == 1


def test_without_tools_the_build_is_pure_and_says_so(source):
    out = run(sys.executable, "setup.py", "--version", cwd=source, CXX="no-such-compiler", FUSEDNN_NATIVE="")
    assert "pure Python, without the compiled kernels" in out
    assert "no-such-compiler" in out


def test_native_asked_for_by_name_is_an_error_without_tools(source):
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=source,
        env={**os.environ, "FUSEDNN_NATIVE": "1", "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "FUSEDNN_NATIVE=1, but the extension can't be built" in done.stderr


def test_without_torch_the_build_is_pure_and_says_so(source):
    code = (
        "import importlib.util, runpy, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n"
        "sys.argv = ['setup.py', '--version']\n"
        "runpy.run_path('setup.py')\n"
    )
    out = run(sys.executable, "-c", code, cwd=source, FUSEDNN_NATIVE="")
    assert "no torch in the build environment: install torch first, then use --no-build-isolation" in out


@pytest.mark.skipif(
    not list((ROOT / "python/fusednn").glob("_C*.so")), reason="nothing was built in place in this checkout"
)
def test_native_wheel_holds_the_extension_and_its_record(tmp_path):
    checkout = copy_of_sources(tmp_path / "checkout")
    # In place of compiling for minutes: the extension of this checkout, through setup.py's own last steps.
    patch = (
        "import shutil, subprocess, sys\n"
        "from pathlib import Path\n"
        f"built = next(Path({str(ROOT / 'python/fusednn')!r}).glob('_C*.so'))\n"
        "real = subprocess.run\n"
        "def run(command, **options):\n"
        "    if '-S' in command:\n"
        "        flags = dict(str(f).split('=', 1) for f in command if '=' in str(f))\n"
        "        run.output = flags['-DFUSEDNN_OUTPUT_DIR']\n"
        "    elif '--build' in command:\n"
        "        Path(run.output).mkdir(parents=True, exist_ok=True)\n"
        "        shutil.copy(built, run.output)\n"
        "    else:\n"
        "        return real(command, **options)\n"
        "subprocess.run = run\n"
        "import runpy\n"
        "sys.argv = ['setup.py', '-q', 'bdist_wheel', '-d', 'out']\n"
        "runpy.run_path('setup.py')\n"
    )
    run(sys.executable, "-c", patch, cwd=checkout, FUSEDNN_NATIVE="1", FUSEDNN_CUDA="0")
    (wheel,) = (checkout / "out").glob("*.whl")
    files = files_of(wheel)
    assert any(re.fullmatch(r"fusednn/_C\..*\.so", name) for name in files)
    assert "fusednn/_build_info.json" in files
    assert "none-any" not in wheel.name
    target = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    code = f"{ALONE}import fusednn.core.native as n; assert n.extension is not None; print(n.build_info())"
    said = run(sys.executable, "-c", code, cwd=target, PYTHONPATH=str(target))
    assert "'interface'" in said
