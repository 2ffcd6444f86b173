"""Calls of spatial attention whose kernels are compiled ahead of time, to see that none spills."""

from __future__ import annotations

import torch

from ..core.aot import AotCase, empty, launch
from .launch import (
    spatial_attention_backward,
    spatial_attention_forward,
    spatial_softmax_backward,
    spatial_softmax_forward,
)

_BATCH, _CHANNELS, _ROWS = 2, 64, 128
_SIZES = {torch.channels_last: (10, 20), torch.contiguous_format: (32, 32)}  # of one tile; of more


def _attend(dtype: torch.dtype, format: torch.memory_format, maps: int, output: str, additive: bool) -> None:
    """Forward and backward with a mask, a term and a temperature that is learned."""
    height, width = _SIZES[format]
    features = empty(_BATCH, _CHANNELS, height, width, dtype=dtype).to(memory_format=format)
    weight = empty(_ROWS if additive else maps, _CHANNELS, dtype=dtype)
    term = empty(*((_BATCH, _ROWS) if additive else (_BATCH, maps, height * width)), dtype=dtype)
    v = empty(maps, _ROWS, dtype=dtype) if additive else None
    mask = empty(_BATCH, height * width, dtype=torch.bool)
    inputs = (features, weight, term, v, mask, empty(1, dtype=dtype), 1.0, output)
    attended, map = launch(spatial_attention_forward, *inputs)
    launch(spatial_attention_backward, attended, map, *inputs, map, (True,) * 5)


def _softmax(dtype: torch.dtype) -> None:
    logits = empty(_BATCH, 1, 32, 32, dtype=dtype)
    mask, temperature = empty(_BATCH, 1, 1024, dtype=torch.bool), empty(1, dtype=dtype)
    map, xy = launch(spatial_softmax_forward, logits, mask, temperature, 1.0, True)
    launch(spatial_softmax_backward, map, xy, mask, temperature, 1.0, map, (True, True))


def _case(
    output: str, dtype: torch.dtype, format: torch.memory_format, maps: int = 1, additive: bool = False
) -> AotCase:
    name = f"spatial/{'additive ' if additive else ''}{output} g{maps} {str(format)[6:]}"
    return AotCase(name, lambda dtype: _attend(dtype, format, maps, output, additive), (dtype,))


_LAST, _FIRST = torch.channels_last, torch.contiguous_format

AOT_CASES = [
    _case("scale", torch.float32, _LAST),
    _case("scale", torch.bfloat16, _FIRST),
    _case("flatten", torch.float64, _FIRST),
    _case("sum", torch.float16, _LAST, maps=3),
    _case("scale", torch.float32, _FIRST, additive=True),
    _case("scale", torch.float64, _LAST, additive=True),
    _case("scale", torch.bfloat16, _LAST, additive=True),
    _case("scale", torch.float16, _FIRST, maps=3, additive=True),
    AotCase("spatial/softmax", _softmax, (torch.float32, torch.float64)),
]
