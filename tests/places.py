"""Where a test runs: the backends that this process can execute, and the device on which tensors lie there.

Triton's interpreter is chosen when Triton is imported, so it has processes of its own: with
``TRITON_INTERPRET=1`` pytest runs the tests marked ``interpreter`` and no other; without, the rest.
With ``FUSEDNN_REQUIRE_ALL=1`` a place that is missing fails its tests instead of skipping them.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import fusednn
from fusednn import testing
from fusednn.core import native

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
REQUIRE_ALL = os.environ.get("FUSEDNN_REQUIRE_ALL") == "1"
NO_EMULATOR = "the CUDA kernels on the CPU are not built: FUSEDNN_TEST_MODULES=1 at build adds them"
TEST_MODULES = Path(__file__).resolve().parents[1] / "build" / "test_modules"


@dataclass(frozen=True)
class Place:
    """A backend and the device on which the tests give it tensors."""

    name: str
    backend: str
    device: str = "cpu"
    marks: tuple[str, ...] = ()

    @property
    def slow(self) -> bool:
        """Whether large shapes take too long: an interpreter or an emulator runs the kernels."""
        return self.backend in ("cuda", "triton") and self.device == "cpu"

    @property
    def here(self) -> bool:
        """Whether it is one for this process."""
        return ("interpreter" in self.marks) == INTERPRETED and (
            self.device == "cpu" or torch.cuda.is_available()
        )


ALL = (
    Place("reference", "reference"),
    Place("cpu", "cpu"),
    Place("cuda-emulated", "cuda", marks=("emulated", "costly")),
    Place("triton-interpreted", "triton", marks=("interpreter", "costly", "in_turn")),
    Place("reference-on-device", "reference", "cuda", ("gpu",)),
    Place("cuda", "cuda", "cuda", ("gpu",)),
    Place("triton", "triton", "cuda", ("gpu", "costly")),  # seconds to compile a kernel
)


def anywhere(_place: Place) -> bool:
    """Every place."""
    return True


def fixture(wanted: Callable[[Place], bool] = anywhere) -> Any:
    """Make a fixture that runs a test on each of the wanted places, and is the place."""

    def place(request: pytest.FixtureRequest) -> Iterator[Place]:
        with running_on(request.param) as where:
            yield where

    params = [
        pytest.param(p, id=p.name, marks=[getattr(pytest.mark, mark) for mark in p.marks])
        for p in ALL
        if p.here and wanted(p)
    ]
    return pytest.fixture(params=params)(place)


def missing(reason: str) -> None:
    """Skip the test, or fail it where everything is required."""
    if REQUIRE_ALL:
        pytest.fail(f"FUSEDNN_REQUIRE_ALL=1: {reason}")
    pytest.skip(reason)


def emulated_module():
    """Return the CUDA kernels compiled for the CPU, or None."""
    if TEST_MODULES.is_dir() and str(TEST_MODULES) not in sys.path:
        sys.path.append(str(TEST_MODULES))
    try:
        return importlib.import_module("_cuda_on_cpu")
    except ImportError:
        return None


@contextlib.contextmanager
def running_on(place: Place) -> Iterator[Place]:
    """Run the calls inside at `place`, with uninitialised memory poisoned."""
    with contextlib.ExitStack() as stack:
        if place.name == "cpu" and native.extension is None:
            missing(f"no compiled kernels: {native.unavailable_reason}")
        if place.name == "cuda" and "cuda" not in native.cuda_modules:
            missing("this build has no CUDA kernels")
        if place.name == "cuda-emulated":
            module = emulated_module()
            if module is None:
                missing(NO_EMULATOR)
            stack.enter_context(testing.emulated_cuda(module))
        if place.backend == "triton":
            try:
                importlib.import_module("fusednn.triton_kernels.rnn")
            except ImportError as error:
                missing(f"no Triton kernels: {error}")
        stack.enter_context(fusednn.use_backend(place.backend))
        stack.enter_context(testing.poisoned_memory())
        yield place
