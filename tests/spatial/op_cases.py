"""Sample calls of each op: opcheck runs them all, and the meta-test asks that no op lacks any."""

from __future__ import annotations

import torch
from torch import Tensor

from fusednn.spatial import reference

OPS = (
    "spatial_softmax_forward",
    "spatial_softmax_backward",
    "spatial_attention_forward",
    "spatial_attention_backward",
)
OUTPUTS = reference.OUTPUTS


def op_cases(name: str, dtype: torch.dtype = torch.float32) -> dict[str, tuple]:
    """Return arguments of the op `name` by case."""
    return globals()[f"_{name}"](dtype)


def normal(*size: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(size) + len(size))
    return torch.randn(size, generator=generator).to(dtype).requires_grad_()


def temperature(dtype: torch.dtype) -> Tensor:
    return torch.tensor(0.7, dtype=dtype).requires_grad_()


def _half(*size: int) -> Tensor:
    return torch.arange(size[-1]).remainder(2).eq(0).expand(size)


def _spatial_softmax_forward(dtype: torch.dtype):
    cases = {}
    for n in (0, 2):
        logits = normal(n, 3, 2, 4, dtype=dtype)
        t = normal(dtype=dtype).detach().exp().requires_grad_()
        cases[f"N={n} map"] = (logits, None, None, 0.5, False)
        cases[f"N={n} masked"] = (logits, _half(n, 3, 8), t, 1.0, True)
    return cases


def _spatial_softmax_backward(dtype: torch.dtype):
    cases = {}
    for case, (logits, mask, t, fixed, coordinates) in _spatial_softmax_forward(dtype).items():
        with torch.no_grad():
            map, xy = reference.spatial_softmax_forward(logits, mask, t, fixed, coordinates)
        rest = (mask, t, fixed, map)
        cases[case] = (map.cos(), xy.cos() if coordinates else None, *rest, (True, t is not None))
        cases[f"{case} none"] = (None, None, *rest, (False, False))
    return cases


def _spatial_attention_forward(dtype: torch.dtype):
    cases = {}
    for n in (0, 2):
        for last in (False, True):
            features = normal(n, 3, 2, 4, dtype=dtype)
            if last:
                features = features.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
            for output in OUTPUTS:
                text = f"N={n} {'NHWC' if last else 'NCHW'} {output}"
                cases[f"{text} positional"] = (
                    features, normal(2, 3, dtype=dtype), normal(n, 2, 8, dtype=dtype), None, None, None,
                    0.5, output,
                )  # fmt: skip
                cases[f"{text} additive"] = (
                    features, normal(5, 3, dtype=dtype), normal(n, 5, dtype=dtype),
                    normal(2, 5, dtype=dtype), _half(n, 8), temperature(dtype), 1.0, output,
                )  # fmt: skip
            cases[f"N={n} no state"] = (
                features, normal(2, 3, dtype=dtype), None, None, None, None, 1.0, "scale",
            )  # fmt: skip
    return cases


def _spatial_attention_backward(dtype: torch.dtype):
    cases = {}
    for case, args in _spatial_attention_forward(dtype).items():
        with torch.no_grad():
            attended, map = reference.spatial_attention_forward(*args)
        present = tuple(args[i] is not None for i in (0, 1, 2, 3, 5))
        cases[case] = (attended.cos(), map.cos(), *args, map, present)
        cases[f"{case} features"] = (attended.cos(), None, *args, map, (True, *(False,) * 4))
    return cases
