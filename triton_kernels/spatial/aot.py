"""Variants of the kernels of spatial attention that are compiled ahead of time, to see that none spills."""

from __future__ import annotations

from typing import Any

from ..core.aot import AotCase
from .additive import (
    attention_additive_scores_kernel,
    attention_energy_gradient_kernel,
    attention_feature_gradient_kernel,
    attention_weight_gradient_kernel,
)
from .backward import (
    attention_add_partials_kernel,
    attention_backward_kernel,
    attention_map_gradient_kernel,
)
from .call import Tile
from .forward import SIZES, attention_combine_kernel, attention_forward_kernel
from .gradients import SUM_OPTIONS

_WIDE = (  # tensors of the arithmetic's type
    "scores", "weights", "stats", "sums", "d_scores", "d_energy", "weight_partials", "temperature_partials",
    "v_partials", "term_partials", "partials",
)  # fmt: skip
_INTEGERS = {
    **dict.fromkeys([*SIZES, "tiles", "steps"], "i32"),
    "bits": "i64",
    "mask": "*u8",
    **dict.fromkeys(["f_n", "f_c", "f_p", "o_n", "o_g", "o_c", "o_p", "mask_n", "mask_p"], "i64"),
}


def _case(
    kernel: Any,
    name: str,
    dtype: str,
    layout: str,
    tile: Tile,
    absent: tuple[str, ...] = (),
    **constants: Any,
) -> AotCase:  # fmt: skip
    """The kernel for images in `layout`, without the tensors `absent`."""
    ones = ("f_c", "o_c", "mask_p") if layout == "last" else ("f_p", "o_p", "mask_p")
    given: dict[str, Any] = dict.fromkeys(ones, 1) | dict.fromkeys(absent)
    given |= constants | tile.blocks("G", "A", "C", "P")
    names = kernel.arg_names
    given = {k: v for k, v in given.items() if k in names}
    wide = "*fp64" if dtype == "fp64" else "*fp32"
    types = {k: _INTEGERS.get(k, wide if k in _WIDE else None) for k in names if k not in given}
    pointers = tuple(k for k, v in types.items() if v is None)
    integers = {k: v for k, v in types.items() if v is not None}
    divisible = (*pointers, *(k for k in ("f_n", "f_p", "o_n", "o_p") if k in integers and layout == "last"))
    return AotCase(f"{name} {layout} {dtype}", kernel, pointers, integers, given, tile.options, divisible,
                   (dtype,))  # fmt: skip


_ITEM = {"fp32": 4, "fp64": 8, "fp16": 2, "bf16": 2}
_POSITIONS = {"last": 200, "first": 1024}  # 10 x 20; 32 x 32
_CHANNELS, _ROWS = 64, 128
_SPLIT = ("weights", "stats", "sums")


def _positional(output: str, dtype: str, layout: str, maps: int = 1) -> list[AotCase]:
    tile = Tile.of(maps, _CHANNELS, _POSITIONS[layout], _ITEM[dtype])
    constants: dict[str, Any] = {"OUTPUT": output, "MAPS": maps}
    split = layout == "first"  # more positions than a program takes
    name = f"{output} g{maps}"
    found = [
        _case(attention_forward_kernel, f"spatial_forward/{name}", dtype, layout, tile,
              ("learned",) if split else _SPLIT, **constants),
        _case(attention_backward_kernel, f"spatial_backward/{name}", dtype, layout, tile,
              () if split else ("d_scores", "stats"), **constants),
    ]  # fmt: skip
    if split:
        found.append(_case(attention_combine_kernel, f"spatial_combine/{name}", dtype, layout, tile,
                           ("learned",), **constants))  # fmt: skip
        found.append(_case(attention_map_gradient_kernel, f"spatial_map_gradient/{name}", dtype, layout, tile,
                           **constants))  # fmt: skip
    return found


def _additive(dtype: str, layout: str, maps: int = 1) -> list[AotCase]:
    tile = Tile.of_products(maps, _ROWS, _CHANNELS, _POSITIONS[layout], _ITEM[dtype])
    precision = "tf32" if _ITEM[dtype] == 2 else "ieee"
    kernels = {
        "additive_scores": attention_additive_scores_kernel,
        "energy_gradient": attention_energy_gradient_kernel,
        "feature_gradient": attention_feature_gradient_kernel,
        "weight_gradient": attention_weight_gradient_kernel,
    }
    constants: dict[str, Any] = {"OUTPUT": "scale", "MAPS": maps, "PRECISION": precision}
    return [
        _case(kernel, f"spatial_{name}/g{maps}", dtype, layout, tile, **constants)
        for name, kernel in kernels.items()
    ]


def _softmax(dtype: str) -> list[AotCase]:
    tile = Tile.of(1, 1, 1024, _ITEM[dtype])
    constants: dict[str, Any] = {"OUTPUT": "coordinates", "MAPS": 1}
    nothing = ("features", "weight")
    return [
        _case(attention_forward_kernel, "spatial_softmax_forward/xy", dtype, "first", tile,
              (*nothing, *_SPLIT), **constants),
        _case(attention_backward_kernel, "spatial_softmax_backward/xy", dtype, "first", tile,
              (*nothing, "d_scores", "stats", "grad_features", "weight_partials"), **constants),
    ]  # fmt: skip


def _add_partials(dtype: str) -> AotCase:
    integers = {"partials": "*fp64" if dtype == "fp64" else "*fp32", "count": "i32", "inner": "i32"}
    return AotCase(f"spatial_add_partials/{dtype}", attention_add_partials_kernel, ("sums",), integers,
                   {"BLOCK_J": 32, "BLOCK_I": 32}, SUM_OPTIONS, (), (dtype,))  # fmt: skip


AOT_CASES = [
    *_positional("scale", "fp32", "last"),
    *_positional("scale", "bf16", "first"),
    *_positional("flatten", "fp64", "first"),
    *_positional("sum", "fp16", "last", maps=3),
    *_additive("fp32", "first"),
    *_additive("fp64", "last"),
    *_additive("bf16", "last"),
    *_additive("fp16", "first", maps=3),
    *_softmax("fp32"),
    *_softmax("fp64"),
    _add_partials("fp16"),
]
