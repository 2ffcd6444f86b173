"""Where a test runs: one parameter for each backend that this process can execute.

Triton's interpreter is chosen when Triton is imported, so it has a process of its own:
``TRITON_INTERPRET=1 pytest`` runs the tests marked ``interpreter`` and no other; a plain ``pytest`` the rest.
With ``FUSEDNN_REQUIRE_ALL=1`` a place that is missing fails its tests instead of skipping them.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import fusednn
from fusednn import testing
from fusednn.core import native as _native

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
REQUIRE_ALL = os.environ.get("FUSEDNN_REQUIRE_ALL") == "1"
NO_EMULATOR = "the CUDA kernels on the CPU are not built: FUSEDNN_TEST_MODULES=1 at build adds them"
TESTS = Path(__file__).resolve().parent
TEST_MODULES = TESTS.parent / "build" / "test_modules"


@dataclass(frozen=True)
class Place:
    """A backend and the device on which the tests give it tensors."""

    name: str
    backend: str
    device: str = "cpu"

    @property
    def slow(self) -> bool:
        """Whether large shapes take too long: an interpreter or an emulator runs the kernels."""
        return self.backend in ("cuda", "triton") and self.device == "cpu"


PLACES = (
    Place("reference", "reference"),
    Place("cpu", "cpu"),
    Place("cuda-emulated", "cuda"),
    Place("triton-interpreted", "triton"),
    Place("reference-on-device", "reference", "cuda"),
    Place("cuda", "cuda", "cuda"),
    Place("triton", "triton", "cuda"),
)
MARKS = {
    "cuda-emulated": [pytest.mark.emulated],
    "triton-interpreted": [pytest.mark.interpreter],
    "reference-on-device": [pytest.mark.gpu],
    "cuda": [pytest.mark.gpu],
    "triton": [pytest.mark.gpu],
}


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark the tests of the layers, for tools/run_tests.py, which runs them apart from those of the house."""
    for folder in item.path.relative_to(TESTS).parts[:-1]:
        if (TESTS.parent / "python" / "fusednn" / folder).is_dir():
            item.add_marker("family")
            if folder == "attention":
                item.add_marker("attention")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep what this process can run: interpreted Triton, or the rest; device tests where there is one."""
    kept, left = [], []
    for item in items:
        interpreter = item.get_closest_marker("interpreter") is not None
        device = item.get_closest_marker("gpu") is not None
        runs = interpreter == INTERPRETED and (not device or torch.cuda.is_available())
        (kept if runs else left).append(item)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept


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
        if place.name == "cpu" and _native.extension is None:
            missing(f"no compiled kernels: {_native.unavailable_reason}")
        if place.name == "cuda" and "cuda" not in _native.cuda_modules:
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


@pytest.fixture(params=[pytest.param(p, id=p.name, marks=MARKS.get(p.name, ())) for p in PLACES])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """Run the test on each backend."""
    with running_on(request.param) as where:
        yield where


@pytest.fixture
def native():
    """Return the compiled kernels for CPU tensors; the weight cache starts empty."""
    if _native.extension is None:
        missing(f"no compiled kernels: {_native.unavailable_reason}")
    _native.extension.cpu.clear_packed_weights()
    with fusednn.use_backend("cpu"):
        yield _native.extension.cpu


@pytest.fixture(params=testing.instruction_sets() or ("none",))
def isa(request: pytest.FixtureRequest, native) -> Iterator[str]:
    """Run the test on each instruction set of this machine."""
    with testing.instruction_set(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20240501)
