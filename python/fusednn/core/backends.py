"""The backends that an op can have: where a kernel is found, and why it can't serve a call."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import native
from .dispatch import Implementation, Reasons, no_plan, no_reasons
from .tensors import FLOATS

_TRITON = "fusednn.triton_kernels"


def _unchanged(call: Any) -> Any:
    return call


@dataclass(frozen=True)
class Backend:
    """One backend of an op. Every function takes the op's call, a tuple with the names of its arguments.

    Args:
        name: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"torch"``.
        run: makes the results from the backend's kernels, a module, and a call; by default `launch` does, by
            the kernel of the op's name. Of ``"torch"``, which has no such module, it must
            be given.
        kernel: the kernel that must be there; that of the op's name by default.
        arguments: the call that the kernel is launched with, made from the op's.
        limits: why the kernel can't serve a call, beyond device and dtype.
        slower: why ``auto`` should leave the call to another backend: a measurement.
        plan: how the kernel would go about a call, values by name, for ``explain``.
        dtypes: those that the kernel takes.
        faster: why ``auto`` should prefer it to those behind it: a measurement. Where this is given, ``auto``
            leaves a call for which it finds no reason to the others.
        returns: of ``"torch"``, the results that torch's op gives; `run` returns None for others. Where the
            caller wants no more, it serves in place of ours, with its own gradients. By default all, and
            calls that autograd records are ours.
        stands_for: backends that leave to it, where they are asked for by name, what they can't serve.
        traced: of ``"torch"``, why its op, not ours, is traced into a graph, which does not see which
            backend will be asked for where it runs.
    """

    name: str
    run: Callable[[Any, Any], Any] | None = None
    kernel: str | None = None
    arguments: Callable[[Any], Any] = _unchanged
    limits: Callable[[Any], Reasons] = no_reasons
    slower: Callable[[Any], Reasons] = no_reasons
    plan: Callable[[Any], dict[str, Any]] = no_plan
    dtypes: tuple[torch.dtype, ...] = FLOATS
    faster: Callable[[Any], Reasons] | None = None
    returns: tuple[str, ...] = ()
    stands_for: tuple[str, ...] = ()
    traced: Callable[[Any], Reasons] = no_reasons


def cpu(**options: Any) -> Backend:
    """The compiled kernels for CPU tensors."""
    return Backend("cpu", **options)


def cuda(**options: Any) -> Backend:
    """The compiled kernels for CUDA tensors."""
    return Backend("cuda", **options)


def triton(**options: Any) -> Backend:
    """The Triton kernels."""
    return Backend("triton", **options)


def torchs(run: Callable[[Any], Any], **options: Any) -> Backend:
    """Torch's own op, which serves where it was measured to be the fastest: `run` makes it from a call."""
    return Backend("torch", lambda _kernels, call: run(call), **options)


def launch(kernels: Any, name: str, call: Any) -> Any:
    """Results of a kernel: a Triton launcher takes the call, a compiled one its arguments by position."""
    kernel = getattr(kernels, name)
    return kernel(call) if kernels.__name__.startswith(_TRITON) else kernel(*call)


def implementation(backend: Backend, name: str, family: str, like: str) -> Implementation:
    """Make the row of an op's table; `like` is the argument that decides on the device."""
    kernel, against, kernels = backend.kernel or name, _AGAINST[backend.name], _KERNELS[backend.name]

    def run(call: Any) -> Any:
        module = kernels(family, getattr(call, like).device.type)
        if backend.run is not None:
            return backend.run(module, call)
        return launch(module, kernel, backend.arguments(call))

    def unsupported(call: Any) -> Reasons:
        first = getattr(call, like)
        return (
            against(kernel, family, first)
            or _against_dtype(first.dtype, backend.dtypes)
            or backend.limits(call)
        )

    def not_faster(call: Any) -> Reasons:
        return [] if faster(call) else ["it was not measured to be faster for such a call"]

    faster = backend.faster or no_reasons
    slower = backend.slower if backend.faster is None else not_faster
    return Implementation(backend.name, run, unsupported, slower, backend.plan, faster, backend.stands_for)


def _against_dtype(dtype: torch.dtype, dtypes: tuple[torch.dtype, ...]) -> Reasons:
    if dtype in dtypes:
        return []
    *most, last = (str(d).removeprefix("torch.") for d in dtypes)
    return [f"got tensors of {dtype}, expected {', '.join(most)}{' or ' if most else ''}{last}"]


def _against_cpu(kernel: str, _family: str, like: torch.Tensor) -> Reasons:
    if native.extension is None:
        return [native.unavailable_reason or "no extension"]
    if not hasattr(native.extension.cpu, kernel):
        return [f"this build has no CPU kernel for {kernel}"]
    return [] if like.device.type == "cpu" else [f"got tensors on {like.device}, expected cpu"]


def _against_cuda(kernel: str, _family: str, like: torch.Tensor) -> Reasons:
    if not native.cuda_modules:
        return ["this build has no CUDA kernels"]
    if not any(hasattr(module, kernel) for module in native.cuda_modules.values()):
        return [f"this build has no CUDA kernel for {kernel}"]
    if not hasattr(native.cuda_modules.get(like.device.type), kernel):
        return [f"got tensors on {like.device}, expected cuda"]
    return []


def _against_triton(kernel: str, family: str, like: torch.Tensor) -> Reasons:
    try:
        support = importlib.import_module(_TRITON)
        kernels = importlib.import_module(f"{_TRITON}.{family}")
    except ImportError as error:
        return [f"there is no Triton kernel for {kernel}: {error}"]
    if not hasattr(kernels, kernel):
        return [f"there is no Triton kernel for {kernel}"]
    return support.not_supported_reasons(like.device, like.dtype)


_AGAINST: dict[str, Callable[[str, str, torch.Tensor], Reasons]] = {
    "cpu": _against_cpu,
    "cuda": _against_cuda,
    "triton": _against_triton,
    "torch": lambda *_: [],
}

# The module with the kernels of a family, for tensors on a device of this type.
_KERNELS: dict[str, Callable[[str, str], Any]] = {
    "cpu": lambda _family, _device: native.extension.cpu,
    "cuda": lambda _family, device: native.cuda_modules[device],
    "triton": lambda family, _device: importlib.import_module(f"{_TRITON}.{family}"),
    "torch": lambda _family, _device: None,
}
