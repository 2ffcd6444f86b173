"""The ahead-of-time check of the Triton kernels, and faults planted to see it catch them."""

import importlib
import importlib.util
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import triton_aot  # noqa: E402

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels can't be compiled"
    ),
]


def compile_one(**changes):
    """The first kernel of a case."""
    job = {
        "module": "fusednn.triton_kernels.rnn.aot",
        "case": "lstm/wide",
        "dtype": "fp32",
        "arch": 90,
    }
    return triton_aot.compile_case(triton_aot.Job(**(job | changes)))[0]


PACKAGE = "fusednn.triton_kernels"
FAMILIES = sorted({p.parent.name for p in (ROOT / "triton_kernels").glob("*/__init__.py")} - {"core"})
# In `make test` for one target, in `make test-all` for each. Triton keeps what it compiled (~/.triton/cache).
TARGETS = [
    pytest.param(arch, marks=[] if arch == 90 else [pytest.mark.thorough])
    for arch in triton_aot.ARCHITECTURES
]


@pytest.mark.slow
@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kernel_compiles_without_local_memory(family, arch):
    jobs = triton_aot.jobs_of(f"{PACKAGE}.{family}", [arch], [], [])
    assert jobs
    results = [result for job in jobs for result in triton_aot.compile_case(job)]
    assert [r for r in results if not r.ok] == []
    assert all(r.registers > 0 for r in results)


def test_every_family_dtype_and_target_is_compiled():
    """What the test above compiles, family by family, is all that there is."""
    jobs = triton_aot.jobs_of(PACKAGE, triton_aot.ARCHITECTURES, [], [])
    assert {(job.dtype, job.arch) for job in jobs} == {
        (dtype, arch) for dtype in ("fp32", "fp64", "fp16", "bf16") for arch in (80, 90, 100, 120)
    }
    assert {job.module.split(".")[2] for job in jobs} == set(FAMILIES)


def test_the_command_reports_every_case(tmp_path):
    report = tmp_path / "aot.json"
    command = [sys.executable, str(ROOT / "tools" / "triton_aot.py"), "--json", str(report)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    chosen = ["lstm/bare", "--arch", "90", "80", "--dtype", "fp32"]
    done = subprocess.run([*command, *chosen], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(report.read_text())
    assert [(r["case"], r["dtype"], r["arch"], r["ok"]) for r in results] == [
        ("lstm/bare", "fp32", arch, True) for arch in (90, 80)
    ]


def test_planted_spill_is_caught():
    assert compile_one(dtype="fp64").ok
    spilled = compile_one(dtype="fp64", options=(("maxnreg", 32),))
    assert not spilled.error
    assert spilled.stack_bytes + spilled.local_bytes > 0
    assert not spilled.ok
    assert "B local" in triton_aot.table([spilled])


def test_failure_to_compile_is_caught(tmp_path, monkeypatch):
    """A jitted function that returns two types: the interpreter runs it, the compiler refuses."""
    (tmp_path / "broken.py").write_text(
        "import triton, triton.language as tl\n"
        "from fusednn.triton_kernels.core.aot import AotCase, empty\n"
        "@triton.jit\n"
        "def load(x):\n"
        "    value = tl.load(x)\n"
        "    if value.dtype == tl.float32:\n"
        "        return value\n"
        "    return value.to(tl.float16)\n"
        "@triton.jit\n"
        "def broken_kernel(x):\n"
        "    tl.store(x, load(x))\n"
        "def launch(dtype):\n"
        "    broken_kernel[(1,)](empty(1, dtype=dtype))\n"
        "AOT_CASES = [AotCase('broken', launch), AotCase('nothing', lambda dtype: None)]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "launches nothing" in compile_one(module="broken", case="nothing").error
    result = compile_one(module="broken", case="broken")
    assert result.error
    assert not result.ok
    assert "FAILED" in triton_aot.table([result])


def test_every_kernel_is_in_a_case():
    """What is decorated and launched, found by its name."""
    from triton.runtime.jit import JITFunction

    package = importlib.import_module("fusednn.triton_kernels")
    kernels = set()
    for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        members = vars(importlib.import_module(info.name)).items()
        kernels |= {name for name, f in members if isinstance(f, JITFunction) and name.endswith("_kernel")}
    jobs = triton_aot.jobs_of(package.__name__, [90], ["fp32", "fp16", "bf16"], [])
    launched = set()

    def run(kernel, *args, **given):
        launched.add(kernel.fn.__name__)

    with triton_aot.without_device(90, run):
        for job in jobs:
            triton_aot.case_of(job).call(triton_aot.DTYPES[job.dtype])
    assert launched == kernels


def test_a_stack_counts_where_it_is_used():
    assert triton_aot.uses_stack("        /*01d0*/                   STL.64 [R1+0x8], R2 ;")
    assert triton_aot.uses_stack("        /*01d0*/              @!P0 LDL R2, [R1] ;")
    assert not triton_aot.uses_stack("        /*01d0*/                   LDG.E R2, [R4.64] ;")


def test_resource_usage_of_an_unknown_format_is_an_error():
    text = " Function k:\n  REG:40 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:400"
    assert triton_aot.parse_resource_usage(text) == {"REG": 40, "STACK": 16, "SHARED": 0, "LOCAL": 0}
    with pytest.raises(ValueError, match="LOCAL"):
        triton_aot.parse_resource_usage("REG:40 STACK:16 SHARED:0")
