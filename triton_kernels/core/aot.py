"""What a kernel module lists in AOT_CASES, so that tools/triton_aot.py can compile it without a device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AotCase:
    """One specialisation of one kernel; compiled for each dtype and each architecture, or some of them.

    pointers: arguments that point to elements of the dtype under test.
    integers: other run-time arguments and their Triton types, such as {"hidden": "i32"}.
    constants: compile-time arguments, None for absent pointers among them.
    options: Triton's, as the launch gives them, such as {"num_warps": 4}.
    divisible_by_16: arguments (addresses or sizes) that the launch would find to be multiples of 16.
    """

    name: str
    kernel: Any
    pointers: tuple[str, ...]
    integers: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]
    divisible_by_16: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("fp32", "fp64", "fp16", "bf16")
    architectures: tuple[int, ...] = ()
