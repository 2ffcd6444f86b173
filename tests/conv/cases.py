"""Depthwise convolutions and blocks to compute, and the same by PyTorch and in more digits."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusednn
from fusednn.conv import reference
from fusednn.testing import assert_close_to_oracle, error_budget

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ACTIVATIONS = tuple(name for name in reference.ACTIVATIONS if name != "none")
TORCH_ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
}
ARGUMENTS = ("input", "weight", "bias")


@dataclass(frozen=True)
class Work:
    """A depthwise convolution's tensors, options and the gradient of its result."""

    tensors: dict[str, Tensor | None]
    options: dict[str, Any]
    grad: Tensor = field(repr=False)

    def map(self, f: Callable[[Tensor], Tensor]) -> Work:
        """Apply `f` to every tensor."""
        tensors = {name: None if t is None else f(t) for name, t in self.tensors.items()}
        return replace(self, tensors=tensors, grad=f(self.grad))

    def with_(self, **tensors: Tensor | None) -> Work:
        """Replace tensors by name."""
        return replace(self, tensors={**self.tensors, **tensors})


def make(
    shape: tuple[int, int, int, int],
    kernel: tuple[int, int] = (3, 3),
    multiplier: int = 1,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **options: Any,
) -> Work:
    """Make a convolution of an input [N, C, H, W] whose values depend on its arguments alone."""
    seed = zlib.crc32(repr((shape, kernel, multiplier, options)).encode())
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).to(device)

    channels = shape[1] * multiplier
    scale = 2 / (kernel[0] * kernel[1]) ** 0.5  # so that every activation is met on both sides of its kinks
    tensors = {
        "input": normal(*shape),
        "weight": normal(channels, 1, *kernel) * scale,
        "bias": normal(channels) if bias else None,
    }
    geometry = {k: v for k, v in options.items() if k != "activation"}
    meta = (t if t is None else t.to("meta") for t in tensors.values())
    size = F.conv2d(*meta, **geometry, groups=shape[1]).shape
    return Work(tensors, options, normal(*size))


def torch_step(tensors: dict[str, Tensor | None], options: dict[str, Any]) -> Tensor:
    """PyTorch's own layers."""
    geometry = {k: v for k, v in options.items() if k != "activation"}
    out = F.conv2d(*tensors.values(), **geometry, groups=tensors["input"].shape[-3])
    return TORCH_ACTIVATIONS[options.get("activation")](out)


def fused_step(tensors: dict[str, Tensor | None], options: dict[str, Any]) -> Tensor:
    """fusednn, on the backend of the caller's choice."""
    return fusednn.functional.depthwise_conv2d(*tensors.values(), **options)


Step = Callable[[dict[str, Tensor | None], dict[str, Any]], Tensor]
Results = dict[str, Tensor]


def run(step: Step, work: Work, wanted: tuple[str, ...] = ARGUMENTS) -> Results:
    """Run forward and backward; return the output and gradients as ``grad of <argument>``."""
    tensors = {
        name: t if t is None else t.detach().requires_grad_(name in wanted)
        for name, t in work.tensors.items()
    }
    leaves = {name: t for name, t in tensors.items() if t is not None and t.requires_grad}
    with torch.set_grad_enabled(bool(leaves)):
        out = step(tensors, work.options)
    results = {"output": out.detach()}
    if leaves:
        found = torch.autograd.grad(out, list(leaves.values()), work.grad)
        results |= {f"grad of {name}": g for name, g in zip(leaves, found, strict=True)}
    return results


def check(work: Work, wanted: tuple[str, ...] = ARGUMENTS, what: str = "") -> Results:
    """Check fusednn, on the backend in force, against an oracle of more digits; return its results."""
    actual, same_dtype = run(fused_step, work, wanted), run(torch_step, work, wanted)
    if work.tensors["input"].dtype == torch.float64:
        from .extended import extended_results  # needs Work

        oracle = extended_results(work)
    else:
        oracle = run(torch_step, work.map(Tensor.double), wanted)
    # PyTorch's error is that of the worse of its kernels and the reference: one alone can be lucky.
    with fusednn.use_backend("reference"):
        other = run(fused_step, work, wanted)
    for name, expected in same_dtype.items():
        worse = max((expected, other[name]), key=lambda t, n=name: error_budget(t, oracle[n]))
        assert_close_to_oracle(actual[name], worse, oracle[name], f"{what}{name}")
    return actual


ORDER = ("depthwise", "norm1", "activation1", "pointwise", "norm2", "activation2")


class Composite(nn.Module):
    """What a block replaces: torch's layers, with copies of its parameters, one after the other."""

    def __init__(self, block: fusednn.DepthwiseSeparableConv2d) -> None:
        super().__init__()
        copied = copy.deepcopy(block)
        for name in ORDER:
            self.register_module(name, getattr(copied, name))
        self.residual = block.residual
        self.training = block.training

    def forward(self, input: Tensor) -> Tensor:
        """Call the layers in turn."""
        out = input
        for name in ORDER:
            layer = getattr(self, name)
            out = out if layer is None else layer(out)
        return out + input if self.residual else out
