"""What every implementation of the four gate launchers must satisfy; `launchers` is a module that has them.

The oracle is float64. An error may be twice that of the same formula in PyTorch's own dtype, plus four ulp
of the largest value.
"""

import pytest
import torch

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
HIDDEN = [1, 5, 17, 63, 65, 129, 513]
BATCHES = [0, 1, 3, 7]


def assert_accurate(name, actual, formula, *inputs):
    """Compares `actual` with `formula` in float64, in units of what its own dtype achieves."""
    oracle = formula(*(None if x is None else x.double() for x in inputs))
    torch_error = (formula(*inputs).double() - oracle).abs()
    assert actual.shape == oracle.shape, name
    if not oracle.numel():
        return
    finite = oracle.isfinite()
    assert torch.equal(actual.isfinite(), finite), f"{name}: not finite at other places than the oracle"
    if not finite.any():
        return
    oracle, error = oracle[finite], (actual.double() - oracle).abs()[finite].max().item()
    torch_error = torch_error[finite]
    own = torch_error[torch_error.isfinite()].max().item() if torch_error.isfinite().any() else 0.0
    budget = 2 * own + 4 * torch.finfo(actual.dtype).eps * oracle.abs().max().item()
    assert error <= budget, f"{name}: got an error of {error:.3g}, expected at most {budget:.3g}"


def random(*shape, dtype, scale=1.0, seed=0):
    """Normal numbers that depend on nothing but the arguments."""
    generator = torch.Generator().manual_seed(seed + 7919 * sum(shape))
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def plus(x, *biases):
    """The sum of x and those of the biases that are there."""
    for bias in biases:
        x = x if bias is None else x + bias
    return x


def lstm_activated(gates, bias_ih, bias_hh):
    """[B, 4H] after the activations."""
    i, f, g, o = plus(gates, bias_ih, bias_hh).chunk(4, 1)
    return torch.cat([i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()], 1)


def lstm_c(gates, bias_ih, bias_hh, cx):
    """The next cell state."""
    i, f, g, _ = lstm_activated(gates, bias_ih, bias_hh).chunk(4, 1)
    return f * cx + i * g


def lstm_h(gates, bias_ih, bias_hh, cx):
    """The next hidden state."""
    return plus(gates, bias_ih, bias_hh).chunk(4, 1)[3].sigmoid() * lstm_c(gates, bias_ih, bias_hh, cx).tanh()


def _zero_if_none(grad, like):
    return torch.zeros_like(like) if grad is None else grad


def lstm_grad_c(grad_h, grad_c, gates, cx, c):
    """Gradient of the new cell state with both its uses."""
    o = gates.chunk(4, 1)[3]
    return _zero_if_none(grad_c, c) + _zero_if_none(grad_h, c) * o * (1 - c.tanh() ** 2)


def lstm_grad_gates(grad_h, grad_c, gates, cx, c):
    """[B, 4H] before the activations."""
    i, f, g, o = gates.chunk(4, 1)
    d_c = lstm_grad_c(grad_h, grad_c, gates, cx, c)
    d_o = _zero_if_none(grad_h, c) * c.tanh()
    return torch.cat(
        [d_c * g * i * (1 - i), d_c * cx * f * (1 - f), d_c * i * (1 - g**2), d_o * o * (1 - o)], 1
    )


def lstm_grad_cx(grad_h, grad_c, gates, cx, c):
    """Gradient of the old cell state."""
    return lstm_grad_c(grad_h, grad_c, gates, cx, c) * gates.chunk(4, 1)[1]


def gru_saved(gates_x, gates_h, bias_ih, bias_hh, hx):
    """[B, 4H]: r, z, n, h_n."""
    x_r, x_z, x_n = plus(gates_x, bias_ih).chunk(3, 1)
    h_r, h_z, h_n = plus(gates_h, bias_hh).chunk(3, 1)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    return torch.cat([r, z, (x_n + r * h_n).tanh(), h_n], 1)


def gru_h(gates_x, gates_h, bias_ih, bias_hh, hx):
    """The next hidden state, in the form of torch's documentation."""
    _, z, n, _ = gru_saved(gates_x, gates_h, bias_ih, bias_hh, hx).chunk(4, 1)
    return (1 - z) * n + z * hx


def gru_grad_x(grad_h, gates, hx):
    """[B, 3H] of the input's product."""
    r, z, n, h_n = gates.chunk(4, 1)
    d_n = grad_h * (1 - z) * (1 - n**2)
    return torch.cat([d_n * h_n * r * (1 - r), grad_h * (hx - n) * z * (1 - z), d_n], 1)


