"""Attend and recur: attention over the positions of an image inside an LSTM, alone and in a driving network.

B = batch, T = steps, C = channels, P = H W positions, S = hidden size, J = 4 S rows of the gates.

flops, matrix products and the map's products, a multiply-add being two:
    attention_lstm     2 B T (P (C + S) + P C + J (C P + S))
    driving_net        2 B T (sum over convolutions of k² C_in C_out pixels, and C P + S) + attention_lstm
    training           3 x forward

bytes, as benchmarks/cases/spatial.py has them for arguments A and results O:
    attention_lstm     A = B T C P + 2 B S + W, W = C + S P + P + J (C P + S + 2), O = B T (S + P) + 2 B S;
                       training also writes and reads B T 5 S, gates and cell states
    driving_net        A = B T (frame + E) + W, E = every layer's output once, O = B T (1)
"""

from __future__ import annotations

from collections import OrderedDict
from types import ModuleType

import torch
from torch import Tensor, nn

from benchmarks.cases.spatial import (
    HIDDEN,
    SpatialWorkload,
    TorchAttention,
    case_of,
    make_workload,
    total_bytes,
)
from benchmarks.registry import Case, Mode

# B, T, C, H, W
SEQUENCE = (4, 20, 64, 20, 10)
SHORT = (4, 4, 64, 20, 10)  # for the small suite: torch.compile unrolls the steps, minutes for twenty of them
# B, T
DRIVING = (4, 16)
# Output channels, kernel, stride; height and width of the output.
CONVOLUTIONS = [
    (24, 5, 2, 80, 40),
    (36, 5, 2, 40, 20),
    (48, 3, 2, 20, 10),
    (64, 3, 1, 20, 10),
    (64, 3, 1, 20, 10),
]


class TorchAttentionLSTM(nn.Module):
    """Attend, flatten, step: a loop over time."""

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.attention = TorchAttention(channels, height, width)
        self.cell = nn.LSTMCell(channels * height * width, HIDDEN)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Return hidden states, maps and the last state."""
        zeros = features.new_zeros(features.shape[0], HIDDEN)
        state, hidden, maps = (zeros, zeros), [], []
        for frame in features.unbind(1):
            attended, attention = self.attention(frame, state[0])
            state = self.cell(attended.flatten(1), state)
            hidden.append(state[0])
            maps.append(attention)
        return torch.stack(hidden, 1), torch.stack(maps, 1), state


class TorchDrivingNet(nn.Module):
    """Five convolutions, and the control beside each step of the recurrence."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for out, kernel, stride, _, _ in CONVOLUTIONS:
            conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)
            named = {"conv": conv, "norm": nn.BatchNorm2d(out), "activation": nn.ReLU()}
            layers.append(nn.Sequential(OrderedDict(named)))
            channels = out
        self.encoder = nn.Sequential(*layers)
        self.attention_lstm = TorchAttentionLSTM(channels, 20, 10)
        self.control = nn.Linear(channels * 200 + HIDDEN, 1)

    def forward(self, frames: Tensor) -> Tensor:
        """Return the control."""
        recurrence = self.attention_lstm
        zeros = frames.new_zeros(frames.shape[0], HIDDEN)
        state, control = (zeros, zeros), []
        for features in self.encoder(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).unbind(1):
            attended, _ = recurrence.attention(features, state[0])
            flat = attended.flatten(1)
            control.append(self.control(torch.cat((flat, state[0]), 1)))
            state = recurrence.cell(flat, state)
        return torch.stack(control, 1)


def sequence_flops(mode: Mode, shape: tuple[int, int, int, int, int]) -> int:
    """Flops of the recurrence."""
    b, t, c, h, w = shape
    p, rows = h * w, 4 * HIDDEN
    forward = 2 * b * t * (p * (2 * c + HIDDEN) + rows * (c * p + HIDDEN))
    return forward if mode == "inference" else 3 * forward


def sequence_bytes(mode: Mode, shape: tuple[int, int, int, int, int]) -> int:
    """Bytes of the recurrence."""
    b, t, c, h, w = shape
    p, rows = h * w, 4 * HIDDEN
    weights = c + HIDDEN * p + p + rows * (c * p + HIDDEN + 2)
    saved = 5 * b * t * HIDDEN
    return total_bytes(
        mode, b * t * c * p + 2 * b * HIDDEN + weights, b * t * (HIDDEN + p) + 2 * b * HIDDEN, saved
    )


def driving_flops(mode: Mode, shape: tuple[int, int]) -> int:
    """Flops of the network."""
    b, t = shape
    convolutions, channels = 0, 3
    for out, kernel, _, h, w in CONVOLUTIONS:
        convolutions += kernel * kernel * channels * out * h * w
        channels = out
    forward = 2 * b * t * (convolutions + channels * 200 + HIDDEN)
    recurrence = sequence_flops(mode, (b, t, channels, 20, 10))
    return (forward if mode == "inference" else 3 * forward) + recurrence


def driving_bytes(mode: Mode, shape: tuple[int, int]) -> int:
    """Bytes of the network."""
    b, t = shape
    parameters, outputs, channels = 0, 0, 3
    for out, kernel, _, h, w in CONVOLUTIONS:
        parameters += kernel * kernel * channels * out + 4 * out
        outputs += out * h * w
        channels = out
    parameters += channels + HIDDEN * 200 + 200 + 4 * HIDDEN * (channels * 200 + HIDDEN + 2)
    parameters += channels * 200 + HIDDEN + 1
    return total_bytes(mode, b * t * (3 * 160 * 80 + outputs) + parameters, b * t)


def build_sequence(case: Case, device: torch.device) -> SpatialWorkload:
    """Build the workload of the recurrence."""
    b, t, c, h, w = (case.shape[k] for k in ("B", "T", "C", "H", "W"))

    def fused(fusednn: ModuleType) -> nn.Module:
        return fusednn.AttentionLSTM(c, h, w, HIDDEN)

    names = ("hidden", "maps", "h", "c")
    return make_workload(case, device, TorchAttentionLSTM(c, h, w), fused, {"x": (b, t, c, h, w)}, names)


def build_driving(case: Case, device: torch.device) -> SpatialWorkload:
    """Build the workload of the whole network."""
    b, t = case.shape["B"], case.shape["T"]

    def fused(fusednn: ModuleType) -> nn.Module:
        net = fusednn.models.DrivingNet(HIDDEN)
        net.register_forward_hook(lambda _module, _inputs, results: results[0])  # the control alone
        return net

    return make_workload(case, device, TorchDrivingNet(), fused, {"x": (b, t, 3, 160, 80)}, ("control",))


def _sequence(mode: Mode, shape: tuple[int, int, int, int, int]) -> Case:
    costs = sequence_flops(mode, shape), sequence_bytes(mode, shape)
    named = dict(zip("BTCHW", shape))
    return case_of("attention_lstm", mode, named, costs, build_sequence, quick=shape == SHORT)


def _driving(mode: Mode) -> Case:
    costs = driving_flops(mode, DRIVING), driving_bytes(mode, DRIVING)
    return case_of("driving_net", mode, dict(zip("BT", DRIVING)), costs, build_driving)


_MODES: tuple[Mode, ...] = ("inference", "training")
CASES = [c for m in _MODES for c in (_sequence(m, SEQUENCE), _sequence(m, SHORT), _driving(m))]
