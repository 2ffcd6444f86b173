"""Where spatial attention runs: the places of the whole suite whose backend has the kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fusednn import _native
from tests import conftest as suite

SOFTMAX = ("spatial_softmax_forward", "spatial_softmax_backward")
ATTENTION = ("spatial_attention_forward", "spatial_attention_backward")
RECURRENCE = ("attention_lstm_forward", "attention_lstm_backward")

# Kernels that this tree has: where one of these is missing, its tests fail or say so. The tests of a kernel
# that is found but not listed run too.
KERNELS: dict[str, tuple[str, ...]] = {
    "cpu": (*SOFTMAX, *ATTENTION, *RECURRENCE),
    "cuda": (*SOFTMAX, *ATTENTION, *RECURRENCE),
    "triton": (),
}


def _found(place: suite.Place, name: str) -> bool:
    if place.backend == "cpu":
        return _native.extension is not None and hasattr(_native.extension.cpu, name)
    if place.name == "cuda-emulated":
        return hasattr(suite.emulated_module(), name)
    if place.backend == "cuda":
        return any(hasattr(module, name) for module in _native.cuda_modules.values())
    return (suite.TEST_MODULES.parents[1] / "triton_kernels" / "spatial.py").exists()


def _params(names: tuple[str, ...]) -> list:
    def belongs(place: suite.Place) -> bool:
        if place.backend == "reference":
            return True
        return set(names) <= set(KERNELS[place.backend]) or all(_found(place, n) for n in names)

    return [
        pytest.param((p, names), id=p.name, marks=suite.MARKS.get(p.name, ()))
        for p in suite.PLACES
        if belongs(p)
    ]


def _run(request: pytest.FixtureRequest) -> Iterator[suite.Place]:
    where, names = request.param
    with suite.running_on(where) as place:
        if place.backend != "reference" and not all(_found(place, name) for name in names):
            suite.missing(f"{place.name} lacks one of {', '.join(names)}")
        yield place


@pytest.fixture(params=_params(ATTENTION))
def place(request: pytest.FixtureRequest) -> Iterator[suite.Place]:
    """Run the test on each backend that has the attention."""
    yield from _run(request)


@pytest.fixture(params=_params(SOFTMAX))
def softmax_place(request: pytest.FixtureRequest) -> Iterator[suite.Place]:
    """Run the test on each backend that has the softmax."""
    yield from _run(request)


@pytest.fixture(params=_params(RECURRENCE))
def recurrence_place(request: pytest.FixtureRequest) -> Iterator[suite.Place]:
    """Run the test on each backend that has the recurrence."""
    yield from _run(request)
