"""Depthwise convolution: cases by hand, then a matrix of shapes, options, dtypes and backends."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

import fusednn
from fusednn.conv.shapes import output_size
from fusednn.functional import depthwise_conv2d

from .cases import ACTIVATIONS, DTYPES, check, make, run, torch_step
from .extended import extended_results

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
X = torch.tensor([[2.0, 5, 4, 1], [3, 1, 2, 0], [4, 5, 7, 1], [1, 2, 3, 4]])


def by_hand(kernel, **options):
    return depthwise_conv2d(X[None, None], torch.tensor(kernel, dtype=torch.float32)[None, None], **options)


def test_stride_by_hand(place):
    out = by_hand([[1, 0], [0, 1]], stride=2)
    assert out.tolist() == [[[[3, 4], [6, 11]]]]


def test_padding_by_hand(place):
    """Window (y, x) covers rows 2y-2 and 2y-1, columns 2x-2 and 2x-1: upper left less lower right."""
    out = by_hand([[1, 0], [0, -1]], padding=2, stride=2)
    zeros = [0, 0, 0, 0]
    assert out.tolist() == [[[zeros, [0, 1, 4, 0], [0, 2, 3, 0], zeros]]]


def test_multiplier_and_bias_by_hand(place):
    """Channel 0 gives outputs 0 and 1, channel 1 outputs 2 and 3."""
    x = torch.stack((X, 10 * X))[None]
    weight = torch.tensor([1.0, 2, 3, 4]).view(4, 1, 1, 1)
    out = depthwise_conv2d(x, weight, torch.tensor([0.0, 1, 0, -1]))
    expected = torch.stack((X, 2 * X + 1, 30 * X, 40 * X - 1))[None]
    assert out.equal(expected)


def test_asymmetric_same_by_hand(place):
    """An even kernel pads one more behind than in front."""
    out = by_hand([[1, 1], [1, 1]], padding="same")
    padded = F.pad(X, (0, 1, 0, 1))
    assert out[0, 0].equal(padded[:-1, :-1] + padded[1:, :-1] + padded[:-1, 1:] + padded[1:, 1:])


def test_output_sizes():
    """floor((n + 2p - d (k - 1) - 1) / s) + 1, counted here by the windows that fit."""
    for n in range(1, 12):
        for k, s, p, d in (
            (1, 1, 0, 1),
            (3, 2, 1, 1),
            (3, 1, 2, 2),
            (5, 3, 4, 1),
            (2, 5, 0, 3),
            (4, 2, 3, 2),
        ):
            starts = [i for i in range(0, n + 2 * p, s) if i + d * (k - 1) < n + 2 * p]
            if not starts:
                continue
            assert output_size((n, n), (k, k), (s, s), (p,) * 4, (d, d)) == (len(starts),) * 2
            out = depthwise_conv2d(torch.zeros(1, 1, n, 1), torch.zeros(1, 1, k, 1), None, (s, 1), (p, 0), d)
            assert out.shape == (1, 1, len(starts), 1)


def test_parameter_counts():
    """k² C + C C' for a separable block, k² C C' for a full convolution."""
    for k, c, c_out in ((3, 32, 64), (5, 7, 13), (1, 4, 4)):
        block = fusednn.DepthwiseSeparableConv2d(c, c_out, k, bias=False, norm=None, pointwise_norm=None)
        full = nn.Conv2d(c, c_out, k, bias=False)
        assert sum(p.numel() for p in block.parameters()) == k * k * c + c * c_out
        assert sum(p.numel() for p in full.parameters()) == k * k * c * c_out


# N C H W, kernel, options.
CASES = {
    **{f"C={c}": ((2, c, 6, 7), (3, 3), {"padding": 1}) for c in (1, 7, 13, 31, 33, 127, 129, 257)},
    "7x7": ((2, 33, 15, 14), (7, 7), {"padding": 3}),
    "5x5 stride 2": ((2, 33, 15, 14), (5, 5), {"padding": 2, "stride": 2}),
    "11x11": ((1, 3, 12, 13), (11, 11), {"padding": 5}),
    "even": ((2, 9, 8, 8), (2, 4), {"padding": (1, 2)}),
    "1x1": ((2, 9, 5, 5), (1, 1), {}),
    "row": ((2, 9, 8, 8), (1, 5), {"padding": (0, 2)}),
    "column": ((2, 9, 8, 8), (5, 1), {"padding": (2, 0), "stride": (2, 1)}),
    "kernel larger than the image": ((2, 9, 3, 2), (5, 5), {"padding": 2}),
    "padding beyond the kernel": ((2, 9, 4, 4), (3, 3), {"padding": 4}),
    "stride beyond the kernel": ((2, 9, 11, 10), (2, 3), {"stride": (3, 5)}),
    "dilation wider than the image": ((2, 9, 5, 6), (3, 3), {"padding": 7, "dilation": 7}),
    "atrous": ((2, 9, 20, 21), (3, 3), {"padding": 6, "dilation": 6}),
    "same": ((2, 9, 7, 8), (4, 5), {"padding": "same", "dilation": (1, 2)}),
    "valid": ((2, 9, 7, 8), (4, 5), {"padding": "valid", "stride": 2}),
    "one pixel": ((2, 9, 1, 1), (3, 3), {"padding": 1}),
    "batch 0": ((0, 9, 5, 5), (3, 3), {"padding": 1}),
    "batch 5": ((5, 16, 9, 9), (3, 3), {"stride": 2}),
    "wide": ((1, 5, 3, 200), (3, 3), {"padding": 1}),
    "tall": ((1, 5, 200, 3), (3, 3), {"padding": 1, "stride": (1, 2)}),
}


@pytest.mark.in_turn("case")
@every_dtype
@pytest.mark.parametrize("case", CASES)
def test_matches_the_oracle(place, case, dtype):
    shape, kernel, options = CASES[case]
    check(make(shape, kernel, dtype=dtype, device=place.device, activation="silu", **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_31x31(place, dtype):
    """Forward only: beyond the kernels under test, torch's own backward takes minutes here."""
    size = (3, 31) if place.name == "triton-interpreted" else (31, 31)
    padding = size[0] // 2, size[1] // 2
    work = make((1, 3, 33, 40), size, dtype=dtype, device=place.device, padding=padding)
    check(work, wanted=())


