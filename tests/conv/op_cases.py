"""Sample calls of each op: opcheck runs them all, and the meta-test asks that no op lacks any."""

from __future__ import annotations

import torch
from torch import Tensor

from fusednn.conv import reference

OPS = (
    "depthwise_conv2d_forward",
    "depthwise_conv2d_backward",
    "separable_conv2d_forward",
    "separable_conv2d_train_forward",
    "separable_conv2d_train_backward",
)
GEOMETRIES = {
    "plain": ((1, 1), (1, 1, 1, 1), (1, 1)),
    "strided, dilated, asymmetric": ((2, 1), (1, 2, 0, 3), (1, 2)),
}


def op_cases(name: str, dtype: torch.dtype = torch.float32) -> dict[str, tuple]:
    """Return arguments of the op `name` by case."""
    return globals()[f"_{name}"](dtype)


def _normal(*size: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(size))
    return torch.randn(size, generator=generator).to(dtype)


def _trained(args: tuple) -> tuple:
    return tuple(a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in args)


def _depthwise(dtype: torch.dtype):
    for batch in (0, 2):
        for last in (False, True):
            for text, geometry in GEOMETRIES.items():
                x = _normal(batch, 3, 7, 6, dtype=dtype)
                x = x.contiguous(memory_format=torch.channels_last) if last else x
                tensors = x, _normal(6, 1, 3, 2, dtype=dtype), _normal(6, dtype=dtype)
                yield f"N={batch} last={last} {text}", tensors, geometry


def _depthwise_conv2d_forward(dtype: torch.dtype) -> dict[str, tuple]:
    cases = {}
    for text, tensors, geometry in _depthwise(dtype):
        cases[text] = (*tensors, *geometry, "none")
        cases[f"{text} no bias"] = (*tensors[:2], None, *geometry, "silu")
        cases[f"{text} trained"] = _trained((*tensors, *geometry, "relu6"))
    return cases


def _depthwise_conv2d_backward(dtype: torch.dtype) -> dict[str, tuple]:
    cases = {}
    for text, tensors, geometry in _depthwise(dtype):
        grad = reference.depthwise_conv2d_forward(*tensors, *geometry, "none").cos()
        for mask in ([True] * 3, [True, False, False], [False, True, True], [False] * 3):
            cases[f"{text} mask={mask}"] = (grad, *tensors, *geometry, "gelu", mask)
    return cases


def _block(dtype: torch.dtype):
    for text, (x, w, b), geometry in _depthwise(dtype):
        pointwise = _normal(5, 6, 1, 1, dtype=dtype), _normal(5, dtype=dtype)
        yield text, (x, w, b, *pointwise), geometry


def _separable_conv2d_forward(dtype: torch.dtype) -> dict[str, tuple]:
    cases = {}
    for text, tensors, geometry in _block(dtype):
        args = (*tensors, None, *geometry, "relu6", "none")
        residual = reference.separable_conv2d_forward(*args).cos()
        cases[text] = args
        cases[f"{text} residual"] = (*tensors, residual, *geometry, "relu", "silu")
        cases[f"{text} trained"] = _trained((*tensors, residual, *geometry, "silu", "none"))
    return cases


def _norms(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(_normal(n, dtype=dtype) for n in (6, 6, 5, 5))


def _separable_conv2d_train_forward(dtype: torch.dtype) -> dict[str, tuple]:
    cases = {}
    for text, (x, w1, b1, w2, b2), geometry in _block(dtype):
        g1, s1, g2, s2 = _norms(dtype)
        rest = (*geometry, 1e-5, 1e-3, "relu6", "none")
        both = (x, w1, None, g1, s1, w2, None, g2, s2, None, *rest, True, True)
        cases[text] = both
        cases[f"{text} no norm"] = (x, w1, b1, None, None, w2, b2, None, None, None, *rest, False, False)
        cases[f"{text} plain norm"] = (x, w1, b1, None, None, w2, b2, None, None, None, *rest, True, False)
        cases[f"{text} trained"] = _trained(both)
    return cases


def _separable_conv2d_train_backward(dtype: torch.dtype) -> dict[str, tuple]:
    cases = {}
    for text, args in _separable_conv2d_train_forward(dtype).items():
        args = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        out, *saved = reference.separable_conv2d_train_forward(*args)
        *geometry, _eps1, _eps2, act1, act2, has_norm1, has_norm2 = args[10:]
        present = [a is not None for a in args[:9]]
        for mask in (present, [False] * 9, [True] + [False] * 8):
            options = (*geometry, act1, act2, has_norm1, has_norm2, mask)
            cases[f"{text} mask={mask}"] = (out.cos(), *args[:9], *saved, *options)
    return cases
