"""Multi-head self-attention as a module, and one step of decoding as a function.

B = batch, L = length, E = embedding, H = heads, S = keys that are kept, D = head size.

    multihead_attention          need_weights=False
    multihead_attention_weights  need_weights=True: weights averaged over heads are returned, and compared
    multihead_attention_padding  need_weights=False and a key_padding_mask: a quarter of the keys are padding,
                                 sample by sample another number, from hardly any to half
    attention_decode             scaled_dot_product_attention of one row for each of B H heads with S keys

Training is a backward from random numbers to the input and all parameters. With weights, too, it is from
the output alone: they are looked at, hardly ever learned from. Dropout is 0.

flops, matrix products only, a multiply-add being two:
    module     2 B L E 4 E for the projections, 2 · 2 B L L E for scores and the weighted values
    decode     2 · 2 B H S D
    training   3 x forward
(Scores that a kernel computes again instead of keeping them are not counted; padding is not left out.)

bytes, each tensor that a pass reads or writes counted once, e bytes an element:
    P = 4 E E + 4 E   parameters
    A = B L E         the input; the output is as large
    W = B L L         averaged weights, where returned
    module inference  e (P + 2 A + W), and B L of the padding mask
    module training   e (P + 2 A + W); e (4 A + B H L) written in the forward, read in the backward (queries,
                      keys, values, outputs of heads, log-sum-exp); in the backward e (P + 2 A) read
                      (parameters, input, the output's gradient), e (P + A) written; the mask twice
    decode            e (2 B H D + 2 B H S D)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.registry import Case, Mode
from benchmarks.workload import ModuleWorkload, backward_of_random, seeded_generator

PLAIN, WEIGHTS, PADDING = "multihead_attention", "multihead_attention_weights", "multihead_attention_padding"
KINDS = (PLAIN, WEIGHTS, PADDING)
DECODE = "attention_decode"
# B, L, E, H
SHAPES = [(8, 128, 256, 8), (4, 512, 512, 8), (1, 2048, 512, 8)]
# B, H, S, D
DECODE_SHAPE = (8, 8, 4096, 64)

Shape = tuple[int, int, int, int]


class AttentionWorkload(ModuleWorkload):
    """Peers that share a module; its backward is from the first output alone."""

    def make_backward(self) -> Callable[[list[Tensor]], None]:
        """Return a backward from seeded random numbers."""
        backward = backward_of_random(self.case)
        return lambda outputs: backward(outputs[:1])


class SelfAttention(nn.Module):
    """A multi-head attention, torch's or ours, whose query, key and value are the same."""

    def __init__(self, attention: nn.MultiheadAttention, need_weights: bool) -> None:
        super().__init__()
        self.attention = attention
        self.need_weights = need_weights

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Any:
        """Return the output, and weights [B, L, L] if they are needed."""
        output, weights = self.attention(x, x, x, key_padding_mask=padding, need_weights=self.need_weights)
        return (output, weights) if self.need_weights else output


class Decode(nn.Module):
    """Attention of given queries, keys and values."""

    def __init__(self, attend: Callable[..., Any]) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        """Return the output."""
        return self.attend(query, key, value)


def module_flops(mode: Mode, shape: Shape) -> int:
    """Flops of the module; the text above has the formula."""
    b, length, e, _ = shape
    forward = 2 * b * length * e * 4 * e + 4 * b * length * length * e
    return forward if mode == "inference" else 3 * forward


def module_bytes(kind: str, mode: Mode, shape: Shape, itemsize: int = 4) -> int:
    """Bytes of the module; the text above has the formula."""
    b, length, e, heads = shape
    parameters, argument = 4 * e * e + 4 * e, b * length * e
    elements = parameters + 2 * argument + (b * length * length if kind == WEIGHTS else 0)
    mask = b * length if kind == PADDING else 0
    if mode == "training":
        saved = 4 * argument + b * heads * length
        elements += 2 * saved + (parameters + 2 * argument) + (parameters + argument)
        mask *= 2
    return itemsize * elements + mask