@pytest.mark.in_turn("activation")
@every_dtype
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_activations(place, activation, dtype):
    work = make((2, 7, 9, 8), dtype=dtype, device=place.device, padding=1, activation=activation)
    check(work.with_(input=work.tensors["input"] * 3))


@pytest.mark.in_turn("multiplier")
@every_dtype
@pytest.mark.parametrize("multiplier", [2, 3, 8])
def test_multipliers(place, multiplier, dtype):
    options = {"padding": 1, "stride": 2, "activation": "relu"}
    check(make((2, 5, 9, 8), (3, 3), multiplier, dtype=dtype, device=place.device, **options))


@every_dtype
def test_without_bias(place, dtype):
    check(
        make((2, 17, 9, 8), bias=False, dtype=dtype, device=place.device, padding=1, activation="hardswish")
    )


@st.composite
def works(draw):
    def sizes(least, most):
        return draw(st.integers(least, most)), draw(st.integers(least, most))

    kernel, dilation, padding = sizes(1, 7), sizes(1, 4), sizes(0, 8)
    stride = draw(st.integers(1, kernel[0] + 2)), draw(st.integers(1, kernel[1] + 2))
    image = sizes(1, 17)
    fits = all(n + 2 * p > d * (k - 1) for n, p, d, k in zip(image, padding, dilation, kernel, strict=True))
    assume(fits)
    dtype = draw(st.sampled_from(DTYPES))
    assume(kernel != (1, 1) or dtype.itemsize > 2)  # torch's own 1x1 of 16 bits crashes where it is padded
    channels = draw(st.sampled_from([1, 2, 3, 7, 8, 13, 16, 31, 33, 64, 129]))
    return make(
        (draw(st.integers(0, 3)), channels, *image),
        kernel,
        draw(st.sampled_from([1, 1, 1, 2, 3])),
        draw(st.booleans()),
        dtype,
        stride=stride,
        padding=padding,
        dilation=dilation,
        activation=draw(st.sampled_from([None, *ACTIVATIONS])),
    ), draw(st.sampled_from(["contiguous_format", "channels_last"]))


