"""Attention over the positions of an image, alone, inside an LSTM, and in a whole driving network.

N or B = batch, T = steps, C = channels, P = H W positions, S = hidden size, J = 4 S rows of the gates.

flops, matrix products and the map's products, a multiply-add being two:
    spatial_attention  2 N P (C + S) for the scores, 2 N P C for the features times the map
    attention_lstm     2 B T (P (C + S) + P C + J (C P + S))
    driving_net        2 B T (sum over convolutions of k² C_in C_out pixels, and C P + S) + attention_lstm
    training           3 x forward

bytes, each tensor that a pass reads or writes counted once, e bytes an element:
    spatial_attention  A = N C P + N S + W (features, state, weights W = C + S P + P), O = N C P + N P
        inference      e (A + O)
        training       e (A + O) and, in the backward, e (A + O + A): all is read again, with the results'
                       gradients, and A's gradients are written
    attention_lstm     A = B T C P + 2 B S + W, W = C + S P + P + J (C P + S + 2), O = B T (S + P) + 2 B S
                       as above; training also writes and reads B T 5 S, gates and cell states
    driving_net        A = B T (frame + E) + W, E = every layer's output once, O = B T (1); as above
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.registry import COMPILE, EAGER, FUSEDNN, REFERENCE, Case, Mode
from benchmarks.workload import ModuleWorkload, backward_of_random, seeded_generator

HIDDEN = 128
# N, C, H, W: those of the survey of peers
SHAPES = [(32, 64, 20, 10), (8, 64, 20, 10), (4, 256, 32, 32), (1, 512, 64, 64)]
# B, T, C, H, W
SEQUENCE = (4, 20, 64, 20, 10)
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


class SpatialWorkload(ModuleWorkload):
    """Peers that share a module of torch's layers."""

    peers = (EAGER, COMPILE, REFERENCE, FUSEDNN)

    def make_backward(self) -> Callable[[list[Tensor]], None]:
        """Return a backward from seeded random numbers."""
        return backward_of_random(self.case)


class TorchAttention(nn.Module):
    """A 1×1 convolution, a projection of the state, a softmax over all positions, a product."""

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.score = nn.Conv2d(channels, 1, 1, bias=False)
        self.hidden = nn.Linear(HIDDEN, height * width)

    def forward(self, features: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features times the map, and the map."""
        n, _, height, width = features.shape
        scores = self.score(features).flatten(1) + self.hidden(hidden)
        attention = scores.softmax(1).view(n, 1, height, width)
        return features * attention, attention


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


def attention_flops(mode: Mode, shape: tuple[int, int, int, int]) -> int:
    """Flops of the attention; the module's text has the formula."""
    n, c, h, w = shape
    forward = 2 * n * h * w * (2 * c + HIDDEN)
    return forward if mode == "inference" else 3 * forward


def _total(mode: Mode, arguments: int, results: int, saved: int = 0, itemsize: int = 4) -> int:
    elements = arguments + results
    if mode == "training":
        elements += 2 * arguments + results + 2 * saved
    return itemsize * elements


def attention_bytes(mode: Mode, shape: tuple[int, int, int, int]) -> int:
    """Bytes of the attention."""
    n, c, h, w = shape
    p = h * w
    return _total(mode, n * c * p + n * HIDDEN + c + HIDDEN * p + p, n * c * p + n * p)


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
    return _total(
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
    return _total(mode, b * t * (3 * 160 * 80 + outputs) + parameters, b * t)


def _draw(module: nn.Module, generator: torch.Generator) -> None:
    """Give every parameter and statistic a value of its own, as large as torch's are at the start."""
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if not tensor.dtype.is_floating_point:
                continue
            if tensor.dim() > 1:
                tensor.normal_(generator=generator).div_(tensor[0].numel() ** 0.5)
            elif name.endswith(("bias", "mean")) or ".bias_" in name:
                tensor.normal_(generator=generator).mul_(0.1)
            else:
                tensor.uniform_(0.5, 2, generator=generator)


def _workload(
    case: Case,
    device: torch.device,
    module: nn.Module,
    fused: Any,
    sizes: Mapping[str, tuple],
    outputs: tuple,
) -> SpatialWorkload:
    generator = seeded_generator(case.name.rpartition("-")[0])
    module = module.to(case.torch_dtype)
    _draw(module, generator)
    inputs = {k: torch.randn(s, generator=generator, dtype=case.torch_dtype) for k, s in sizes.items()}
    return SpatialWorkload(
        case,
        device,
        module=module,
        fused=fused,
        inputs=inputs,
        arrange=lambda given: tuple(given.values()),
        output_names=outputs,
    )


def build_attention(case: Case, device: torch.device) -> SpatialWorkload:
    """Build the workload of the attention."""
    n, c, h, w = (case.shape[k] for k in ("N", "C", "H", "W"))

    def fused(fusednn: ModuleType) -> nn.Module:
        return fusednn.SpatialAttention(c, HIDDEN, h, w)

    sizes = {"x": (n, c, h, w), "h": (n, HIDDEN)}
    return _workload(case, device, TorchAttention(c, h, w), fused, sizes, ("y", "map"))


def build_sequence(case: Case, device: torch.device) -> SpatialWorkload:
    """Build the workload of the recurrence."""
    b, t, c, h, w = (case.shape[k] for k in ("B", "T", "C", "H", "W"))

    def fused(fusednn: ModuleType) -> nn.Module:
        return fusednn.AttentionLSTM(c, h, w, HIDDEN)

    names = ("hidden", "maps", "h", "c")
    return _workload(case, device, TorchAttentionLSTM(c, h, w), fused, {"x": (b, t, c, h, w)}, names)


def build_driving(case: Case, device: torch.device) -> SpatialWorkload:
    """Build the workload of the whole network."""
    b, t = case.shape["B"], case.shape["T"]

    def fused(fusednn: ModuleType) -> nn.Module:
        net = fusednn.models.DrivingNet(HIDDEN)
        net.register_forward_hook(lambda _module, _inputs, results: results[0])  # the control alone
        return net

    return _workload(case, device, TorchDrivingNet(), fused, {"x": (b, t, 3, 160, 80)}, ("control",))


def _case(kind: str, mode: Mode, shape: tuple[int, ...]) -> Case:
    letters = {"spatial_attention": "NCHW", "attention_lstm": "BTCHW", "driving_net": "BT"}[kind]
    table: dict[str, tuple[Any, Any, Any]] = {
        "spatial_attention": (attention_flops, attention_bytes, build_attention),
        "attention_lstm": (sequence_flops, sequence_bytes, build_sequence),
        "driving_net": (driving_flops, driving_bytes, build_driving),
    }
    flops, size_of, build = table[kind]
    text = "-".join(f"{k.lower()}{v}" for k, v in zip(letters, shape))
    return Case(
        name=f"{kind}-{text}-{mode}",
        family="spatial",
        mode=mode,
        shape=dict(zip(letters, shape)),
        dtype="float32",
        flops=flops(mode, shape),
        bytes=size_of(mode, shape),
        build=build,
        quick=kind == "spatial_attention" and shape == SHAPES[1],
    )


# spatial_softmax has no case of its own: it is the part of spatial_attention that moves no features.
_MODES: tuple[Mode, ...] = ("inference", "training")
_KINDS: list[tuple[str, tuple[int, ...]]] = [("spatial_attention", shape) for shape in SHAPES]
_KINDS += [("attention_lstm", SEQUENCE), ("driving_net", DRIVING)]
CASES = [_case(kind, mode, shape) for mode in _MODES for kind, shape in _KINDS]
