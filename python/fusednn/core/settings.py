"""Every environment variable and context manager of fusednn, in one place.

| variable | default | meaning |
|---|---|---|
| ``FUSEDNN_BACKEND`` | ``auto`` | backend of every call outside a :class:`use_backend` block |
| ``FUSEDNN_CPU_ISA`` | best of the machine | cap of the CPU kernels: ``baseline``, ``avx2`` or ``avx512`` |
| ``FUSEDNN_NATIVE`` | ``1`` | ``0``: do not build (at install) or do not load (at import) the extension |
| ``FUSEDNN_CUDA`` | ``auto`` | at install: ``1`` requires the CUDA kernels, ``0`` leaves them out |
| ``FUSEDNN_CUDA_ARCHS`` | all targets | at install: CUDA architectures: ``90``, ``80;90``, ``native`` |
| ``FUSEDNN_TEST_MODULES`` | ``0`` | at build: ``1`` adds the emulator's test module, never installed |
"""

from __future__ import annotations

import contextlib
import os
from contextvars import ContextVar, Token
from typing import Literal, get_args

Backend = Literal["auto", "reference", "cpu", "cuda", "triton", "torch"]
BACKENDS: tuple[str, ...] = get_args(Backend)
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")

_backend: ContextVar[str | None] = ContextVar("fusednn_backend", default=None)


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: got {name!r}, expected one of {', '.join(BACKENDS)}")
    return name


_default_backend = _checked(os.environ.get("FUSEDNN_BACKEND", "auto"), "FUSEDNN_BACKEND")


def backend() -> str:
    """Name of the backend asked for at this point of the program; ``auto`` unless someone asked."""
    return _backend.get() or _default_backend


def native_enabled() -> bool:
    """Whether ``FUSEDNN_NATIVE`` allows the compiled extension to be loaded."""
    return os.environ.get("FUSEDNN_NATIVE", "1") != "0"


def cpu_isa() -> str | None:
    """Cap that ``FUSEDNN_CPU_ISA`` sets on the CPU kernels' instruction set, if any."""
    return os.environ.get("FUSEDNN_CPU_ISA") or None


class use_backend(contextlib.ContextDecorator):
    """Run the calls inside on one backend.

    Args:
        name: ``"auto"``, ``"reference"``, ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"torch"`` (torch's own op,
            where an op has it in its table). Any name but ``auto`` is binding: a call that the backend can't
            serve raises ``RuntimeError`` with every reason.

    Raises:
        ValueError: the name is none of these.

    The choice holds for this thread (and asyncio task), nests, and is remembered for the backward of the
    calls made inside.
    """

    # The names are for editors to offer; `str`, so that one read from a command line passes a type checker.
    def __init__(self, name: Backend | str) -> None:
        self.name = _checked(name, "use_backend")
        self._tokens: list[Token[str | None]] = []

    def __enter__(self) -> use_backend:
        self._tokens.append(_backend.set(self.name))
        return self

    def __exit__(self, *exc: object) -> None:
        _backend.reset(self._tokens.pop())
