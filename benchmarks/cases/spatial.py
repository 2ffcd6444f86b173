"""Attention over the positions of an image.

N = batch, C = channels, P = H W positions, S = hidden size.

flops, matrix products and the map's products, a multiply-add being two:
    2 N P (C + S) for the scores, 2 N P C for the features times the map; training 3 x forward

bytes, each tensor that a pass reads or writes counted once, e bytes an element:
    arguments A = N C P + N S + W (features, state, weights W = C + S P + P), results O = N C P + N P
    inference e (A + O)
    training  e (A + O) and, in the backward, e (A + O + A): all is read again, with the results' gradients,
              and A's gradients are written
"""

from __future__ import annotations

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

Build = Callable[[Case, torch.device], "SpatialWorkload"]


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


def attention_flops(mode: Mode, shape: tuple[int, int, int, int]) -> int:
    """Flops of the attention; the module's text has the formula."""
    n, c, h, w = shape
    forward = 2 * n * h * w * (2 * c + HIDDEN)
    return forward if mode == "inference" else 3 * forward


def total_bytes(mode: Mode, arguments: int, results: int, saved: int = 0, itemsize: int = 4) -> int:
    """Bytes of arguments, results and what the forward keeps for the backward."""
    elements = arguments + results
    if mode == "training":
        elements += 2 * arguments + results + 2 * saved
    return itemsize * elements


def attention_bytes(mode: Mode, shape: tuple[int, int, int, int]) -> int:
    """Bytes of the attention."""
    n, c, h, w = shape
    p = h * w
    return total_bytes(mode, n * c * p + n * HIDDEN + c + HIDDEN * p + p, n * c * p + n * p)


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


def make_workload(
    case: Case,
    device: torch.device,
    module: nn.Module,
    fused: Any,
    sizes: Mapping[str, tuple],
    outputs: tuple,
) -> SpatialWorkload:
    """Build the workload of a module: seeded weights and inputs of the given sizes."""
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
    return make_workload(case, device, TorchAttention(c, h, w), fused, sizes, ("y", "map"))


def case_of(
    kind: str, mode: Mode, shape: dict[str, int], costs: tuple[int, int], build: Build, quick: bool = False
) -> Case:
    """Return a case; `costs` are its flops and bytes."""
    text = "-".join(f"{letter.lower()}{size}" for letter, size in shape.items())
    family = build.__module__.rpartition(".")[2]
    return Case(f"{kind}-{text}-{mode}", family, mode, shape, "float32", *costs, build, quick)


def _case(mode: Mode, shape: tuple[int, int, int, int]) -> Case:
    costs = attention_flops(mode, shape), attention_bytes(mode, shape)
    named = dict(zip("NCHW", shape))
    return case_of("spatial_attention", mode, named, costs, build_attention, quick=shape == SHAPES[1])


# spatial_softmax has no case of its own: it is the part of spatial_attention that moves no features.
_MODES: tuple[Mode, ...] = ("inference", "training")
CASES = [_case(mode, shape) for mode in _MODES for shape in SHAPES]
