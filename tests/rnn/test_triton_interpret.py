"""The Triton gate kernels in Triton's interpreter.

A kernel is interpreted or compiled by what TRITON_INTERPRET says when its module is first imported; hence a
process of their own (tools/run_tests.py starts it).
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
]

if os.environ.get("TRITON_INTERPRET") == "1":
    pytestmark.append(pytest.mark.interpreter)
    import numpy
    import torch
    import triton
    import triton.language as tl

    from fusednn.triton_kernels import not_supported_reasons
    from fusednn.triton_kernels.core import activations
    from fusednn.triton_kernels.rnn import gates as rnn

    from . import gate_checks

    class TestGates(gate_checks.GateLauncherTests):
        """The whole list."""

        @pytest.fixture
        def launchers(self):
            return rnn

    @triton.jit
    def activation_kernel(x, y, TANH: tl.constexpr, BLOCK: tl.constexpr):
        offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + offsets)
        tl.store(y + offsets, activations.tanh(value) if TANH else activations.sigmoid(value))

    def ulps(actual, exact):
        """Errors in units in the last place of the exact result."""
        dtype = actual.numpy().dtype.type
        return numpy.abs(actual.numpy().astype(numpy.longdouble) - exact) / numpy.spacing(
            numpy.abs(exact).astype(dtype)
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_tanh_in_ulp(dtype):
        x = torch.cat(
            [torch.logspace(-30, 4, 8192, dtype=dtype), torch.linspace(0.5, 0.8, 4096, dtype=dtype)]
        )
        x = torch.cat([x, torch.linspace(0, 25, 4096, dtype=dtype)])
        x = torch.cat([x, -x])
        y = torch.empty_like(x)
        activation_kernel[(x.numel() // 1024,)](x, y, True, 1024)
        exact = numpy.tanh(x.numpy().astype(numpy.longdouble))
        assert ulps(y, exact).max() <= 3

    @pytest.mark.parametrize(("dtype", "lowest"), [(torch.float32, -87.0), (torch.float64, -700.0)])
    def test_sigmoid_in_ulp(dtype, lowest):
        x = torch.cat(
            [torch.linspace(lowest, 40, 15360, dtype=dtype), torch.logspace(-30, 4, 1024, dtype=dtype)]
        )
        y = torch.empty_like(x)
        activation_kernel[(x.numel() // 1024,)](x, y, False, 1024)
        exact = 1 / (1 + numpy.exp(-x.numpy().astype(numpy.longdouble)))
        assert ulps(y, exact).max() <= 4

    def test_activations_at_the_ends():
        ends = [float("inf"), -float("inf"), float("nan"), 1e4, -1e4, 0.0, -0.0, 1.0]
        for dtype in (torch.float32, torch.float64):
            x = torch.tensor(ends, dtype=dtype)
            y, z = torch.empty_like(x), torch.empty_like(x)
            activation_kernel[(1,)](x, y, True, 8)
            activation_kernel[(1,)](x, z, False, 8)
            assert torch.equal(y[[0, 1, 3, 4]], torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=dtype))
            assert torch.equal(z[[0, 1, 3, 4]], torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=dtype))
            assert y[2].isnan()
            assert z[2].isnan()
            assert y[5] == y[6] == 0
            assert z[5] == z[6] == 0.5

    def test_bfloat16_is_rounded_as_torch_does():
        """Through c = 0 + tanh(g), whose lower halves in float32 lie on both sides of ties."""
        x = torch.linspace(-3, 3, 512, dtype=torch.float64).to(torch.bfloat16)[None]
        gates = torch.cat([torch.full_like(x, 100), x * 0, x, torch.full_like(x, 100)], 1)
        _, c = rnn.lstm_gates_forward(gates, None, None, torch.zeros_like(x), True)
        assert torch.equal(c, x.double().tanh().to(torch.bfloat16))

    def test_reasons():
        assert not_supported_reasons(torch.device("cpu"), torch.bfloat16) == []
        (reason,) = not_supported_reasons(torch.device("cpu"), torch.int32)
        assert "int32" in reason

else:

    def test_importing_the_package_does_not_import_triton():
        code = "import sys, fusednn.triton_kernels; assert 'fusednn.triton_kernels.rnn' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
