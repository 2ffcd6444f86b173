"""The yardsticks measure: each must refuse what it is there to refuse."""

import types

import pytest
import torch

import fusednn
from fusednn import testing
from fusednn.core import native as _native


def _results(dtype=torch.float32):
    oracle = torch.linspace(-3, 3, 101, dtype=torch.float64).tanh()
    return oracle.to(dtype), oracle


def test_accepts_rounding():
    torch_result, oracle = _results()
    testing.assert_close_to_oracle(torch_result.clone(), torch_result, oracle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_refuses_an_error_of_a_few_ulp(dtype):
    torch_result, oracle = _results(dtype)
    wrong = torch_result.clone()
    wrong[50] += 8 * torch.finfo(dtype).eps
    with pytest.raises(AssertionError, match=r"gates: 1 of 101 .* first at \(50,\)"):
        testing.assert_close_to_oracle(wrong, torch_result, oracle, "gates")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_refuses_values_that_are_not_finite(value):
    torch_result, oracle = _results()
    wrong = torch_result.clone()
    wrong[7] = value
    with pytest.raises(AssertionError):
        testing.assert_close_to_oracle(wrong, torch_result, oracle)
    oracle[7] = value
    testing.assert_close_to_oracle(wrong, torch_result, oracle)
    with pytest.raises(AssertionError, match="infinities and NaN differ"):
        testing.assert_close_to_oracle(torch_result, torch_result, oracle)


def test_refuses_other_shapes_and_dtypes():
    torch_result, oracle = _results()
    with pytest.raises(AssertionError, match="got shape"):
        testing.assert_close_to_oracle(torch_result[:1], torch_result, oracle)
    with pytest.raises(AssertionError, match="got dtype"):
        testing.assert_close_to_oracle(torch_result.double(), torch_result, oracle)
    with pytest.raises(AssertionError, match="expected float64"):
        testing.assert_close_to_oracle(torch_result, torch_result, oracle.float())


def test_poison_reaches_every_allocation():
    with testing.poisoned_memory():
        assert torch.empty(9).isnan().all()
        assert torch.zeros(9).new_empty(3, 3).isnan().all()
        assert (torch.empty(5, dtype=torch.uint8) == 255).all()
        assert torch.empty_strided((2, 3), (3, 1)).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_stand_in_serves_cuda_only_inside():
    calls = []

    def lstm_gates_forward(gates, bias_ih, bias_hh, cx, save_gates):
        calls.append(gates.shape)
        return torch.zeros_like(cx), torch.ones_like(cx)

    module = types.ModuleType("stand_in")
    module.lstm_gates_forward = lstm_gates_forward
    cell = fusednn.LSTMCell(3, 5)
    with testing.emulated_cuda(module), fusednn.use_backend("cuda"), torch.no_grad():
        h, c = cell(torch.randn(2, 3))
    assert calls == [(2, 20)]
    assert (h == 0).all()
    assert (c == 1).all()
    assert module not in _native.cuda_modules.values()
    with fusednn.use_backend("cuda"), pytest.raises(RuntimeError, match=r"no CUDA kernels|expected cuda"):
        cell(torch.randn(2, 3))


@pytest.mark.usefixtures("native")
def test_instruction_sets_are_switched_and_restored():
    before = _native.extension.cpu.isa()
    for name in testing.instruction_sets():
        with testing.instruction_set(name):
            assert _native.extension.cpu.isa() == name
    assert _native.extension.cpu.isa() == before
    with (
        pytest.raises(ValueError, match="expected baseline, avx2 or avx512"),
        testing.instruction_set("sse9"),
    ):
        pass
