"""torch.ops.fusednn.{attention,projection}_{forward,backward}, declared; reference.py has all shapes.

Attention's forward returns what its backward needs beside the inputs: output and lse.
docs/design/017-attention.md argues the contract, 018-attention-cpu.md what the projections are for.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import native
from ..core.backends import cpu, cuda, torchs, triton
from ..core.dispatch import Reasons
from ..core.gradients import Gradients
from ..core.op import Op
from ..core.tensors import accumulation_dtype, empty_gradients
from ..core.transforms import needs_torchs_ops
from . import reference

_DIFFERENTIABLE = ("query", "key", "value", "mask", "key_mask", "extra_key", "extra_value")

MOST_DECODED_ROWS = 16
"""Query rows up to which `auto` takes the CUDA kernel that splits the keys: a prediction (020)."""

FEW_ROWS = 8
"""Of queries, below which torch's CPU kernel is faster: ours packs all keys and values first (018)."""

FEWEST_PROJECTED_ROWS = 64
"""Below it `auto` leaves projections to torch: packing a weight costs what the product saves (018)."""


def _many_rows(call: Any) -> Reasons:
    rows = call.query.shape[2]
    if rows <= MOST_DECODED_ROWS:
        return []
    return [f"got {rows} query rows; the kernel is made for at most {MOST_DECODED_ROWS}"]


def _beyond_torchs(call: Any) -> Reasons:
    """What torch's attention does not have, or does by another rule where a row has nothing to attend to."""
    tensors = ("mask", "key_mask", "extra_key", "alibi_slopes", "cu_seqlens_q", "dropout_seed")
    reasons = [f"got {name}, expected None" for name in tensors if getattr(call, name) is not None]
    if call.window_left >= 0 or call.window_right > 0 or call.position_offset:
        reasons.append("got a window or a position_offset, expected none")
    if call.softcap:
        reasons.append(f"got softcap {call.softcap}, expected none")
    return reasons if call.key.shape[2] else [*reasons, "got no keys"]


def _torchs_is_faster(call: Any) -> Reasons:
    """On devices, where ours is not measured yet; on the CPU for few rows in float32 and in inference."""
    tensors, rows = (call.query, call.key, call.value), call.query.shape[2]
    if call.query.device.type == "cuda":
        return ["torch's attention serves plain calls: ours is not measured yet"]
    few = (
        rows < FEW_ROWS
        and call.window_right < 0
        and call.query.shape[1] == call.key.shape[1]
        and all(type(t) is Tensor and t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and not needs_torchs_ops(*tensors)
    )
    return [f"got {rows} query rows; torch's attention is faster below {FEW_ROWS}"] if few else []


def _torchs_attention(call: Any) -> tuple[Tensor, None, None]:
    output = F.scaled_dot_product_attention(
        call.query,
        call.key,
        call.value,
        is_causal=call.window_right == 0,
        scale=call.scale,
        enable_gqa=call.query.shape[1] != call.key.shape[1],
    )
    return output, None, None


def _fake_attention(call: Any) -> tuple[Tensor, ...]:
    batch, heads, rows, _ = call.query.shape
    columns = call.key.shape[2] + (0 if call.extra_key is None else call.extra_key.shape[1])
    sizes = {"none": (0,), "mean": (batch, rows, columns), "heads": (batch, heads, rows, columns)}
    return (
        call.query.new_empty(batch, rows, heads, call.value.shape[3]).transpose(1, 2),
        call.query.new_empty(batch, heads, rows, dtype=accumulation_dtype(call.query.dtype)),
        call.query.new_empty(sizes[call.weights]),
    )


def _fake_gradients(call: Any) -> tuple[Tensor, ...]:
    return empty_gradients([getattr(call, name) for name in _DIFFERENTIABLE], call.output_mask)


attention_backward = Op(
    reference.attention_backward,
    tuple(f"grad_{name}" for name in _DIFFERENTIABLE),
    fake=_fake_gradients,
    backends=(cpu(), cuda(), triton()),
)
attention_forward = Op(
    reference.attention_forward,
    ("output", "lse", "weights"),
    fake=_fake_attention,
    backends=(
        torchs(_torchs_attention, limits=_beyond_torchs, faster=_torchs_is_faster, returns=("output",)),
        cpu(),
        cuda(slower=_many_rows),
        triton(),
    ),
    gradients=Gradients(
        attention_backward, constant=lambda call: ("weights",) if call.weights == "none" else ()
    ),
)


def _few_rows(call: Any) -> Reasons:
    rows = call.input.shape[0]
    if rows >= FEWEST_PROJECTED_ROWS:
        return []
    return [f"got {rows} rows; torch's product is faster below {FEWEST_PROJECTED_ROWS}"]


def _other_tensors(call: Any) -> Reasons:
    return [
        f"got a tensor of {t.dtype} on {t.device}, expected torch.float32 on cpu"
        for t in call
        if isinstance(t, Tensor) and (t.dtype != torch.float32 or t.device.type != "cpu")
    ]


def _never_ours(call: Any) -> Reasons:
    return _other_tensors(call) if native.extension is not None else ["no extension"]


_OURS = cpu(dtypes=(torch.float32,), limits=_other_tensors, slower=_few_rows)
# Whichever backend attention is asked for on, the products around it that ours can't make are torch's.
_ANYWHERE = ("cpu", "cuda", "triton")

projection_backward = Op(
    reference.projection_backward,
    ("grad_input", "grad_weight", "grad_bias"),
    fake=lambda call: empty_gradients(
        (call.input, call.weight, call.weight.new_empty(call.weight.shape[0])),
        call.output_mask,
        torch.contiguous_format,
    ),
    backends=(_OURS, torchs(lambda call: reference.projection_backward(*call), stands_for=_ANYWHERE)),
)
projection_forward = Op(
    reference.projection_forward,
    ("output",),
    fake=lambda call: call.input.new_empty(call.input.shape[0], call.weight.shape[0]),
    backends=(
        _OURS,
        torchs(
            lambda call: reference.projection_forward(*call),
            returns=("output",),
            stands_for=_ANYWHERE,
            traced=_never_ours,
        ),
    ),
    gradients=Gradients(projection_backward),
)