def gru_grad_recurrent(grad_h, gates, hx):
    """[B, 3H] of the state's product."""
    d_r, d_z, d_n = gru_grad_x(grad_h, gates, hx).chunk(3, 1)
    return torch.cat([d_r, d_z, d_n * gates.chunk(4, 1)[0]], 1)


def gru_grad_hx(grad_h, gates, hx):
    """The direct term of the state's gradient."""
    return grad_h * gates.chunk(4, 1)[1]


def lstm_inputs(batch, hidden, dtype, scale=3.0, biases=(True, True)):
    """gates, bias_ih, bias_hh, cx."""
    return (
        random(batch, 4 * hidden, dtype=dtype, scale=scale),
        random(4 * hidden, dtype=dtype, seed=1) if biases[0] else None,
        random(4 * hidden, dtype=dtype, seed=2) if biases[1] else None,
        random(batch, hidden, dtype=dtype, scale=2.0, seed=3),
    )


def gru_inputs(batch, hidden, dtype, scale=2.0, biases=(True, True)):
    """gates_x, gates_h, bias_ih, bias_hh, hx."""
    return (
        random(batch, 3 * hidden, dtype=dtype, scale=scale),
        random(batch, 3 * hidden, dtype=dtype, scale=scale, seed=1),
        random(3 * hidden, dtype=dtype, seed=2) if biases[0] else None,
        random(3 * hidden, dtype=dtype, seed=3) if biases[1] else None,
        random(batch, hidden, dtype=dtype, seed=4),
    )


