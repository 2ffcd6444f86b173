"""Offsets beyond 2^32 elements: of a sparse file, whose pages exist where they were written.

The CPU kernels bring whole rows in, so they get many images beyond 2^31 elements: memory that nobody has
written to is read from one page of zeros.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fusednn
from fusednn.core import native as _native

FORMATS = {False: (1, 66_000, 13_190), True: (8, 23_300, 4_659)}  # channels, height = width, stride
WINDOWS, KERNEL = 6, 3


@pytest.fixture(params=FORMATS, ids=["nchw", "nhwc"])
def large(request, tmp_path):
    """Return a function of a place: zeros, a view of the windows that a convolution reads, the stride."""
    channels, side, stride = FORMATS[request.param]
    assert ((WINDOWS - 1) * stride + KERNEL - 1) * (side + 1) * channels > 1 << 32

    def made(place):
        if place.backend in ("reference", "cpu"):
            pytest.skip("rows of this length need more memory than there is: test_many_images")
        size = (1, side, side, channels) if request.param else (1, channels, side, side)
        if place.device == "cpu":
            count = channels * side * side
            flat = torch.from_file(str(tmp_path / "zeros"), True, count, dtype=torch.float16)
        else:
            flat = torch.zeros(channels * side * side, dtype=torch.float16, device=place.device)
        x = flat.view(size).permute(0, 3, 1, 2) if request.param else flat.view(size)
        _, c, y, x_ = x.stride()
        strides = (0, c, stride * y, stride * x_, y, x_)
        windows = x.as_strided((1, channels, WINDOWS, WINDOWS, KERNEL, KERNEL), strides)
        windows.copy_(small_integers(windows.shape, 1))
        return x, windows, stride

    return made


def small_integers(size, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, tuple(size), generator=generator).half()


def test_depthwise_windows_far_apart(place, large):
    x, windows, stride = large(place)
    weight = small_integers((x.shape[1], 1, KERNEL, KERNEL), 2).to(x.device)
    geometry = ((stride, stride), (0, 0, 0, 0), (1, 1), "none")
    out = torch.ops.fusednn.depthwise_conv2d_forward(x, weight, None, *geometry)
    expected = torch.einsum("ncyxuv,cuv->ncyx", windows.double(), weight[:, 0].double())
    assert expected[0, 0, -1, -1] != 0
    assert out.double().equal(expected)

    grad = small_integers(out.shape, 3).to(x.device)
    backward = torch.ops.fusednn.depthwise_conv2d_backward
    _, found, _ = backward(grad, x, weight, None, *geometry, [False, True, True])
    expected = torch.einsum("ncyxuv,ncyx->cuv", windows.double(), grad.double())
    assert found[:, 0].double().equal(expected)


def test_block_windows_far_apart(place, large):
    x, windows, stride = large(place)
    channels = x.shape[1]
    weight, pointwise = small_integers((channels, 1, KERNEL, KERNEL), 2), torch.eye(channels).half()
    out = torch.ops.fusednn.separable_conv2d_forward(
        x, weight.to(x.device), None, pointwise[:, :, None, None].to(x.device), None, None,
        (stride, stride), (0, 0, 0, 0), (1, 1), "none", "none",
    )  # fmt: skip
    expected = torch.einsum("ncyxuv,cuv->ncyx", windows.double(), weight[:, 0].to(x.device).double())
    assert out.double().equal(expected)


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
def test_many_images(last):
    n, channels, side, stride = 140, 16, 1024, 256
    if _native.extension is None:
        pytest.skip("no extension: tests/test_native.py demands one")
    flat = torch.empty(n * channels * side * side, dtype=torch.float16)
    assert flat.numel() > 1 << 31
    x = flat.view(n, side, side, channels).permute(0, 3, 1, 2) if last else flat.view(n, channels, side, side)
    image, weight = small_integers(x.shape[1:], 1), small_integers((channels, 1, KERNEL, KERNEL), 2)
    x[-1] = image
    geometry, pointwise = ((stride,) * 2, (0,) * 4, (1, 1)), torch.eye(channels).half()[:, :, None, None]
    expected = F.conv2d(image[None].double(), weight.double(), stride=stride, groups=channels)
    ops = torch.ops.fusednn
    with fusednn.use_backend("cpu"):
        out = ops.depthwise_conv2d_forward(x, weight, None, *geometry, "none")
        assert out[-1:].double().equal(expected)
        assert not out[:-1].any()
        block = (None, pointwise, None, None, *geometry, "none", "none")
        assert ops.separable_conv2d_forward(x, weight, *block).equal(out)
        grad = small_integers(out.shape, 3)
        _, found, _ = ops.depthwise_conv2d_backward(
            grad, x, weight, None, *geometry, "none", [False, True, True]
        )
    w = weight.double().requires_grad_()
    F.conv2d(image[None].double(), w, stride=stride, groups=channels).backward(grad[-1:].double())
    assert found.double().equal(w.grad)
