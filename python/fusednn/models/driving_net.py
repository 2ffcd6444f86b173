"""From camera frames to a control: convolutions, attention and an LSTM (Kim & Canny 2017)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..conv.block import DepthwiseSeparableConv2d
from ..core.checks import choice
from ..recurrence.modules import AttentionLSTM
from ..spatial import checks
from .layers import ConvNormReLU

State = tuple[Tensor, Tensor]

# Output channels, kernel size and stride of the encoder's layers; zeros pad by half of the kernel.
LAYERS = ((24, 5, 2), (36, 5, 2), (48, 3, 2), (64, 3, 1), (64, 3, 1))


class DrivingNet(nn.Module):
    r"""A driving controller that looks at each frame where its last state tells it to.

    Five convolutions with BatchNorm and ReLU encode all frames at once; for each step t, a softmax attention
    map over the features' positions from the features and h_{t-1}; the control
    ``u_t = Linear([f_t a_t, h_{t-1}])``; and an LSTM step on the attended features (Kim & Canny 2017).

    Args:
        hidden_size: of the LSTM.
        encoder: ``"plain"`` convolutions, or ``"separable"`` ones
            (:class:`fusednn.DepthwiseSeparableConv2d`).
        image_size: height and width of the frames.
        score: of the attention, ``"positional"`` or ``"additive"``.
        device: of the parameters.
        dtype: of the parameters.

    Shapes:
        frames ``[B, T, 3, 160, 80]``; returns the control ``[B, T, 1]``, the state ``(h, c)``, each
        ``[B, hidden_size]``, and, if asked for, maps ``[B, T, 1, 20, 10]``. The encoder's maps: 24×80×40,
        36×40×20, 48×20×10, 64×20×10, 64×20×10.

    In ``eval`` mode frames one at a time, with the state handed on, give the numbers of the whole sequence;
    in training the norms' statistics are those of all frames of a call.

    Raises:
        ValueError: there is no such encoder or score.
        RuntimeError: a size, dtype or device does not fit; the text names the argument.
    """

    def __init__(
        self,
        hidden_size: int = 128,
        encoder: str = "plain",
        *,
        image_size: Sequence[int] = (160, 80),
        score: str = "positional",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        choice("DrivingNet", "encoder", encoder, tuple(_ENCODER_LAYERS))
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.image_size = (int(image_size[0]), int(image_size[1]))
        layers, channels, (height, width) = [], 3, self.image_size
        for out, kernel, stride in LAYERS:
            layers.append(_ENCODER_LAYERS[encoder](channels, out, kernel, stride, **factory))
            channels, height, width = out, (height - 1) // stride + 1, (width - 1) // stride + 1
        self.encoder = nn.Sequential(*layers)
        self.attention_lstm = AttentionLSTM(channels, height, width, hidden_size, score=score, **factory)
        self.control = nn.Linear(channels * height * width + hidden_size, 1, **factory)

    def forward(self, frames: Tensor, state: State | None = None, return_attention: bool = False) -> Any:
        """Return the control and the state, and the maps if asked for.

        Args:
            frames: ``[B, T, 3, height, width]``.
            state: the ``(h, c)`` of an earlier call, to go on from there; None for zeros.
            return_attention: return ``(control, state, maps)``.
        """
        checks.check_images("DrivingNet", "frames", frames, "[B, T, 3, H, W]")
        if tuple(frames.shape[2:]) != (3, *self.image_size):
            raise RuntimeError(
                f"DrivingNet: frames has size {list(frames.shape)}, "
                f"expected frames of {[3, *self.image_size]}"
            )
        images = frames.flatten(0, 1)
        if images.device.type == "cpu" and images.dtype != torch.float64 and not self.training:
            # The faster format there. Training stays in the format of the frames, and so with the rounding,
            # and on the sides of ReLU's kinks, that torch's layers would have.
            images = images.contiguous(memory_format=torch.channels_last)
        features = self.encoder(images).unflatten(0, frames.shape[:2])  # [B, T, C, H, W]
        hidden, maps, last = self.attention_lstm(features, state)
        first = hidden.new_zeros(hidden[:, 0].shape) if state is None else state[0]
        before = torch.cat((first.unsqueeze(1), hidden[:, :-1]), dim=1)  # h_{t-1}
        attended = (features * maps).flatten(2)  # [B, T, C H W]
        control = self.control(torch.cat((attended, before), dim=2))
        return (control, last, maps) if return_attention else (control, last)


def _separable(channels: int, out: int, kernel: int, stride: int, **factory: Any) -> nn.Module:
    activations: Any = {"activation": "relu", "pointwise_activation": "relu"}
    return DepthwiseSeparableConv2d(channels, out, kernel, stride, kernel // 2, **activations, **factory)


_ENCODER_LAYERS: dict[str, Callable[..., nn.Module]] = {"plain": ConvNormReLU, "separable": _separable}
