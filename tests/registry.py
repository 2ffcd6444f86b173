"""The ops as tests go through them: names, families, sample calls, and the kernels that a binary has."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from fusednn.core import native
from fusednn.core import op as ops
from fusednn.core.dispatch import Operation

from . import places

OPS = sorted(ops.OPS)
# Where the backward is that of another op.
BACKWARDS = {"separable_conv2d": "separable_conv2d_train"}


def stem_of(name: str) -> str:
    """Return the name without its direction."""
    return name.removesuffix("_forward").removesuffix("_backward")


def backward_of(name: str) -> str:
    """Return the name of the op that is a forward's backward."""
    stem = stem_of(name)
    return f"{BACKWARDS.get(stem, stem)}_backward"


def family_of(name: str) -> str:
    """Return the folder with an op's tests."""
    return ops.OPS[name].family


def table_of(name: str) -> Operation:
    """Return an op's backends."""
    return ops.OPS[name].table


def cases_of(name: str, dtype: torch.dtype = torch.float32) -> dict[str, tuple[Any, ...]]:
    """Return an op's sample calls."""
    return importlib.import_module(f"tests.{family_of(name)}.op_cases").op_cases(name, dtype)


def arguments_of(name: str) -> list[str]:
    """Return the names of an op's arguments."""
    return list(ops.OPS[name].arguments)


def kernels() -> list[tuple[places.Place, str]]:
    """Return the ops that have C++ kernels in this process, and where: the CPU's and the emulated CUDA's."""
    modules = {"cpu": getattr(native.extension, "cpu", None), "cuda-emulated": places.emulated_module()}
    return [
        (place, op)
        for place in places.ALL
        if place.name in modules
        for op in OPS
        for kernel in dict.fromkeys(
            (op, op.replace("_cell_", "_gates_"))
        )  # on devices cells are products and these
        if hasattr(modules[place.name], kernel)
    ]
