"""The block on devices: the fused kernel, where it ends and the composite begins, TF32, training."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusednn.conv import reference
from fusednn.testing import assert_close_to_oracle

from .test_block import images, pair, step

Block = tuple[Any, ...]  # arguments of separable_conv2d_forward


@pytest.fixture
def device_place(place):
    if place.backend not in ("cuda", "triton"):
        pytest.skip("the kernels of the devices are under test")
    return place


def block(
    channels: int, outputs: int, kernel: int, dtype: torch.dtype, device: str, last: bool = False
) -> Block:
    generator = torch.Generator().manual_seed(channels + outputs)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    x = normal(2, channels, 5, 6)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    weights = normal(channels, 1, kernel, kernel) / kernel, normal(outputs, channels, 1, 1) / channels**0.5
    pad = ((1, 1), (kernel // 2, (kernel - 1) // 2) * 2, (1, 1))
    biases, residual = (normal(channels), normal(outputs)), normal(2, outputs, 5, 6)
    return (x, weights[0], biases[0], weights[1], biases[1], residual, *pad, "silu", "relu6")


def checked(args: Block) -> None:
    wide = tuple(a.double() if isinstance(a, Tensor) else a for a in args)
    oracle = reference.separable_conv2d_forward(*wide)
    x, w1, b1, w2, b2, residual, _, (top, bottom, left, right), *_ = args
    y = F.silu(F.conv2d(F.pad(x, (left, right, top, bottom)), w1, b1, groups=x.shape[1]))
    same_dtype = F.relu6(F.conv2d(y, w2, b2)) + residual
    assert_close_to_oracle(torch.ops.fusednn.separable_conv2d_forward(*args), same_dtype, oracle)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("channels", "outputs", "storage"),
    [
        (33, 65, torch.float16),
        (40, 257, torch.bfloat16),
        (16, 96, torch.float32),
        (8, 200, torch.float32),
        (64, 64, torch.bfloat16),
        (9, 1, torch.float16),
    ],
)
def test_every_tiling(device_place, channels, outputs, storage, channels_last):
    checked(block(channels, outputs, 3, storage, device_place.device, channels_last))


@pytest.mark.parametrize(
    ("outputs", "kernel", "storage"),
    [(520, 3, torch.float16), (300, 3, torch.float32), (5, 3, torch.float64), (5, 8, torch.float32)],
)
def test_beyond_the_fused_kernel(device_place, outputs, kernel, storage):
    checked(block(6, outputs, kernel, storage, device_place.device))


@pytest.fixture
def tf32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def rounded_to_tf32(t: Tensor) -> Tensor:
    return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("outputs", [24, 72])
def test_tf32_where_it_is_allowed(device_place, tf32, outputs, channels_last):
    if device_place.name == "triton-interpreted":
        pytest.skip("the interpreter's products are float32")
    args = block(19, outputs, 3, torch.float32, device_place.device, channels_last)
    x, w1, b1, w2, b2, residual = args[:6]
    y = F.silu(F.conv2d(x, w1, b1, padding=1, groups=19))
    oracle = F.relu6(F.conv2d(rounded_to_tf32(y).double(), rounded_to_tf32(w2).double(), b2.double()))
    oracle = oracle + residual
    out = torch.ops.fusednn.separable_conv2d_forward(*args)
    # A y on the edge between two TF32 values may be rounded to either.
    torch.testing.assert_close(out.double(), oracle, rtol=1e-4, atol=1e-3)
    torch.backends.cuda.matmul.allow_tf32 = False
    exact = torch.ops.fusednn.separable_conv2d_forward(*args)
    assert (exact - oracle).abs().max() > (out - oracle).abs().max()


@pytest.mark.parametrize("case", ["mobilenet", "first norm", "second norm", "no norms"])
def test_training_around_the_depthwise_kernels(device_place, case):
    block, composite = pair(case, device_place.device, torch.float64)
    x = images(case, device_place.device, torch.float64, batch=2)
    torch.testing.assert_close(step(block, x), step(composite, x), rtol=1e-8, atol=1e-9)


def test_products_keep_their_dtype_under_autocast(device_place):
    """It chose the dtypes of the op's arguments; inside the op it has no more say."""
    x, w1, b1, w2, b2, residual, *geometry, act1, act2 = block(6, 5, 3, torch.float32, device_place.device)
    tensors = (x, w1, b1, None, None, w2, b2, None, None, residual)

    def trained():
        op = torch.ops.fusednn.separable_conv2d_train_forward
        return op(*tensors, *geometry, 1e-5, 1e-5, act1, act2, True, False)

    expected = trained()
    with torch.autocast(x.device.type, torch.bfloat16):
        for actual, t in zip(trained(), expected, strict=True):
            assert actual.equal(t)
