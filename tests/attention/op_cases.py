"""Sample calls of each op: opcheck runs them all, and the meta-test asks that no op lacks any."""

from __future__ import annotations

from typing import Any

import torch

from fusednn.attention import reference

from .cases import Work, make, make_packed

OPS = ("attention_forward", "attention_backward")

SMALL: dict[str, Any] = {"heads": 2, "rows": 3, "columns": 5, "size": 4}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "B=0": {"batch": 0, "weights": "mean", "mask": "float b1ls"},
    "L=0": {"rows": 0, "weights": "heads"},
    "S=0": {"columns": 0, "weights": "mean", "key_mask": "float"},
    "causal": {"window": (-1, 0)},
    "window": {"window": (1, 1), "offset": 2},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi": True},
    "grouped": {"heads": 4, "groups": 2, "value_size": 3},
    "bool mask": {"mask": "bool b1ls", "key_mask": "bool", "weights": "heads"},
    "float mask": {"mask": "float bhls", "weights": "mean"},
    "expanded mask": {"mask": "float 11ls expanded"},
    "key mask": {"key_mask": "float", "mask": "bool 1h1s"},
    "mean": {"weights": "mean"},
    "heads": {"weights": "heads"},
    "extra": {"extra": 1, "weights": "mean", "key_mask": "bool"},
    "two extra": {"extra": 2, "groups": 1, "window": (-1, 0), "weights": "heads"},
    "dropout": {"dropout": 0.3, "weights": "mean"},
    "everything": {
        "heads": 4, "groups": 2, "value_size": 3, "mask": "float 1h1s", "key_mask": "float", "extra": 2,
        "alibi": True, "window": (2, 1), "offset": 1, "softcap": 3.0, "dropout": 0.2, "weights": "mean",
    },
}  # fmt: skip
PACKED: dict[str, tuple[list[int], list[int], dict[str, Any]]] = {
    "packed": ([2, 0, 3], [4, 1, 2], {}),
    "packed causal": ([2, 3], [2, 3], {"window": (-1, 0), "alibi": True, "softcap": 2.0, "groups": 1}),
    "packed dropout": ([1, 3], [2, 3], {"dropout": 0.3}),
    "packed none": ([], [], {}),
}


def works(dtype: torch.dtype) -> dict[str, Work]:
    """Return small works over all options."""
    found = {case: make(**{**SMALL, **options}, dtype=dtype) for case, options in OPTIONS.items()}
    sizes = {name: SMALL[name] for name in ("heads", "size")}
    packed = {
        case: make_packed(rows, columns, **sizes, **options, dtype=dtype)
        for case, (rows, columns, options) in PACKED.items()
    }
    return found | packed


def op_cases(name: str, dtype: torch.dtype = torch.float32) -> dict[str, tuple]:
    """Return arguments of the op `name` by case."""
    return {
        "attention_forward": _forward,
        "attention_backward": _backward,
        "projection_forward": _projection_forward,
        "projection_backward": _projection_backward,
    }[name](dtype)


def _projection_forward(dtype: torch.dtype) -> dict[str, tuple]:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    cases: dict[str, tuple] = {}
    for rows, inputs, outputs in ((0, 3, 5), (4, 3, 5), (70, 33, 20), (3, 0, 4), (3, 4, 0)):
        text = f"M={rows} K={inputs} N={outputs}"
        cases[text] = (normal(rows, inputs), normal(outputs, inputs), normal(outputs))
        cases[f"{text} no bias"] = (*cases[text][:2], None)
    return cases


def _projection_backward(dtype: torch.dtype) -> dict[str, tuple]:
    cases = {}
    for case, (input, weight, bias) in _projection_forward(dtype).items():
        grad = reference.projection_forward(input, weight, bias).detach().cos()
        cases[case] = (grad, input, weight, [True, True, bias is not None])
        cases[f"{case} of the input"] = (grad, input, weight, [True, False, False])
        cases[f"{case} of the bias"] = (grad, input, weight, [False, False, True])
    return cases


def _arguments(work: Work) -> tuple:
    tensors = (
        t if t is None or t.dtype == torch.bool else t.detach().requires_grad_()
        for t in work.tensors.values()
    )
    return (*tensors, work.slopes, *work.bounds, work.seed, *work.options)


def _forward(dtype: torch.dtype) -> dict[str, tuple]:
    return {case: _arguments(work) for case, work in works(dtype).items()}


def _backward(dtype: torch.dtype) -> dict[str, tuple]:
    cases = {}
    for case, work in works(dtype).items():
        args = _arguments(work)
        with torch.no_grad():
            output, lse, _ = reference.attention_forward(*args)
        tensors, options = args[:11], args[11:]
        grads = tuple(work.grads.get(name) for name in ("output", "lse", "weights"))
        wanted = [t is not None and t.dtype != torch.bool for t in args[:7]]
        cases[case] = (*grads, *tensors, output, lse, *options, wanted)
        cases[f"{case} of the output"] = (grads[0], None, None, *tensors, output, lse, *options, wanted)
    of_the_query = [True] + [False] * 6
    cases["only the query"] = (*cases["plain"][:-1], of_the_query)
    cases["nothing"] = (None, None, None, *cases["everything"][3:])
    cases["none wanted"] = (*cases["everything"][:-1], [False] * 7)
    return cases
