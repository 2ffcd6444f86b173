"""DepthwiseConv2d and DepthwiseConv1d where torch's were: constructor, padding modes, layouts, samples."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import fusednn
from fusednn.functional import depthwise_conv1d

from .cases import ACTIVATIONS, TORCH_ACTIVATIONS

OPTIONS = [
    {},
    {"padding": 1},
    {"padding": "same"},
    {"padding": "valid", "stride": 2},
    {"stride": 3, "padding": 2, "dilation": 2},
    {"bias": False},
    *({"padding": 2, "padding_mode": mode} for mode in ("reflect", "replicate", "circular")),
    {"padding": "same", "padding_mode": "reflect", "dilation": 2},
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


def pair(dims: int, channels=(4, 8), kernel=3, device="cpu", **options):
    """Return fusednn's module and torch's with the same parameters."""
    ours = {1: fusednn.DepthwiseConv1d, 2: fusednn.DepthwiseConv2d}[dims](*channels, kernel, **options)
    theirs = {1: nn.Conv1d, 2: nn.Conv2d}[dims](*channels, kernel, groups=channels[0], **options)
    theirs.load_state_dict(ours.state_dict())
    return ours.to(device), theirs.to(device)


def assert_same(ours: nn.Module, theirs: nn.Module, x: torch.Tensor) -> None:
    """Check results, strides and gradients."""
    results = []
    for module in (ours, theirs):
        module.zero_grad()
        leaf = x.detach().requires_grad_()
        out = module(leaf)
        grads = torch.autograd.grad(out.square().sum(), [leaf, *module.parameters()])
        results.append([out, *grads])
    assert results[0][0].stride() == results[1][0].stride()
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


@every_option
@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("batch", [None, 0, 3])
def test_torchs_results(place, options, dims, batch):
    ours, theirs = pair(dims, device=place.device, **options)
    x = torch.randn(*(() if batch is None else (batch,)), 4, *(9, 8)[:dims], device=place.device)
    assert_same(ours, theirs, x)


@every_option
def test_is_torchs_class(options):
    for dims in (1, 2):
        torch.manual_seed(1)
        ours, _ = pair(dims, **options)
        torch.manual_seed(1)
        theirs = {1: nn.Conv1d, 2: nn.Conv2d}[dims](4, 8, 3, groups=4, **options)
        assert isinstance(ours, type(theirs))
        assert ours.extra_repr() == theirs.extra_repr()
        for (name, a), (other, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            assert name == other
            assert a.equal(b)


def test_groups():
    """Positional as in torch, left out, or wrong."""
    assert fusednn.DepthwiseConv2d(4, 8, 3, 1, 1, 1, 4, False, "reflect").bias is None
    assert fusednn.DepthwiseConv2d(4, 8, 3).groups == 4
    for groups in (1, 2, 8):
        with pytest.raises(ValueError, match=f"groups: got {groups}, expected in_channels = 4"):
            fusednn.DepthwiseConv2d(4, 8, 3, groups=groups)
    with pytest.raises(ValueError, match="out_channels must be divisible by groups"):
        fusednn.DepthwiseConv2d(4, 6, 3)
    with pytest.raises(ValueError, match="activation: got 'swish'"):
        fusednn.DepthwiseConv2d(4, 4, 3, activation="swish")
    with pytest.raises(TypeError):
        fusednn.DepthwiseConv2d(4, 4, 3, 1, 0, 1, 4, True, "zeros", None, None, "relu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(place, activation):
    ours, theirs = pair(2, device=place.device, padding=1)
    ours = fusednn.DepthwiseConv2d(4, 8, 3, padding=1, activation=activation).to(place.device)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, 7, 6, device=place.device)
    torch.testing.assert_close(ours(x), TORCH_ACTIVATIONS[activation](theirs(x)))
    assert f"activation={activation}" in repr(ours)


@pytest.mark.parametrize(
    "options", [{}, {"dilation": 3}, {"stride": 2}, {"padding_mode": "replicate"}], ids=str
)
def test_causal(place, options):
    """Padded at the front by torch; and no output knows what comes later."""
    ours = fusednn.DepthwiseConv1d(4, 8, 4, causal=True, activation="silu", **options).to(place.device)
    x = torch.randn(2, 4, 13, device=place.device)
    front = 3 * options.get("dilation", 1)
    mode = {"zeros": "constant"}.get(ours.padding_mode, ours.padding_mode)
    padded = F.pad(x, (front, 0), mode=mode)
    expected = F.silu(F.conv1d(padded, ours.weight, ours.bias, ours.stride, 0, ours.dilation, 4))
    torch.testing.assert_close(ours(x), expected)
    later = x.clone()
    later[..., 9:] = torch.nan
    seen = ours(later)[..., : 9 // options.get("stride", 1)]
    assert seen.equal(ours(x)[..., : seen.shape[-1]])


def test_causal_with_padding_is_refused():
    with pytest.raises(ValueError, match="padding: got 2"):
        fusednn.DepthwiseConv1d(4, 4, 3, padding=2, causal=True)
    with pytest.raises(ValueError, match="padding: got 2"):
        depthwise_conv1d(torch.zeros(1, 4, 9), torch.zeros(4, 1, 3), padding=2, causal=True)


def sliced(t):
    return torch.cat((t, t), 1)[:, t.shape[1] :]


def every_other(t):
    return torch.cat((t, t), -1)[..., ::2]


def transposed(t):
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last)


def sliced_channels_last(t):
    return channels_last(torch.cat((t, t), 1))[:, : t.shape[1]]


def expanded(t):
    return t[:1].expand(t.shape)


def expanded_channels(t):
    return t[:, :1].expand(t.shape)


LAYOUTS = (sliced, every_other, transposed, channels_last, sliced_channels_last, expanded, expanded_channels)


@pytest.mark.in_turn("layout")
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("last", [False, True], ids=["weight", "weight channels_last"])
@pytest.mark.parametrize("shape", [(3, 4, 9, 8), (1, 4, 6, 5), (3, 1, 6, 5)], ids=str)
def test_layouts(place, layout, last, shape):
    """Input layouts beside either layout of the weight: torch's results, strides and gradients."""
    ours, theirs = pair(2, (shape[1], 2 * shape[1]), (3, 2), place.device, padding=1)
    if last:
        ours, theirs = (m.to(memory_format=torch.channels_last) for m in (ours, theirs))
    x = layout(torch.randn(shape, device=place.device))
    assert_same(ours, theirs, x)