def _generated(place, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(drawn=works())
    def checked(drawn):
        work, memory_format = drawn
        last = getattr(torch, memory_format)
        place_work = work.map(lambda t: t.to(place.device))
        input = place_work.tensors["input"].contiguous(memory_format=last)
        check(place_work.with_(input=input))

    checked()


def test_generated(place):
    _generated(place, 12 if place.backend == "triton" else 150)


def test_extended_oracle_is_torchs_convolution():
    """The oracle of float64 itself, against PyTorch's independent one."""
    for activation in (None, *ACTIVATIONS):
        options = {"stride": (2, 1), "padding": (1, 3), "dilation": (1, 2), "activation": activation}
        work = make((2, 3, 9, 8), (3, 4), 2, dtype=torch.float64, **options)
        oracle = extended_results(work)
        for name, expected in run(torch_step, work).items():
            torch.testing.assert_close(oracle[name], expected, rtol=1e-12, atol=1e-13)


def test_unbatched(place):
    work = make((1, 9, 8, 7), padding=1, activation="relu6", device=place.device)
    tensors = {**work.tensors, "input": work.tensors["input"][0]}
    single = depthwise_conv2d(*tensors.values(), **work.options)
    batch = depthwise_conv2d(*work.tensors.values(), **work.options)
    assert single.shape == batch.shape[1:]
    assert single.equal(batch[0])


@pytest.mark.in_turn("activation")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_odd_values_reach_the_windows_that_hold_them(place, activation, value):
    """And no others; ReLU6 keeps NaN."""
    work = make((2, 5, 8, 8), padding=1, activation=activation, device=place.device)
    x = work.tensors["input"].clone()
    x[1, 2, 4, 4] = value
    x[0, 0, 0, 0] = value
    bad = work.with_(input=x)
    actual, expected = run(_fused, bad, ()), run(torch_step, bad, ())
    out, torchs = actual["output"], expected["output"]
    if activation == "gelu":  # torch's vectors make NaN of gelu(inf), its scalars inf
        assert torch.equal(out.isfinite(), torchs.isfinite())
        out, torchs = out.where(out.isfinite(), 0), torchs.where(torchs.isfinite(), 0)
    torch.testing.assert_close(out, torchs, equal_nan=True)
    if value != value:
        assert actual["output"][1, 2, 3:6, 3:6].isnan().all()
        assert int(actual["output"].isnan().sum()) == 9 + 4


def _fused(tensors, options):
    return depthwise_conv2d(*tensors.values(), **options)


@pytest.mark.natively
@every_dtype
def test_repeats_in_every_bit(place, dtype):
    work = make((3, 33, 14, 15), (5, 5), dtype=dtype, device=place.device, padding=2, activation="gelu")
    first = run(_fused, work)
    before = torch.get_num_threads()
    try:
        # PyTorch's own sums depend on the number of threads, and devices know none.
        for threads in (1, 2, 3) if place.backend == "cpu" else (before,):
            torch.set_num_threads(threads)
            for name, t in run(_fused, work.map(torch.clone)).items():
                assert t.equal(first[name]), f"{threads} threads: {name}"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
def test_more_work_than_threads(place, last):
    """CUDA threads then make more rows, or more strips, each."""
    if place.backend != "cuda":
        pytest.skip("a matter of the CUDA kernels")
    x = torch.randn(64, 128, 17, 29, device=place.device)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    weight, bias = torch.randn(128, 1, 3, 3, device=place.device), torch.randn(128, device=place.device)
    expected = F.conv2d(x, weight, bias, padding=1, groups=128)
    torch.testing.assert_close(depthwise_conv2d(x, weight, bias, padding=1), expected, rtol=1e-5, atol=1e-5)


def test_more_elements_than_32_bits_count():
    """Sizes beyond 2³¹ elements, of memory that does not exist."""
    x = torch.empty(1 << 12, 64, 96, 96, device="meta")
    assert x.numel() > 1 << 31
    out = depthwise_conv2d(x, torch.empty(64, 1, 3, 3, device="meta"), stride=2, padding=1)
    assert out.shape == (1 << 12, 64, 48, 48)
