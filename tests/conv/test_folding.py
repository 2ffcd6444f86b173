"""Frozen norms that magnify: folded weights are not rounded to the input's 16 bits."""

import pytest
import torch

import fusednn
from fusednn.conv import shortcut


@pytest.mark.parametrize("way", ["shortcut", "general"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight", [3.25, 32.0])  # so that 9 of it are exact in 16 bits
def test_a_channel_that_hardly_varies(monkeypatch, way, dtype, weight):
    """Its norm multiplies by 1 / sqrt(eps) = 316 what is left of mean - mean."""
    if way == "general":
        monkeypatch.setattr(shortcut, "applies", lambda input: False)
    block = fusednn.DepthwiseSeparableConv2d(4, 6, 3, activation=None, pointwise_activation=None, dtype=dtype)
    x = torch.ones(2, 4, 6, 6, dtype=dtype)
    with torch.no_grad():
        block.depthwise.weight.fill_(weight)
        block.norm1.running_mean.fill_(9 * weight)
        block.norm1.running_var.zero_()
        expected = x
        for child in block.eval().children():
            expected = child(expected)
        torch.testing.assert_close(block(x), expected, rtol=0, atol=0.1)
