"""The build check of the CUDA kernels, and faults planted to see it catch them."""

import json
import re
import subprocess
from pathlib import Path

import cuda_build_check as check
import pytest

ROOT = Path(__file__).resolve().parents[1]

NVCC = check.find_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")

SPACE = "_ZN7fusednn4cuda47_GLOBAL__N__e80be98b_14_rnn_forward_cu_7c1cce56"
NAME = SPACE + "18gru_forward_kernelI6__halfLi8EEEvNS0_1XE"
HEALTHY = f"""
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{NAME}' for 'sm_100'
ptxas info    : Function properties for {NAME}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 72 registers, used 0 barriers, 400 bytes cmem[0]
"""
SPILLED = HEALTHY.replace("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads",
                          "8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads")  # fmt: skip
CALLED = """
ptxas info    : Function properties for helper
    16 bytes stack frame, 20 bytes spill stores, 24 bytes spill loads
"""

SPILLING_SOURCE = """
__global__ void spilling_kernel(const float* in, float* out, int n) {
  float x[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) x[i] = in[i * n + threadIdx.x];
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 64; ++i) sum = sum * x[63 - i] + x[(i * 7) % 64];
  out[threadIdx.x] = sum;
}
"""


def compilation(text, returncode=0):
    kernels = tuple(check.parse_ptxas(text)) if returncode == 0 else ()
    return check.Compilation("some.cu", "sm_100", returncode, text, kernels)


def test_parse_numbers():
    assert check.parse_ptxas(HEALTHY) == [check.Kernel(NAME, 100, 72, 0, 0, 0)]
    assert check.parse_ptxas(HEALTHY + SPILLED) == [
        check.Kernel(NAME, 100, 72, 0, 0, 0),
        check.Kernel(NAME, 100, 72, 8, 4, 12),
    ]


def test_parse_functions_that_were_not_inlined():
    (kernel,) = check.parse_ptxas(HEALTHY + CALLED)
    assert (kernel.registers, kernel.stack_bytes, kernel.spill_store_bytes) == (72, 16, 20)


def test_parse_refuses_what_it_does_not_understand():
    with pytest.raises(ValueError, match="no frame or registers"):
        check.parse_ptxas(HEALTHY.replace("spill stores", "spilled"))


def test_faults():
    assert check.faults([compilation(HEALTHY)]) == []
    assert check.faults([compilation(SPILLED)]) == [
        "some.cu sm_100: gru_forward_kernel half 8 spills 4 bytes out and 12 in"
    ]
    (failed,) = check.faults([compilation("error: no", returncode=1)])
    assert failed.startswith("some.cu sm_100: failed to compile")
    assert check.faults([compilation("nothing was compiled")]) == ["some.cu sm_100: no kernel in it"]


def test_table_shows_spills():
    assert "72 +8 B stack 4/12 B SPILLED" in check.table([compilation(SPILLED)])


def test_short_names():
    assert check.short_name(NAME) == "gru_forward_kernel half 8"
    assert check.short_name("_ZN7fusednn20lstm_backward_kernelIfLi4EEEvNS_1XE") == "lstm_backward_kernel f 4"
    assert check.short_name("_Z15spilling_kernelPKfPfi") == "spilling_kernel"
    assert check.short_name("plain") == "plain"


@needs_nvcc
def test_real_spill_is_caught(tmp_path):
    source = tmp_path / "spilling.cu"
    source.write_text(SPILLING_SOURCE)
    healthy = check.compile_kernels(NVCC, source, 90)
    assert healthy.returncode == 0, healthy.output
    assert check.faults([healthy]) == []
    spilled = check.compile_kernels(NVCC, source, 90, ("-maxrregcount=24",))
    (fault,) = check.faults([spilled])
    assert re.fullmatch(
        r"spilling.cu sm_90: spilling_kernel spills [1-9]\d* bytes out and [1-9]\d* in", fault
    )


# In `make test` for one target, in `make test-all` for each.
TARGETS = [
    pytest.param(arch, marks=[] if arch == 90 else [pytest.mark.thorough]) for arch in check.ARCHITECTURES
]
SOURCES = sorted((ROOT / "csrc").glob("*/cuda/*.cu"))


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("source", SOURCES, ids=check.name_of)
def test_kernels_compile_without_spills(source, arch):
    done = check.compile_kernels(NVCC, source, arch)
    assert check.faults([done]) == []
    assert {kernel.arch for kernel in done.kernels} == {arch}


# The emulator's module is made of all of these but one, with CUDA headers of its own.
BINDINGS = [
    pytest.param(path, marks=[] if path.stem == "cuda_stream" else [pytest.mark.thorough])
    for path in check.binding_sources()
]


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("source", BINDINGS, ids=check.name_of)
def test_bindings_compile(source):
    assert check.faults([check.compile_binding(check.toolkit_of(NVCC), source)]) == []


def test_all_sources_are_found():
    assert len(SOURCES) >= 12
    assert {check.name_of(p) for p in check.binding_sources()} >= {
        "rnn/bindings/cuda.cpp",
        "core/bindings/cuda_stream.cpp",
    }


@needs_nvcc
def test_the_command_reports_every_kernel(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check, "CSRC", tmp_path)
    (tmp_path / "family" / "cuda").mkdir(parents=True)
    for name in ("one", "two"):
        (tmp_path / "family" / "cuda" / f"{name}.cu").write_text(SPILLING_SOURCE)
    report = tmp_path / "cuda.json"
    assert check.main(["--json", str(report), "--arch", "90", "80", "--no-bindings"]) == 0
    assert "4 compilations, 4 kernels, 0 faults" in capsys.readouterr().out
    kernels = json.loads(report.read_text())
    assert {(k["source"], k["arch"]) for k in kernels} == {
        (f"family/cuda/{name}.cu", arch) for name in ("one", "two") for arch in (80, 90)
    }


@needs_nvcc
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_packs_stay_one_access(name, tmp_path):
    """Every global access of a kernel on packs of N elements moves the whole pack."""
    ptx = tmp_path / "kernel.ptx"
    csrc = ROOT / "csrc"
    command = [NVCC, "-std=c++20", "-O3", "-arch=compute_80", "-ptx", f"-I{csrc}",
               str(csrc / "rnn" / "cuda" / f"{name}.cu"), "-o", str(ptx)]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    entries = re.split(r"\.entry ", ptx.read_text())[1:]
    assert len(entries) == 2 * 13
    item_bytes = {"f": 4, "d": 8, "half": 2, "nv_bfloat16": 2}
    for entry in entries:
        kernel, dtype, width = check.short_name(entry.split("(")[0]).split()
        accesses = re.findall(r"\b(?:ld|st)\.global(?:\.\w\w)?(?:\.v(\d))?\.[a-z](\d+)\s", entry)
        assert len(accesses) >= 11, kernel
        sizes = {int(count or 1) * int(bits) // 8 for count, bits in accesses}
        assert sizes == {item_bytes[dtype] * int(width)}, (kernel, dtype, width)
