"""What a wheel and a source distribution hold, and how an install without the native extension behaves."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (".ci", "benchmarks", "csrc", "docs", "examples", "python", "tests", "tools", "triton_kernels")
FILES = (
    ".clang-format",
    "CHANGELOG.md",
    "CMakeLists.txt",
    "CONTRIBUTING.md",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
)
FILES += ("README.md", "pyproject.toml", "setup.py")
# An editable install of another checkout would stand in for what the unpacked wheel lacks.
ALONE = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in f.__module__]\n"
NO_COPIES = shutil.ignore_patterns("*.so", "_build_info.json", "*.egg-info", "__pycache__", "local", "out")
BUILT = list((ROOT / "python/fusednn").glob("_C*.so"))
# In place of compiling for minutes: the extension of this checkout, put where CMake is told to put it.
CMAKE = f"""#!{sys.executable}
import pathlib, shutil, sys
note = pathlib.Path(__file__).with_name("output")
if "--version" in sys.argv:
    print("cmake version 3.30.0")
elif "--build" in sys.argv:
    output = pathlib.Path(note.read_text())
    output.mkdir(parents=True, exist_ok=True)
    shutil.copy({str(BUILT[0] if BUILT else None)!r}, output)
else:
    note.write_text(next(a.split("=", 1)[1] for a in sys.argv if a.startswith("-DFUSEDNN_OUTPUT_DIR=")))
"""
needs_extension = pytest.mark.skipif(not BUILT, reason="nothing was built in place in this checkout")

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


def pip(command: str, *arguments: str | Path, cwd: Path, **environment: str) -> str:
    options = ("--no-build-isolation", "--no-deps", "--no-index")
    return run(sys.executable, "-m", "pip", command, *options, *arguments, cwd=cwd, **environment)


def wheel_of(source: Path, out: Path, **environment: str) -> Path:
    pip("wheel", "-w", out, source, cwd=out.parent, **environment)
    (wheel,) = out.glob("*.whl")
    return wheel


def metadata_of(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return archive.read(path).decode()


@pytest.fixture
def prebuilt(tmp_path) -> dict[str, str]:
    """The environment of a build whose CMake is the one above."""
    tool = tmp_path / "tools" / "cmake"
    tool.parent.mkdir()
    tool.write_text(CMAKE)
    tool.chmod(0o755)
    return {"PATH": f"{tool.parent}:{os.environ['PATH']}", "FUSEDNN_NATIVE": "1", "FUSEDNN_CUDA": "0"}


def copy_of_sources(target: Path) -> Path:
    target.mkdir()
    for name in FOLDERS:
        shutil.copytree(ROOT / name, target / name, ignore=NO_COPIES)
    for name in FILES:
        shutil.copyfile(ROOT / name, target / name)
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
    for name in FILES:
        assert (sdist / name).is_file(), name
    assert (sdist / "python/fusednn/py.typed").is_file()
    assert "\nRequires-Dist: torch>=2.11\n" in (sdist / "PKG-INFO").read_text()


@pytest.mark.parametrize("folder", [name for name in FOLDERS if name != "python"])
def test_sdist_holds_whole_folders(sdist, source, folder):
    """All tests, with their conftests and what they import, rather than half of them."""
    assert {p.relative_to(source) for p in (source / folder).rglob("*") if p.is_file()} == {
        p.relative_to(sdist) for p in (sdist / folder).rglob("*") if p.is_file()
    }


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
    metadata = metadata_of(pure_wheel)
    assert re.search(r"^License(-Expression)?: Apache-2.0$", metadata, re.MULTILINE)
    assert any(name.endswith("LICENSE") for name in files_of(pure_wheel))
    assert "\nRequires-Dist: torch>=2.11\n" in metadata
    assert "\nRequires-Python: >=3.10\n" in metadata
    assert "\nClassifier: Typing :: Typed\n" in metadata


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


@pytest.fixture(scope="module")
def user(tmp_path_factory) -> dict[str, str]:
    """An environment with pip, setuptools and what is installed with them, and without torch."""
    folder = tmp_path_factory.mktemp("user")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    site = folder / "site"
    site.mkdir()
    for name in ("pip", "setuptools", "pkg_resources", "_distutils_hack", "wheel", "packaging"):
        found = importlib.util.find_spec(name)
        if found is not None and found.origin is not None:
            package = Path(found.origin).parent
            for path in (package, *package.parent.glob(f"{name}-*.dist-info")):
                (site / path.name).symlink_to(path)
    return {"python": str(folder / "venv/bin/python"), "PYTHONPATH": str(site)}


def install(user: dict[str, str], source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Install as a user would, but from no index, and see what pip shows."""
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check")
    return subprocess.run(
        [user["python"], "-m", "pip", "install", *options, str(source)],
        env={**os.environ, "FUSEDNN_NATIVE": "", **environment, "PYTHONPATH": user["PYTHONPATH"]},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )


