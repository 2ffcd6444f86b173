"""Multi-head attention by fusednn, by torch in the same dtype, and by torch in float64, the oracle."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusednn
from fusednn.testing import assert_close_to_oracle

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SAME = {"self": "qqq", "memory": "qkk", "positions": "qqv", "distinct": "qkv"}
NO_WEIGHTS = {"need_weights": False}
WEIGHTS = {
    "none": NO_WEIGHTS,
    "mean": {"need_weights": True},
    "heads": {"need_weights": True, "average_attn_weights": False},
}


@dataclass(frozen=True)
class Call:
    """Arguments of a layer's forward: tensors by name, and options."""

    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    inputs: str = "qkv"  # of query, key and value: which letter is which tensor

    def map(self, f: Callable[[Tensor], Tensor]) -> Call:
        """Apply `f` to every tensor."""
        return replace(self, tensors={name: f(t) for name, t in self.tensors.items()})


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: Any = 0) -> Tensor:
    """Return normal numbers that depend on shape and seed alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr((shape, seed)).encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def randomise(module: nn.Module) -> nn.Module:
    """Fill all parameters with numbers of about their initial size; torch's biases begin as zeros."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(random(*p.shape, seed=name) * (p.shape[-1] ** -0.5 if p.dim() > 1 else 0.3))
    return module


def layers(*args: Any, device: str = "cpu", dtype: torch.dtype = torch.float32, **options: Any) -> tuple:
    """Return fusednn's layer, torch's and the oracle with the same parameters."""
    ours = randomise(fusednn.MultiheadAttention(*args, **options)).to(device, dtype)
    theirs = nn.MultiheadAttention(*args, **options).to(device, dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs, copy.deepcopy(theirs).double()


def masks(kind: str, *shape: int, seed: Any = 0) -> Tensor | None:
    """Return no mask, a bool or a floating one; key 0 is kept, so that no row is left with nothing."""
    if kind == "none":
        return None
    hidden = random(*shape, seed=("hidden", seed)) > 0.6
    hidden[..., 0] = False
    if kind == "bool":
        return hidden
    return random(*shape, seed=("bias", seed)).masked_fill(hidden, float("-inf"))


def call(
    inputs: str = "distinct",
    batch: int | None = 3,
    length: int = 5,
    keys: int = 7,
    sizes: tuple[int, int, int] = (8, 8, 8),
    heads: int = 2,
    batch_first: bool = False,
    attn_mask: str = "none",
    key_padding_mask: str = "none",
    per_head: bool = False,
    **options: Any,
) -> Call:
    """Make a call; `batch` None: unbatched."""
    letters = SAME[inputs]
    shapes = {"query": (length, sizes[0]), "key": (keys, sizes[1]), "value": (keys, sizes[2])}
    if letters[1] == "q":
        shapes["key"] = shapes["query"]
        shapes["value"] = (length, sizes[2])
        keys = length
    tensors = {}
    for name, (rows, features) in shapes.items():
        lead = (rows,) if batch is None else (batch, rows) if batch_first else (rows, batch)
        tensors[name] = random(*lead, features, seed=name)
    mask = masks(attn_mask, *((heads * (batch or 1),) if per_head else ()), length, keys)
    padding = masks(key_padding_mask, *(() if batch is None else (batch,)), keys, seed="padding")
    for name, tensor in (("attn_mask", mask), ("key_padding_mask", padding)):
        if tensor is not None:
            tensors[name] = tensor
    return Call(tensors, options, letters)


def run(module: nn.Module, call: Call) -> dict[str, Tensor | None]:
    """Return output, weights and the gradients of inputs and parameters, for random ones of the results."""
    parameter = next(module.parameters())
    leaves = {
        name: t.to(parameter.device, parameter.dtype).clone().requires_grad_()
        if t.is_floating_point()
        else t.to(parameter.device)
        for name, t in call.tensors.items()
    }
    by_letter = {"q": leaves["query"], "k": leaves["key"], "v": leaves["value"]}
    query, key, value = (by_letter[letter] for letter in call.inputs)
    given = {name: t for name, t in leaves.items() if name.endswith("mask")}
    output, weights = module(query, key, value, **given, **call.options)
    results = {"output": output} if weights is None else {"output": output, "weights": weights}
    loss = sum((t * random(*t.shape, seed=name).to(t)).sum() for name, t in results.items())
    wanted = {name: t for name, t in leaves.items() if t.requires_grad} | dict(module.named_parameters())
    grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    found: dict[str, Tensor | None] = {name: t.detach() for name, t in results.items()}
    return found | {f"gradient of {name}": g for name, g in zip(wanted, grads, strict=True)}


def assert_equal_in_float64(ours: nn.Module, oracle: nn.Module, call: Call, what: Any = "") -> None:
    """Check a layer in float64 against torch's: what is wired differently differs by far more."""
    actual, expected = (run(module, call) for module in (ours, oracle))
    assert actual.keys() == expected.keys(), what
    for name, tensor in actual.items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-11, atol=1e-11, msg=lambda text, n=name: f"{what} {n}: {text}"
        )


def assert_agree(ours: nn.Module, theirs: nn.Module, oracle: nn.Module, call: Call, what: Any = "") -> None:
    """Check that ours is about as exact as theirs: outputs, weights, and the same gradients, and no more."""
    dtype = next(ours.parameters()).dtype
    rounded = call.map(lambda t: t.to(dtype) if t.is_floating_point() else t)
    if dtype == torch.float64:
        return assert_equal_in_float64(ours, oracle, call, what)
    actual, expected, exact = (run(module, rounded) for module in (ours, theirs, oracle))
    assert actual.keys() == expected.keys(), what
    for name, tensor in actual.items():
        if tensor is None or expected[name] is None:
            assert tensor is expected[name], f"{what} {name}"
        else:
            assert_close_to_oracle(tensor, expected[name], exact[name], f"{what} {name}")
