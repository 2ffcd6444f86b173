"""Bad input: torch's type of error, a text that names the argument, and never a crash."""

import pytest
import torch
import torch.nn.functional as F

from fusednn.functional import depthwise_conv1d, depthwise_conv2d, depthwise_separable_conv2d

X, W, B = torch.zeros(2, 4, 6, 6), torch.zeros(4, 1, 3, 3), torch.zeros(4)

# Arguments of conv2d, and what the text must name.
BAD = {
    "rank of input": ((X[0, 0], W), {}, "input"),
    "channels": ((X[:, :3], W), {}, "channels"),
    "no channels": ((X[:, :0], W), {}, "channels"),
    "rank of weight": ((X, W[0]), {}, "weight"),
    "weight between groups": ((X, torch.zeros(6, 1, 3, 3)), {}, "weight"),
    "weight across groups": ((X, torch.zeros(4, 2, 3, 3)), {}, "weight"),
    "no filters": ((X, W[:0]), {}, "weight"),
    "length of bias": ((X, W, B[:3]), {}, "bias"),
    "rank of bias": ((X, W, B[None]), {}, "bias"),
    "dtype of input": ((X.double(), W, B), {}, "input"),
    "dtype of weight": ((X, W.double()), {}, "weight"),
    "dtype of bias": ((X, W, B.double()), {}, "bias"),
    "integer input": ((X.long(), W), {}, "weight"),
    "no tensor": (("x", W), {}, "input"),
    "list for weight": ((X, [1.0]), {}, "weight"),
    "number for bias": ((X, W, 1.0), {}, "bias"),
    "zero stride": ((X, W), {"stride": 0}, "stride"),
    "negative stride": ((X, W), {"stride": (1, -1)}, "stride"),
    "three strides": ((X, W), {"stride": (1, 2, 3)}, "stride"),
    "fractional stride": ((X, W), {"stride": 1.5}, "stride"),
    "negative padding": ((X, W), {"padding": -1}, "padding"),
    "unknown padding": ((X, W), {"padding": "sme"}, "padding"),
    "strided same": ((X, W), {"padding": "same", "stride": 2}, "strided"),
    "zero dilation": ((X, W), {"dilation": 0}, "dilation"),
    "kernel beyond the image": ((X, W), {"dilation": 4}, "Kernel size"),
    "no rows": ((X[:, :, :0], W), {}, "Kernel size"),
}


@pytest.mark.parametrize("name", BAD)
def test_torchs_error(name):
    args, kwargs, named = BAD[name]
    with pytest.raises(Exception) as theirs:  # noqa: PT011  its type is what is asked
        F.conv2d(*args, **kwargs, groups=4)
    with pytest.raises(theirs.type, match=named):
        depthwise_conv2d(*args, **kwargs)


@pytest.mark.parametrize("device", ["weight", "bias"])
def test_another_device(device):
    args = (X, W.to("meta"), B) if device == "weight" else (X, W, B.to("meta"))
    with pytest.raises(RuntimeError, match=f"{device} on meta"):
        depthwise_conv2d(*args)


def test_activation():
    with pytest.raises(ValueError, match="activation: got 'tanh'"):
        depthwise_conv2d(X, W, activation="tanh")
    with pytest.raises(TypeError, match="activation"):
        depthwise_conv2d(X, W, activation=F.relu)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "named"),
    [
        ((torch.zeros(4), torch.zeros(4, 1, 3)), {}, RuntimeError, "input"),
        ((torch.zeros(1, 4, 9), torch.zeros(4, 1, 3, 1)), {}, RuntimeError, "weight"),
        ((torch.zeros(1, 4, 9), torch.zeros(4, 1, 3)), {"stride": (1, 1)}, RuntimeError, "stride"),
        ((torch.zeros(1, 4, 9), torch.zeros(4, 1, 3)), {"dilation": 9}, RuntimeError, "Kernel size"),
        ((torch.zeros(1, 4, 9), torch.zeros(4, 1, 3)), {"padding": 1.0}, TypeError, "padding"),
    ],
)
def test_sequences(args, kwargs, error, named):
    with pytest.raises(error):
        F.conv1d(*args, **kwargs, groups=4)
    with pytest.raises(error, match=named):
        depthwise_conv1d(*args, **kwargs)


P = torch.zeros(5, 4, 1, 1)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "named"),
    [
        ((X, W, P[:, :3]), {}, RuntimeError, "pointwise_weight"),
        ((X, W, torch.zeros(5, 4, 3, 3)), {}, RuntimeError, "pointwise_weight"),
        ((X, W, P, B, B), {}, RuntimeError, "pointwise_bias"),
        ((X, W, P.double()), {}, RuntimeError, "pointwise_weight"),
        ((X, W, P), {"residual": X}, RuntimeError, "residual has shape"),
        ((X, W, P), {"residual": torch.zeros(2, 5, 1, 1)}, RuntimeError, "residual has shape"),
        ((X, W, None), {}, TypeError, "pointwise_weight"),
        ((X, W, P), {"pointwise_activation": "x"}, ValueError, "pointwise_activation: got 'x'"),
        ((X, W, P), {"padding": "same", "stride": 2}, RuntimeError, "strided"),
    ],
)
def test_blocks(args, kwargs, error, named):
    with pytest.raises(error, match=named):
        depthwise_separable_conv2d(*args, **kwargs)