@pytest.mark.parametrize("choice", ["", "1"])
def test_without_torch_pip_fails_and_shows_what_to_type(user, source, choice):
    done = install(user, source, FUSEDNN_NATIVE=choice)
    assert done.returncode == 1
    assert "there is no torch in the build environment" in done.stdout
    assert "    pip install --no-build-isolation .\n" in done.stdout
    assert "FUSEDNN_NATIVE=0 pip install .\n" in done.stdout


def test_without_torch_pure_python_can_be_asked_for(user, source):
    done = install(user, source, FUSEDNN_NATIVE="0")
    assert done.returncode == 0, done.stdout
    assert re.search(r"^Successfully installed fusednn-[\w.]+$", done.stdout, re.MULTILINE)


def test_without_a_compiler_pip_shows_that_the_package_is_pure(user, source, tmp_path):
    (tmp_path / "torch.py").touch()  # found, and never imported by a build without a compiler
    user = {**user, "PYTHONPATH": f"{user['PYTHONPATH']}:{tmp_path}"}
    done = install(user, source, CXX="no-such-compiler")
    assert done.returncode == 0, done.stdout
    assert re.search(r"^Successfully installed fusednn-[\w.]+\+pure\.python$", done.stdout, re.MULTILINE)
    assert install(user, source, CXX="no-such-compiler", FUSEDNN_NATIVE="1").returncode == 1


def test_without_a_compiler_the_build_says_why(source):
    out = run(sys.executable, "setup.py", "build_ext", cwd=source, CXX="no-such-compiler", FUSEDNN_NATIVE="")
    assert "pure Python, without the compiled kernels" in out
    assert "no-such-compiler" in out


@needs_extension
def test_native_wheel_holds_the_extension_its_record_and_its_torch(tmp_path, prebuilt):
    wheel = wheel_of(copy_of_sources(tmp_path / "checkout"), tmp_path / "out", **prebuilt)
    files = files_of(wheel)
    assert any(re.fullmatch(r"fusednn/_C\..*\.so", name) for name in files)
    assert "fusednn/_build_info.json" in files
    assert "none-any" not in wheel.name
    minor = ".".join(torch.__version__.split(".")[:2])
    assert f"\nRequires-Dist: torch=={minor}.*\n" in metadata_of(wheel)
    target = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    code = f"{ALONE}import fusednn.core.native as n; assert n.extension is not None; print(n.build_info())"
    said = run(sys.executable, "-c", code, cwd=target, PYTHONPATH=str(target))
    assert "'torch'" in said


@needs_extension
@pytest.mark.parametrize("place", ["installed", "checkout"])
def test_the_remedy_that_the_import_prints_works(tmp_path, prebuilt, pure_wheel, place):
    checkout = copy_of_sources(tmp_path / "checkout")
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv/bin/python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    Path(site, "zz_tools.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    options = "--no-deps --no-index --disable-pip-version-check"
    if place == "installed":
        run(python, "-m", "pip", "install", *options.split(), pure_wheel, cwd=tmp_path)
        where = {}
    else:
        where = {"PYTHONPATH": str(checkout / "python")}
    code = "import fusednn.core.native as native; print('loaded:', native.extension is not None)"
    said = run(python, "-c", code, cwd=tmp_path, FUSEDNN_NATIVE="1", **where)
    assert "loaded: False" in said
    command = re.search("To build it: (.*)", said)[1].replace(
        "pip install", f"{python} -m pip install {options}"
    )
    run("sh", "-c", command, cwd=checkout, PATH=prebuilt["PATH"])
    assert "loaded: True" in run(python, "-c", code, cwd=tmp_path, FUSEDNN_NATIVE="1")
