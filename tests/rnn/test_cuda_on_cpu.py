"""The CUDA gate kernels and their binding, executed on the CPU."""

import pytest
import torch

from tests.places import NO_EMULATOR, emulated_module, missing

from . import gate_checks


class TestGates(gate_checks.GateLauncherTests):
    """The whole list."""

    @pytest.fixture
    def launchers(self):
        module = emulated_module()
        if module is None:
            missing(NO_EMULATOR)
        return module

    @pytest.mark.parametrize("dtype", gate_checks.DTYPES)
    @pytest.mark.parametrize("hidden", [512, 516, 514])
    def test_wide_access(self, launchers, dtype, hidden):
        """From 16384 packs on, a thread takes as many elements as 16 bytes hold and H is a multiple of."""
        width = min(16 // torch.empty((), dtype=dtype).element_size(), hidden & -hidden)
        batch = 16384 * width // hidden + 1
        gate_checks.check_lstm_forward(launchers, gate_checks.lstm_inputs(batch, hidden, dtype))
        gate_checks.check_lstm_backward(launchers, batch, hidden, dtype)
        gate_checks.check_gru_forward(launchers, gate_checks.gru_inputs(batch, hidden, dtype))
        gate_checks.check_gru_backward(launchers, batch, hidden, dtype)

    def test_more_packs_than_threads(self, launchers):
        """The grid has at most 4096 blocks of 128 threads, each of which then goes round again."""
        gate_checks.check_lstm_forward(launchers, gate_checks.lstm_inputs(4097, 129, torch.float32))
        gate_checks.check_gru_backward(launchers, 4097, 129, torch.float32)