def check_lstm_forward(launchers, inputs):
    """All outputs against the oracle, with the gates saved and not."""
    gates, bias_ih, bias_hh, cx = inputs
    saved = gates.clone()
    h, c = launchers.lstm_gates_forward(saved, bias_ih, bias_hh, cx, True)
    assert_accurate("h", h, lstm_h, *inputs)
    assert_accurate("c", c, lstm_c, *inputs)
    assert_accurate("gates", saved, lambda gates, b_ih, b_hh, _: lstm_activated(gates, b_ih, b_hh), *inputs)
    kept = gates.clone()
    h_again, c_again = launchers.lstm_gates_forward(kept, bias_ih, bias_hh, cx, False)
    torch.testing.assert_close((h_again, c_again), (h, c), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(kept, gates, rtol=0, atol=0, equal_nan=True)


def check_lstm_backward(launchers, batch, hidden, dtype, grads=(True, True)):
    """All gradients against the oracle."""
    gates, bias_ih, bias_hh, cx = lstm_inputs(batch, hidden, dtype)
    inputs = (
        random(batch, hidden, dtype=dtype, seed=5) if grads[0] else None,
        random(batch, hidden, dtype=dtype, seed=6) if grads[1] else None,
        lstm_activated(gates, bias_ih, bias_hh),
        cx,
        lstm_c(gates, bias_ih, bias_hh, cx),
    )
    grad_gates, grad_cx = launchers.lstm_gates_backward(*inputs)
    assert_accurate("grad_gates", grad_gates, lstm_grad_gates, *inputs)
    assert_accurate("grad_cx", grad_cx, lstm_grad_cx, *inputs)


def check_gru_forward(launchers, inputs):
    """All outputs against the oracle, with the gates saved and not."""
    h, gates = launchers.gru_gates_forward(*inputs, True)
    assert_accurate("h", h, gru_h, *inputs)
    assert_accurate("gates", gates, gru_saved, *inputs)
    h_again, nothing = launchers.gru_gates_forward(*inputs, False)
    assert nothing.shape == (0,)
    torch.testing.assert_close(h_again, h, rtol=0, atol=0, equal_nan=True)


def check_gru_backward(launchers, batch, hidden, dtype):
    """All gradients against the oracle."""
    forward = gru_inputs(batch, hidden, dtype)
    inputs = (random(batch, hidden, dtype=dtype, seed=5), gru_saved(*forward), forward[-1])
    grad_x, grad_recurrent, grad_hx = launchers.gru_gates_backward(*inputs)
    assert_accurate("grad_gates_x", grad_x, gru_grad_x, *inputs)
    assert_accurate("grad_gates_h", grad_recurrent, gru_grad_recurrent, *inputs)
    assert_accurate("grad_hx", grad_hx, gru_grad_hx, *inputs)


@pytest.mark.costly
class GateLauncherTests:
    """Subclass with a fixture `launchers`."""

    @pytest.fixture(autouse=True)
    def poison(self):
        """Fills what torch.empty returns with NaN."""
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)

    @pytest.mark.in_turn("hidden")
    @pytest.mark.parametrize("hidden", HIDDEN)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_shapes(self, launchers, dtype, hidden):
        for batch in BATCHES:
            check_lstm_forward(launchers, lstm_inputs(batch, hidden, dtype))
            check_lstm_backward(launchers, batch, hidden, dtype)
            check_gru_forward(launchers, gru_inputs(batch, hidden, dtype))
            check_gru_backward(launchers, batch, hidden, dtype)

    @pytest.mark.in_turn("hidden")
    @pytest.mark.parametrize("hidden", [2, 4, 12, 64])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_even_hidden_sizes(self, launchers, dtype, hidden):
        check_lstm_forward(launchers, lstm_inputs(3, hidden, dtype))
        check_lstm_backward(launchers, 3, hidden, dtype)
        check_gru_forward(launchers, gru_inputs(3, hidden, dtype))
        check_gru_backward(launchers, 3, hidden, dtype)

    def test_hidden_zero(self, launchers):
        h, c = launchers.lstm_gates_forward(torch.empty(3, 0), None, None, torch.empty(3, 0), True)
        assert h.shape == c.shape == (3, 0)

    @pytest.mark.parametrize("biases", [(False, False), (True, False), (False, True)])
    def test_missing_biases(self, launchers, biases):
        for dtype in DTYPES:
            check_lstm_forward(launchers, lstm_inputs(3, 65, dtype, biases=biases))
            check_gru_forward(launchers, gru_inputs(3, 65, dtype, biases=biases))

    @pytest.mark.parametrize("grads", [(True, False), (False, True), (False, False)])
    def test_missing_gradients(self, launchers, grads):
        for dtype in DTYPES:
            check_lstm_backward(launchers, 3, 65, dtype, grads)

    @pytest.mark.parametrize("scale", [1e2, 1e4, float("inf")])
    def test_saturated_gates(self, launchers, scale):
        """Gates far out on both sides give 0, 1 and -1, never NaN."""
        for dtype in DTYPES:
            gates, bias_ih, bias_hh, cx = lstm_inputs(3, 17, dtype, scale=1.0)
            gates = torch.where(gates > 0, scale, -scale).to(dtype)
            check_lstm_forward(launchers, (gates, bias_ih, bias_hh, cx * 1e4))
            x, h, bias_ih, bias_hh, hx = gru_inputs(3, 17, dtype, scale=1.0)
            check_gru_forward(
                launchers, (torch.where(x > 0, scale, -scale).to(dtype), h, bias_ih, bias_hh, hx)
            )

    def test_small_values_keep_their_relative_accuracy(self, launchers):
        """Near zero tanh is the identity: no cancellation, no flush to zero."""
        gates = torch.zeros(1, 4 * 5)
        gates[0, 10:15] = torch.tensor([1e-3, -1e-5, 1e-10, -1e-20, 1e-30])
        gates[0, :5] = 100.0
        h, c = launchers.lstm_gates_forward(gates, None, None, torch.zeros(1, 5), True)
        torch.testing.assert_close(c[0], gates[0, 10:15].double().tanh().float(), rtol=5e-7, atol=0)
        torch.testing.assert_close(h[0].double(), 0.5 * c[0].double().tanh(), rtol=5e-7, atol=0)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_bad_rows_stay_alone(self, launchers, bad):
        hidden, row = 65, 2
        others = [0, 1, 3, 4, 5, 6]

        def compare(function, inputs, *after):
            clean = function(*[x.clone() if torch.is_tensor(x) else x for x in inputs], *after)
            dirty_inputs = [x.clone() if torch.is_tensor(x) else x for x in inputs]
            for x in dirty_inputs:
                if torch.is_tensor(x) and x.dim() == 2:
                    x[row] = bad
            dirty = function(*dirty_inputs, *after)
            for one, two in zip(clean, dirty):
                assert torch.equal(one[others], two[others])
            if bad != bad:
                assert all(one[row].isnan().all() for one in dirty)

        for dtype in DTYPES:
            lstm, gru = lstm_inputs(7, hidden, dtype), gru_inputs(7, hidden, dtype)
            compare(launchers.lstm_gates_forward, lstm, True)
            compare(launchers.gru_gates_forward, gru, True)
            grad = random(7, hidden, dtype=dtype, seed=5)
            saved = (grad, grad, lstm_activated(*lstm[:3]), lstm[3], lstm_c(*lstm))
            compare(launchers.lstm_gates_backward, saved)
            compare(launchers.gru_gates_backward, (grad, gru_saved(*gru), gru[-1]))

    def test_gradients_match_autograd(self, launchers):
        """Forward, then backward from what it saved, against autograd through the formulas."""
        lstm, gru = lstm_inputs(3, 17, torch.float64), gru_inputs(3, 17, torch.float64)
        grad_h, grad_c = (
            random(3, 17, dtype=torch.float64, seed=8),
            random(3, 17, dtype=torch.float64, seed=9),
        )

        gates, cx = lstm[0].clone().requires_grad_(), lstm[3].clone().requires_grad_()
        outputs = lstm_h(gates, lstm[1], lstm[2], cx), lstm_c(gates, lstm[1], lstm[2], cx)
        expected = torch.autograd.grad(outputs, (gates, cx), (grad_h, grad_c))
        saved = lstm[0].clone()
        _, c = launchers.lstm_gates_forward(saved, *lstm[1:], True)
        actual = launchers.lstm_gates_backward(grad_h, grad_c, saved, lstm[3], c)
        torch.testing.assert_close(tuple(actual), expected, rtol=1e-12, atol=1e-14)

        x, h, hx = (gru[i].clone().requires_grad_() for i in (0, 1, 4))
        expected = torch.autograd.grad(gru_h(x, h, gru[2], gru[3], hx), (x, h, hx), grad_h)
        _, saved = launchers.gru_gates_forward(*gru, True)
        actual = launchers.gru_gates_backward(grad_h, saved, gru[4])
        torch.testing.assert_close(tuple(actual), expected, rtol=1e-12, atol=1e-14)

    def test_strided_and_unaligned_inputs(self, launchers):
        for dtype in DTYPES:
            buffer = random(1 + 3 * 4 * 64 + 8, dtype=dtype)
            gates = buffer[1 : 1 + 3 * 4 * 64].view(3, 4 * 64)
            _, bias_ih, bias_hh, cx = lstm_inputs(3, 64, dtype)
            strided = cx.t().contiguous().t()
            bias = torch.stack([bias_ih, bias_hh], 1)
            expected = launchers.lstm_gates_forward(gates.clone(), bias_ih, bias_hh, cx, True)
            before = buffer.clone()
            actual = launchers.lstm_gates_forward(gates, bias[:, 0], bias[:, 1], strided, True)
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)
            assert torch.equal(buffer[0], before[0])
            assert torch.equal(buffer[1 + gates.numel() :], before[1 + gates.numel() :])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"gates": torch.zeros(3, 4, 5)}, r"gates: got shape \[3, 4, 5\], expected 2 dimensions"),
            ({"gates": torch.zeros(3, 21)}, r"gates: got shape \[3, 21\], expected a multiple of 4"),
            ({"gates": torch.zeros(3, 20, dtype=torch.int32)}, "gates: got dtype .*, expected float32"),
            ({"gates": torch.zeros(20, 3).t()}, r"gates: got strides \[1, 3\], expected a contiguous"),
            ({"cx": torch.zeros(2, 5)}, r"cx: got shape \[2, 5\], expected \[3, 5\]"),
            ({"cx": torch.zeros(3, 5, dtype=torch.float64)}, "cx: got dtype .*, expected .* as gates"),
            ({"cx": torch.zeros(3, 5, device="meta")}, "cx: got a tensor on meta, expected cpu as gates"),
            ({"bias_ih": torch.zeros(5)}, r"bias_ih: got shape \[5\], expected \[20\]"),
            ({"bias_hh": torch.zeros(1, 20)}, r"bias_hh: got shape \[1, 20\], expected \[20\]"),
        ],
    )
    def test_errors_name_the_argument(self, launchers, change, message):
        arguments = {
            "gates": torch.zeros(3, 20),
            "bias_ih": torch.zeros(20),
            "bias_hh": torch.zeros(20),
            "cx": torch.zeros(3, 5),
            "save_gates": True,
        }
        with pytest.raises(RuntimeError, match=f"^lstm_gates_forward: {message}"):
            launchers.lstm_gates_forward(*(arguments | change).values())

    def test_errors_of_the_other_launchers(self, launchers):
        state, wrong = torch.zeros(3, 5), torch.zeros(3, 6)
        with pytest.raises(RuntimeError, match=r"^lstm_gates_backward: grad_c: got shape \[3, 6\]"):
            launchers.lstm_gates_backward(None, wrong, torch.zeros(3, 20), state, state)
        with pytest.raises(RuntimeError, match=r"^gru_gates_forward: gates_h: got shape \[3, 18\]"):
            launchers.gru_gates_forward(torch.zeros(3, 15), torch.zeros(3, 18), None, None, state, True)
        with pytest.raises(RuntimeError, match=r"^gru_gates_backward: hx: got shape \[3, 6\]"):
            launchers.gru_gates_backward(state, torch.zeros(3, 20), wrong)
