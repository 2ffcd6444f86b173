"""``nn.Conv2d`` and ``nn.Conv1d`` with a filter, or several, for each channel, on fused kernels."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from . import checks, functional


class _Depthwise:
    """What the layers share: torch's constructor, in which ``groups`` may be left out, and an activation."""

    activation: str | None = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int | None = None,
        bias: bool = True,
        padding_mode: Any = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
    ) -> None:
        name = type(self).__name__
        checks.activation_name(name, "activation", activation)
        if groups is not None and groups != in_channels:
            raise ValueError(f"{name}: groups: got {groups}, expected in_channels = {in_channels}, or None")
        sizes: Any = (in_channels, out_channels, kernel_size, stride, padding, dilation, in_channels)
        super().__init__(*sizes, bias, padding_mode, device, dtype)  # type: ignore[call-arg]
        if activation is not None:
            self.activation = activation

    def extra_repr(self) -> str:
        """Describe the layer as torch does, and its activation."""
        described = super().extra_repr()  # type: ignore[misc]
        return described + (f", activation={self.activation}" if self.activation else "")


class DepthwiseConv2d(_Depthwise, nn.Conv2d):
    r"""A drop-in for :class:`torch.nn.Conv2d` with ``groups == in_channels``.

    The constructor is ``nn.Conv2d``'s, in the same order, so that changing the import is enough. ``groups``
    may be left out, and then is ``in_channels``; any other value raises. ``out_channels`` is a multiple of
    ``in_channels``: the channel multiplier. Stride, padding (ints, pairs, ``"same"``, ``"valid"``), dilation,
    ``padding_mode`` and bias are as in torch.

    Args:
        activation: keyword-only: applied to the result, in the same pass: None, ``"relu"``, ``"relu6"``,
            ``"silu"``, ``"hardswish"``, ``"gelu"`` or ``"gelu_tanh"``.

    Shapes:
        input ``[N, C, H, W]`` or ``[C, H, W]``; returns ``[N, C m, H', W']`` or ``[C m, H', W']`` with
        ``H' = floor((H + 2 padding - dilation (k - 1) - 1) / stride) + 1``, in torch's memory format.

    Dtypes:
        float32, float64; bfloat16 and float16 with float32 accumulation.

    Raises:
        ValueError: ``groups`` is not ``in_channels``, ``out_channels`` no multiple of it, or there is no such
            activation.
        RuntimeError: a size, dtype or device does not fit; the text names the argument.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return functional.depthwise_conv2d(
            input, weight, bias, self.stride, padding, self.dilation, activation=self.activation
        )


class DepthwiseConv1d(_Depthwise, nn.Conv1d):
    r"""A drop-in for :class:`torch.nn.Conv1d` with ``groups == in_channels``; causal if asked.

    The constructor is ``nn.Conv1d``'s; ``groups`` as in :class:`DepthwiseConv2d`.

    Args:
        causal: keyword-only: pad by ``dilation (kernel_size - 1)`` at the front and not at the end, so that
            no output sees a later input; ``padding`` must be 0.
        activation: keyword-only: as in :class:`DepthwiseConv2d`.

    Shapes:
        input ``[N, C, L]`` or ``[C, L]``; returns ``[N, C m, L']`` or ``[C m, L']``.

    Dtypes:
        float32, float64; bfloat16 and float16 with float32 accumulation.

    Raises:
        ValueError: ``groups`` is not ``in_channels``, ``out_channels`` no multiple of it, ``causal`` comes
            with padding, or there is no such activation.
        RuntimeError: a size, dtype or device does not fit; the text names the argument.
    """

    causal: bool = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int | None = None,
        bias: bool = True,
        padding_mode: Any = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        causal: bool = False,
        activation: str | None = None,
    ) -> None:
        if causal and padding not in (0, (0,), [0], "valid"):
            raise ValueError(f"padding: got {padding!r}, expected 0 where causal=True pads the front")
        sizes = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        super().__init__(*sizes, bias, padding_mode, device, dtype, activation=activation)
        if causal:
            self.causal = True

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding: Any = self.padding
        causal = self.causal
        if self.padding_mode != "zeros":
            ends = self._reversed_padding_repeated_twice
            if causal:
                ends = [self.dilation[0] * (self.kernel_size[0] - 1), 0]
            input = F.pad(input, ends, mode=self.padding_mode)
            padding, causal = 0, False
        return functional.depthwise_conv1d(
            input,
            weight,
            bias,
            self.stride,
            padding,
            self.dilation,
            causal=causal,
            activation=self.activation,
        )

    def extra_repr(self) -> str:
        """Describe the layer as torch does, and what it adds."""
        return super().extra_repr() + (", causal=True" if self.causal else "")
