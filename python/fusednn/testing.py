"""What fusednn's tests, and those of anyone who adds a kernel, share: error budgets and the places to run.

A kernel is right if it is about as exact as PyTorch in the same dtype, both measured against the reference in
float64 (:func:`assert_close_to_oracle`). The budget is written here, once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

from .core import native, settings

ERROR_RATIO = 2.0
"""A kernel's largest error may be this many times that of same-dtype PyTorch."""

ULPS = 4.0
"""Added to it: units in the last place of the oracle's largest value, for results that PyTorch has exact."""


def error_budget(same_dtype_torch: Tensor, oracle: Tensor) -> float:
    """Return the largest error allowed beside `oracle` for a result of `same_dtype_torch`'s dtype.

    Args:
        same_dtype_torch: PyTorch's own result in the dtype under test, any shape.
        oracle: the float64 result, of the same shape.

    Values that are not finite in either have no error and don't count.
    """
    finite = oracle.isfinite() & same_dtype_torch.isfinite()
    torch_error = _largest(same_dtype_torch.double()[finite] - oracle[finite])
    info = torch.finfo(same_dtype_torch.dtype)
    largest = max(_largest(oracle[oracle.isfinite()]), info.tiny)
    return ERROR_RATIO * torch_error + ULPS * info.eps * largest


def assert_close_to_oracle(
    actual: Tensor, same_dtype_torch: Tensor, oracle: Tensor, what: str = "result"
) -> None:
    """Check `actual` against the float64 `oracle`, within :func:`error_budget`.

    Args:
        actual: the result under test.
        same_dtype_torch: PyTorch's own result for the same input in the same dtype: dtype, shape and device
            must agree with `actual`, and its error sets the budget.
        oracle: the result of the same computation in float64.
        what: the name of the result in a failure's text.

    Infinities and NaN must stand where the oracle, rounded to the dtype, has them, and nowhere else; where
    PyTorch itself overflows on the way to a finite result, `actual` may not.

    Raises:
        AssertionError: a shape, dtype or value differs; the text has the error, the budget and the place.
    """
    for name in ("shape", "dtype", "device"):
        got, expected = getattr(actual, name), getattr(same_dtype_torch, name)
        assert got == expected, f"{what}: got {name} {got}, expected {expected}"
    assert oracle.dtype == torch.float64, f"{what}: got an oracle of {oracle.dtype}, expected float64"
    assert oracle.shape == actual.shape, (
        f"{what}: got an oracle of shape {oracle.shape}, expected {actual.shape}"
    )
    if actual.numel() == 0:
        return
    oracle = oracle.to(actual.device)
    expected = oracle.to(actual.dtype)
    odd = ~expected.isfinite()
    torch.testing.assert_close(
        actual.where(odd, torch.zeros_like(actual)),
        expected.where(odd, torch.zeros_like(actual)),
        rtol=0,
        atol=0,
        equal_nan=True,
        msg=lambda text: f"{what}: infinities and NaN differ\n{text}",
    )
    error = (actual.double() - oracle).abs().where(~odd, torch.zeros_like(oracle))
    budget = error_budget(same_dtype_torch, oracle)
    bad = ~(error <= budget)  # NaN is bad too
    if bad.any():
        place = tuple(int(i) for i in bad.nonzero()[0])
        worst = error[bad].max().item() if not error.isnan().any() else float("nan")
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.numel()} elements beyond the budget: "
            f"largest error {worst:.3g}, budget {budget:.3g}; "
            f"first at {place}: got {actual[place].item()!r}, oracle {oracle[place].item()!r}"
        )


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill all memory that torch allocates uninitialised, from Python or C++, with NaN (bytes: 255) inside.

    A kernel that reads what it never wrote then shows it.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@contextlib.contextmanager
def emulated_cuda(module: ModuleType, device_type: str = "cpu") -> Iterator[None]:
    """Let `module` serve the ``cuda`` backend for tensors on `device_type`.

    Args:
        module: has the functions of ``fusednn._C.cuda``, e.g. those kernels compiled to run on the CPU.
        device_type: ``Tensor.device.type`` of the tensors that it takes.
    """
    with mock.patch.dict(native.cuda_modules, {device_type: module}):
        yield


def instruction_sets() -> tuple[str, ...]:
    """Instruction sets that this machine and this build can run the CPU kernels on, weakest first."""
    if native.extension is None:
        return ()
    best = settings.INSTRUCTION_SETS.index(native.extension.cpu.best_isa())
    return settings.INSTRUCTION_SETS[: best + 1]


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Run the CPU kernels inside on the instruction set `name`, one of :func:`instruction_sets`.

    Raises:
        RuntimeError: there are no compiled kernels.
        ValueError: the machine or the build lacks the instruction set.
    """
    if native.extension is None:
        raise RuntimeError(f"instruction_set: {native.unavailable_reason}")
    cpu = native.extension.cpu
    before = cpu.isa()
    cpu.set_isa(name)
    try:
        yield
    finally:
        cpu.set_isa(before)


def _largest(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0