@pytest.mark.parametrize(
    "layout", [sliced, every_other, transposed, channels_last, expanded], ids=lambda f: f.__name__
)
def test_layouts_of_the_results_gradient(place, layout):
    ours, theirs = pair(2, device=place.device, padding=1)
    x = torch.randn(3, 4, 9, 8, device=place.device)
    grad = layout(torch.randn(3, 8, 9, 8, device=place.device))
    found = [torch.autograd.grad(m(x), list(m.parameters()), grad) for m in (ours, theirs)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_copies_files_and_parametrizations():
    ours, theirs = pair(2, padding=1)
    x = torch.randn(2, 4, 7, 6)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied) is fusednn.DepthwiseConv2d
        assert_same(copied, theirs, x)
    normed = [parametrizations.weight_norm(m) for m in (ours, theirs)]
    assert_same(*normed, x)


def _samples(function: str):
    common = pytest.importorskip("torch.testing._internal.common_modules")
    (info,) = (i for i in common.module_db if i.module_cls is nn.Conv2d)
    return getattr(info, function)


@pytest.mark.parametrize("training", [True, False])
def test_torchs_module_info_samples(place, training):
    """Torch's own samples for nn.Conv2d, those made depthwise by groups."""
    samples = _samples("module_inputs_func")(
        None, place.device, torch.float64, requires_grad=True, training=training
    )
    checked = 0
    for sample in samples:
        arguments = sample.constructor_input
        torch.manual_seed(7)
        theirs = nn.Conv2d(*arguments.args, **arguments.kwargs).to(place.device, torch.float64)
        channels = theirs.in_channels
        kwargs = {**arguments.kwargs, "groups": channels}
        args = (channels, 2 * channels, *arguments.args[2:])
        theirs = nn.Conv2d(*args, **kwargs).to(place.device, torch.float64)
        ours = fusednn.DepthwiseConv2d(*args, **kwargs).to(place.device, torch.float64)
        ours.load_state_dict(theirs.state_dict())
        assert_same(ours, theirs, sample.forward_input.args[0])
        checked += 1
    assert checked
