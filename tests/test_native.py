"""CUDA kernels on the CPU: native tests, clean under each sanitizer, and planted faults, each reported."""

import fcntl
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "csrc" / "tests"
BUILD = ROOT / "build" / "native_tests"

FLAGS = {
    "native_tests": [],
    "native_tests_ucontext": [],
    "native_tests_asan": ["-fsanitize=address,alignment,bounds"],
    "native_tests_tsan": ["-fsanitize=thread"],
}

# Planted fault: the build that sees it, what the report says, and which function it names.
PLANTED = {
    "missing_barrier": ("native_tests_tsan", "ThreadSanitizer: data race", "block_sum"),
    "missing_syncwarp": ("native_tests_tsan", "ThreadSanitizer: data race", "warp_reverse"),
    "missing_grid_sync": ("native_tests_tsan", "ThreadSanitizer: data race", "neighbours"),
    "blocks_race": ("native_tests_tsan", "ThreadSanitizer: data race", "grid_sum"),
    "shared_out_of_bounds": ("native_tests_asan", "AddressSanitizer: heap-buffer-overflow", "shift"),
    "static_out_of_bounds": ("native_tests_asan", "AddressSanitizer: global-buffer-overflow", "'staged'"),
    "global_out_of_bounds": ("native_tests_asan", "AddressSanitizer: heap-buffer-overflow", "scale"),
    "misaligned": ("native_tests_asan", "requires 16 byte alignment", "float4"),
}


def tool(name):
    """Path of a build tool: beside this Python, or on the path."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def call(command, **options):
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", **options
    )
    return done.returncode, done.stdout


@functools.cache
def missing_for(flags):
    """Why the compiler can't link a program with these flags; None if it can."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        return f"no C++ compiler: {compiler} not found"
    program = BUILD / f"probe-{os.getpid()}"
    command = [*compiler.split(), *flags, "-x", "c++", "-", "-o", str(program)]
    code, output = call(command, input="int main() {}")
    if code != 0:
        lines = output.strip().splitlines() or ["no message"]
        return f"{compiler} can't link with {' '.join(flags)}: {lines[0]}"
    code, output = call([str(program)])
    return None if code == 0 else f"{' '.join(flags)} doesn't start here: {output.strip()[:200]}"


@functools.cache
def configure():
    cmake = tool("cmake")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"] if tool("ninja") else []
    code, output = call([cmake, "-S", str(SOURCE), "-B", str(BUILD), *generator])
    assert code == 0, output


@functools.cache
def build(target):
    if tool("cmake") is None:
        pytest.skip("no cmake: pip install cmake ninja")
    BUILD.mkdir(parents=True, exist_ok=True)
    missing = missing_for(tuple(FLAGS[target]))
    if missing:
        pytest.skip(missing)
    with (BUILD / "lock").open("w") as lock:  # other workers build here, too
        fcntl.flock(lock, fcntl.LOCK_EX)
        configure()
        code, output = call([tool("cmake"), "--build", str(BUILD), "--target", target, "--parallel", "2"])
    assert code == 0, output
    return str(BUILD / target)


def marked_line(name):
    """`file:line` of the fault, as sanitizers write it."""
    for source in sorted(SOURCE.glob("*.cu")):
        for number, line in enumerate(source.read_text().splitlines(), 1):
            if line.endswith(f"// planted: {name}"):
                return f"{source.name}:{number}"
    raise AssertionError(f"no line is marked as planted: {name}")


def run(program, *names, order="forward"):
    environment = {**os.environ, "CUDA_ON_CPU_ORDER": order}
    return call([program, *names], env=environment, timeout=120)


def thorough_where_instrumented(target):
    """Instrumented programs take minutes to build."""
    return pytest.param(target, marks=[pytest.mark.thorough] if FLAGS[target] else [])


@pytest.mark.parametrize("order", ["forward", "reverse", "random:1"])
@pytest.mark.parametrize("target", map(thorough_where_instrumented, FLAGS))
def test_clean(target, order):
    code, output = run(build(target), order=order)
    assert code == 0, output
    assert ", 0 failures" in output
    assert "Sanitizer" not in output
    assert "runtime error" not in output


@pytest.mark.thorough
@pytest.mark.parametrize("name", PLANTED)
def test_planted_fault_is_reported(name):
    target, report, function = PLANTED[name]
    code, output = run(build(target), name)
    assert code != 0, output
    assert report in output
    assert function in output
    assert marked_line(name) in output


def test_every_planted_fault_is_expected():
    _, output = run(build("native_tests"), "--list")
    planted = {line.split()[1] for line in output.splitlines() if line.startswith("planted ")}
    assert planted == {*PLANTED, "failing_check"}


def test_a_failing_check_fails_the_program():
    program = build("native_tests")
    code, output = run(program, "no_such_test")
    assert code == 1
    assert output.endswith("0 tests, 0 failures\n")
    code, output = run(program, "failing_check")
    assert code == 1
    assert "CHECK(1 + 1 == 3) failed" in output
    assert output.endswith("1 tests, 1 failures\n")
