"""Calls at the edge of what the layers take: nothing in a dimension, mixed dtypes, huge temperatures."""

import pytest
import torch
from torch import nn

import fusednn
from fusednn.functional import attention_lstm
from fusednn.models import DrivingNet
from fusednn.models.layers import ConvNormReLU


@pytest.mark.parametrize("given", [True, False], ids=["state", "no state"])
@pytest.mark.parametrize("score", ["positional", "additive"])
def test_no_samples(place, score, given):
    layer = fusednn.SpatialAttention(3, 5, 4, 6, score=score, glimpses=2).to(place.device)
    x = torch.randn(0, 3, 4, 6, device=place.device, requires_grad=True)
    out, a = layer(x, torch.randn(0, 5, device=place.device) if given else None)
    assert out.shape == (0, 6, 4, 6)
    assert a.shape == (0, 2, 4, 6)
    (out.sum() + a.sum()).backward()
    assert x.grad.shape == x.shape
    assert layer.score.weight.grad.eq(0).all()


def test_a_projection_without_bias(place):
    layer = fusednn.SpatialAttention(3, 5, 4, 6).to(place.device)
    with torch.no_grad():
        layer.hidden.bias.zero_()
    x = torch.randn(2, 3, 4, 6, device=place.device)
    expected = layer(x)
    layer.hidden.bias = None
    torch.testing.assert_close(layer(x), expected)


def sequence(channels=3, rows=None, size=2, dtype=torch.float64, device="cpu"):
    """Operands of an LSTM with additive scores of `rows` rows, or positional ones, and leaves of them."""
    torch.manual_seed(2)

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64).to(dtype).to(device).requires_grad_()

    terms = 4 if rows is None else rows
    h, c = normal(2, size), normal(2, size)
    v = None if rows is None else normal(1, rows)
    weights = (normal(1 if rows is None else rows, channels), normal(terms, size))
    cell = (normal(4 * size, channels * 4), normal(4 * size, size))
    return (normal(2, 3, channels, 2, 2), (h, c), *weights, *cell), {"v": v}


@pytest.mark.parametrize("sizes", [{"channels": 0}, {"rows": 0}, {"size": 0}], ids=str)
def test_nothing_to_look_at_or_to_remember(recurrence_place, sizes):
    operands, options = sequence(**sizes, device=recurrence_place.device)
    hidden, maps, (h, _) = attention_lstm(*operands, **options)
    with fusednn.use_backend("reference"):
        expected = attention_lstm(*operands, **options)
    torch.testing.assert_close(hidden, expected[0])
    torch.testing.assert_close(maps, expected[1])
    torch.testing.assert_close(maps.sum((3, 4)), torch.ones_like(maps[..., 0, 0]))
    (hidden.sum() + h.sum() + maps.square().sum()).backward()
    assert operands[5].grad.isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float64), (torch.float64, torch.float32)],
    ids=str,
)
def test_a_temperature_of_another_dtype(recurrence_place, dtype, wide):
    """Its gradient has its own dtype, and is not rounded to the features'."""
    operands, options = sequence(dtype=dtype, device=recurrence_place.device)
    t = torch.tensor(0.7, dtype=wide, device=recurrence_place.device, requires_grad=True)
    hidden, _, _ = attention_lstm(*operands, temperature=t, **options)
    weight = torch.linspace(-1, 1, hidden.numel(), device=t.device).view(hidden.shape)
    (hidden.to(weight.dtype) * weight).sum().backward()
    exact = torch.tensor(0.7, dtype=torch.float64, device=t.device, requires_grad=True)
    same = [
        x.detach().double() if torch.is_tensor(x) else tuple(s.detach().double() for s in x) for x in operands
    ]
    with fusednn.use_backend("reference"):
        hidden, _, _ = attention_lstm(*same, temperature=exact, **options)
    (hidden * weight).sum().backward()
    assert t.grad.dtype == wide
    tolerance = {torch.bfloat16: 5e-2, torch.float32: 1e-5, torch.float64: 1e-6}[dtype]
    torch.testing.assert_close(t.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)


def test_compiled_under_autocast():
    torch.manual_seed(0)
    layer = fusednn.AttentionLSTM(3, 2, 2, 5, learn_temperature=True, temperature=0.5)
    x, w = torch.randn(2, 3, 3, 2, 2), torch.randn(2, 3, 5)
    found = []
    for call in (layer, torch.compile(layer, fullgraph=True)):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = call(x)[0]
        (out.float() * w).sum().backward()
        found.append(layer.attention.log_temperature.grad.clone())
    torch.testing.assert_close(found[1], found[0], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("temperature", [1e300, 1e-300, float("inf")])
def test_temperatures_beyond_float32(recurrence_place, temperature):
    layer = fusednn.AttentionLSTM(3, 2, 2, 4, temperature=temperature).to(recurrence_place.device)
    x = torch.randn(2, 3, 3, 2, 2, device=recurrence_place.device, requires_grad=True)
    hidden, maps, _ = layer(x)
    torch.testing.assert_close(maps.sum((3, 4)), torch.ones_like(maps[..., 0, 0]))
    hidden.sum().backward()
    assert x.grad.isfinite().all()


def test_lengths_that_are_none():
    layer = fusednn.AttentionLSTM(3, 2, 2, 4)
    hidden, _, _ = layer(torch.randn(0, 3, 3, 2, 2), lengths=[])
    assert hidden.shape == (0, 3, 4)
    with pytest.raises(TypeError, match=r"integers, got torch\.complex128"):
        layer(torch.randn(1, 3, 3, 2, 2), lengths=torch.ones(1, dtype=torch.complex128))
    h = torch.zeros(1, 4)
    with pytest.raises(TypeError, match="got tuple of Tensor, NoneType"):
        layer(torch.randn(1, 3, 3, 2, 2), (h, None))


@pytest.mark.costly
@pytest.mark.in_turn
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("encoder", ["plain", "separable"])
def test_driving_net_in_one_graph(encoder, training):
    torch.manual_seed(0)
    net = DrivingNet(4, encoder, image_size=(32, 16)).train(training)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    frames = torch.randn(2, 3, 3, 32, 16)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(compiled(frames)[0], net(frames)[0], rtol=1e-4, atol=1e-5)


def test_folding_leaves_tracers_and_errors_to_torch():
    layer = ConvNormReLU(3, 4, 3).eval()
    x = torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        expected = layer(x)
        traced = torch.fx.experimental.proxy_tensor.make_fx(lambda y: layer(y))(x)
        torch.testing.assert_close(traced(x), expected)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert layer(mode.from_tensor(x)).shape == expected.shape
        torch.testing.assert_close(layer(x), expected)
        with pytest.raises(ValueError, match="expected 4D input"):
            layer(x[0])
    assert isinstance(layer.conv, nn.Conv2d)