def decode_flops(shape: Shape) -> int:
    """Flops of a step of decoding."""
    b, heads, keys, size = shape
    return 4 * b * heads * keys * size


def decode_bytes(shape: Shape, itemsize: int = 4) -> int:
    """Bytes of a step of decoding."""
    b, heads, keys, size = shape
    return itemsize * b * heads * size * (2 + 2 * keys)


def padding_mask(batch: int, length: int) -> Tensor:
    """Return key_padding_mask [B, L], True for padding: shares of length from near 0 to near a half."""
    lengths = [length - round(length * (n + 0.5) / (2 * batch)) for n in range(batch)]
    return torch.arange(length) >= torch.tensor(lengths)[:, None]


def build_module(case: Case, device: torch.device) -> AttentionWorkload:
    """Build the workload of a module: seeded weights and inputs."""
    kind = case.name.partition("-")[0]
    b, length, e, heads = (case.shape[k] for k in ("B", "L", "E", "H"))
    generator = seeded_generator(case.name.rpartition("-")[0])
    attention = nn.MultiheadAttention(e, heads, batch_first=True, dtype=case.torch_dtype)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(generator=generator).mul_(e**-0.5 if parameter.dim() > 1 else 0.1)
    x = torch.randn(b, length, e, generator=generator, dtype=case.torch_dtype)
    padding = padding_mask(b, length) if kind == PADDING else None

    def arrange(inputs: Mapping[str, Tensor]) -> tuple[Any, ...]:
        given = inputs["x"]
        return (given,) if padding is None else (given, padding.to(given.device))

    def fused(fusednn: ModuleType) -> nn.Module:
        return SelfAttention(fusednn.MultiheadAttention(e, heads, batch_first=True), kind == WEIGHTS)

    return AttentionWorkload(
        case,
        device,
        module=SelfAttention(attention, kind == WEIGHTS),
        fused=fused,
        inputs={"x": x},
        arrange=arrange,
        output_names=("y", "weights") if kind == WEIGHTS else ("y",),
    )


def build_decode(case: Case, device: torch.device) -> AttentionWorkload:
    """Build the workload of a step of decoding: seeded queries, keys and values."""
    b, heads, keys, size = (case.shape[k] for k in ("B", "H", "S", "D"))
    generator = seeded_generator(case.name)
    inputs = {
        name: torch.randn(b, heads, rows, size, generator=generator, dtype=case.torch_dtype)
        for name, rows in (("query", 1), ("key", keys), ("value", keys))
    }
    return AttentionWorkload(
        case,
        device,
        module=Decode(F.scaled_dot_product_attention),
        fused=lambda fusednn: Decode(fusednn.functional.scaled_dot_product_attention),
        inputs=inputs,
        arrange=lambda given: tuple(given.values()),
        output_names=("y",),
    )


def _module_case(kind: str, mode: Mode, shape: Shape) -> Case:
    text = "-".join(f"{k.lower()}{v}" for k, v in zip("BLEH", shape))
    return Case(
        name=f"{kind}-{text}-{mode}",
        family="attention",
        mode=mode,
        shape=dict(zip("BLEH", shape)),
        dtype="float32",
        flops=module_flops(mode, shape),
        bytes=module_bytes(kind, mode, shape),
        build=build_module,
        quick=kind == PLAIN and shape == SHAPES[0],
    )


def _decode_case() -> Case:
    text = "-".join(f"{k.lower()}{v}" for k, v in zip("BHSD", DECODE_SHAPE))
    return Case(
        name=f"{DECODE}-{text}-inference",
        family="attention",
        mode="inference",
        shape=dict(zip("BHSD", DECODE_SHAPE)),
        dtype="float32",
        flops=decode_flops(DECODE_SHAPE),
        bytes=decode_bytes(DECODE_SHAPE),
        build=build_decode,
    )


_MODES: tuple[Mode, ...] = ("inference", "training")
CASES = [_module_case(kind, mode, shape) for mode in _MODES for kind in KINDS for shape in SHAPES]
CASES.append(_decode_case())
