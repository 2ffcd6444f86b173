"""What a block checks once for the same sizes is checked again for others."""

import pytest
import torch

from .test_block import images, pair


def test_options_changed_between_calls():
    """What was checked for one geometry is checked again for another, lists that are written to included."""
    block, composite = pair("mobilenet")
    x = images("mobilenet")
    for module in (block, composite):
        module.eval()
        module.depthwise.stride = [1, 1]
    torch.testing.assert_close(block(x), composite(x), rtol=1e-4, atol=1e-4)
    for change in ({"stride": (2, 1)}, {"dilation": (2, 2)}, {"padding": (3, 0)}, {"padding": "valid"}):
        for module in (block, composite):
            if "stride" in change:
                module.depthwise.stride[:] = change["stride"]
            else:
                vars(module.depthwise).update(change)
        torch.testing.assert_close(block(x), composite(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        block(x[:, :, :4])


@pytest.mark.parametrize("channels", [0, 3, 10, 15])
def test_channels_that_dont_fit(channels):
    block, composite = pair("multiplier")
    with pytest.raises(RuntimeError) as ours:
        block.eval()(torch.zeros(1, channels, 5, 5))
    with pytest.raises(RuntimeError) as theirs:
        composite.eval()(torch.zeros(1, channels, 5, 5))
    assert str(ours.value) == str(theirs.value)
