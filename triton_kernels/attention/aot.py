"""Variants of the kernels of attention that are compiled ahead of time, to see that none spills."""

from __future__ import annotations

from typing import Any

from ..core.aot import AotCase
from .columns import attention_columns_kernel
from .forward import SIZES, attention_forward_kernel
from .masks import attention_mask_gradient_kernel
from .rows import attention_delta_kernel, attention_rows_kernel
from .tiles import COLUMNS, FORWARD, ROWS, SCORES, Tile
from .weights import attention_weights_kernel

_KERNELS = {
    "forward": (attention_forward_kernel, FORWARD),
    "weights": (attention_weights_kernel, SCORES),
    "delta": (attention_delta_kernel, ROWS),
    "rows": (attention_rows_kernel, ROWS),
    "columns": (attention_columns_kernel, COLUMNS),
    "mask_gradient": (attention_mask_gradient_kernel, SCORES),
}
_WIDE = ("lse", "low", "delta", "grad_lse", "d_extra_key", "d_extra_value", "partials")
_INTEGERS = {
    **dict.fromkeys(SIZES, "i32"),
    **dict.fromkeys(["scale", "cap", "keep_scale", "unscaled", "w_factor", "threshold"], "i64"),
    **dict.fromkeys(["each", "column_tiles", "steps", "splits", "batch_size"], "i32"),
    **dict.fromkeys(["cu_seqlens_q", "cu_seqlens_k"], "*i32"),
    "slopes": "*fp32", "seed": "*i64",
}  # fmt: skip
_OPTIONAL = {  # tensors that a plain call has not
    "mask", "key_mask", "extra_key", "extra_value", "slopes", "cu_seqlens_q", "cu_seqlens_k", "seed",
    "grad_lse",
    "w", "d_extra_key", "d_extra_value",
}  # fmt: skip
ARCHITECTURES = (80, 90, 100, 120)
_ITEM = {"fp32": 4, "fp64": 8, "fp16": 2, "bf16": 2}


def _tile(
    kernel: str,
    dtype: str,
    size: int,
    arch: int,
    given: tuple[str, ...] = (),
    absent: tuple[str, ...] = ("left", "cap"),
    **_: Any,
) -> Tile:
    """What a launch on the architecture takes."""
    return Tile.of(
        _KERNELS[kernel][1], size, size, _ITEM[dtype], 4096, 4096, divmod(arch, 10), masked="mask" in given,
        padded="key_mask" in given, dropout="seed" in given, capped="cap" not in absent,
    )  # fmt: skip


def _case(
    kernel: str, variant: str, dtype: str, size: int, tile: Tile, architectures: tuple[int, ...],
    given: tuple[str, ...] = (), bytes: tuple[str, ...] = (), absent: tuple[str, ...] = ("left", "cap"),
) -> AotCase:  # fmt: skip
    """The kernel for heads of `size` with the optional tensors `given`, those in `bytes` of bool."""
    function = _KERNELS[kernel][0]
    names = function.arg_names
    numbers = any(name in given and name not in bytes for name in ("mask", "key_mask"))
    low = numbers or _ITEM[dtype] > 2
    options = tile.arguments
    blocks = {k: options.pop(k) for k in list(options) if k.startswith("BLOCK_")}
    fixed: dict[str, Any] = {
        "EXTRA": 2 if "extra_key" in given else 0, "NATURAL": low, "PRECISION": "ieee", "D": size, "V": size,
        **{f"ONE_{name}": name in "BH" for name in "BHLS"},
    }  # fmt: skip
    fixed |= (
        blocks
        | dict.fromkeys(absent)
        | dict.fromkeys(_OPTIONAL - set(given))
        | ({} if low else {"low": None})
    )
    if kernel == "forward":
        fixed["low"] = None
    fixed = {k: v for k, v in fixed.items() if k in names}
    wide = "*fp64" if dtype == "fp64" else "*fp32"
    types: dict[str, str | None] = {}
    for name in names:
        if name in fixed:
            continue
        if name in bytes:
            types[name] = "*u8"
        elif name in _WIDE:
            types[name] = wide
        elif "_" in name and name.split("_")[-1] in tuple("bhlgs") and name not in _INTEGERS:
            types[name] = "i32"
        else:
            types[name] = _INTEGERS.get(name)
    if "m_s" in types:
        fixed |= {"m_s": 1, "km_s": 1}
        types = {k: v for k, v in types.items() if k not in ("m_s", "km_s")}
    place = "" if len(architectures) == len(ARCHITECTURES) else f" sm_{architectures[0]}"
    pointers = tuple(k for k, v in types.items() if v is None)
    integers = {k: v for k, v in types.items() if v is not None}
    strides = tuple(
        k for k, v in types.items() if v == "i32" and k not in _INTEGERS and k[:2] not in ("m_", "km", "w_")
    )
    return AotCase(f"attention_{kernel}/{variant} {size} {dtype}{place}", function, pointers, integers, fixed,
                   options,
                   (*pointers, *strides), (dtype,), architectures)  # fmt: skip


_PACKED = ("cu_seqlens_q", "cu_seqlens_k")
_VARIANTS: dict[str, dict[str, Any]] = {
    "causal": {},
    "padding": {"given": ("key_mask",), "bytes": ("key_mask",), "absent": ("left", "right", "cap")},
    "packed dropout": {"given": (*_PACKED, "seed")},
    "mask dropout": {"given": ("mask", "key_mask", "seed", "grad_lse"), "bytes": ("key_mask",),
                     "absent": ("left", "right", "cap")},
    "mask": {"given": ("mask", "w"), "absent": ("left", "right", "cap")},
    "extra softcap": {
        "given": ("extra_key", "extra_value", "d_extra_key", "d_extra_value", "slopes"), "absent": (),
    },
}  # fmt: skip
_MAIN = (
    *(("causal", "bf16", size) for size in (64, 128, 256)), ("padding", "bf16", 80), ("packed dropout",
                                                                                      "fp16", 64),
    ("mask dropout", "fp16", 128), ("extra softcap", "bf16", 64), ("causal", "fp32", 64), ("mask", "fp32",
                                                                                           128),
    ("causal", "fp64", 64),
)  # fmt: skip
_OTHERS = (("mask dropout", "fp16", 64), ("mask", "bf16", 256), ("mask", "fp32", 128), ("mask", "fp64", 64))


def _cases() -> list[AotCase]:
    wanted = [(kernel, case) for kernel in ("forward", "rows", "columns") for case in _MAIN]
    wanted += [(kernel, case) for kernel in ("weights", "delta", "mask_gradient") for case in _OTHERS]
    found = []
    for kernel, (name, dtype, size) in wanted:
        tiles: dict[Tile, list[int]] = {}
        for arch in ARCHITECTURES:
            tiles.setdefault(_tile(kernel, dtype, size, arch, **_VARIANTS[name]), []).append(arch)
        found += [
            _case(kernel, name, dtype, size, tile, tuple(a), **_VARIANTS[name]) for tile, a in tiles.items()
        ]
    return found


AOT_CASES = _cases()
