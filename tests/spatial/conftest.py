"""Where spatial attention runs: the places of the whole suite whose backend has the kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fusednn.core import native as _native
from tests import conftest as suite

SOFTMAX = ("spatial_softmax_forward", "spatial_softmax_backward")
ATTENTION = ("spatial_attention_forward", "spatial_attention_backward")
RECURRENCE = ("attention_lstm_forward", "attention_lstm_backward")

# Kernels that this tree has: where one of these is missing, its tests fail or say so. The tests of a kernel
# that is found but not listed run too.
KERNELS: dict[str, tuple[str, ...]] = {
    "cpu": (*SOFTMAX, *ATTENTION, *RECURRENCE),
    "cuda": (*SOFTMAX, *ATTENTION, *RECURRENCE),
    "triton": (*SOFTMAX, *ATTENTION),
}

# Parameters of which a test in Triton takes all combinations; the others take turns, as a call takes a tenth
# of a second in the interpreter, and seconds to compile on a device.
IN_FULL = ("score", "output", "name")
STEP = 5  # prime to the number of combinations, so that neighbours differ in every parameter


def _variant(item: pytest.Item) -> tuple[str, str] | None:
    """Values of the parameters in full and of the others, of a test in Triton."""
    params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    places = [p[0] for p in params.values() if isinstance(p, tuple) and p and isinstance(p[0], suite.Place)]
    if item.path.parent != Path(__file__).parent or not any(place.backend == "triton" for place in places):
        return None
    full = {name: p for name, p in params.items() if name in IN_FULL}
    others = {name: p for name, p in params.items() if name not in IN_FULL}
    return repr(full), repr(others)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In Triton a test of every score and output takes one combination of its other parameters for each."""
    found = {item: variant for item in items if (variant := _variant(item)) is not None}
    cases: dict[str, dict[str, int]] = {}
    variants: dict[str, dict[str, int]] = {}
    for item, (case, variant) in found.items():
        for numbers, name in ((cases, case), (variants, variant)):
            of_test = numbers.setdefault(item.originalname, {})
            of_test.setdefault(name, len(of_test))
    left = set()
    for item, (case, variant) in found.items():
        its_cases, its_variants = cases[item.originalname], variants[item.originalname]
        turn = its_cases[case] * STEP % len(its_variants)
        if len(its_cases) > 1 and its_variants[variant] != turn:
            left.add(item)
    if left:
        config.hook.pytest_deselected(items=list(left))
        items[:] = [item for item in items if item not in left]


def _found(place: suite.Place, name: str) -> bool:
    if place.backend == "cpu":
        return _native.extension is not None and hasattr(_native.extension.cpu, name)
    if place.name == "cuda-emulated":
        return hasattr(suite.emulated_module(), name)
    if place.backend == "cuda":
        return any(hasattr(module, name) for module in _native.cuda_modules.values())
    kernels = suite.TEST_MODULES.parents[1] / "triton_kernels" / "spatial" / "launch.py"
    return kernels.exists() and f"def {name}(" in kernels.read_text()


def _params(names: tuple[str, ...], wanted: Callable[[suite.Place], bool] = lambda _: True) -> list:
    def belongs(place: suite.Place) -> bool:
        if place.backend == "reference":
            return True
        return set(names) <= set(KERNELS[place.backend]) or all(_found(place, n) for n in names)

    return [
        pytest.param((p, names), id=p.name, marks=suite.MARKS.get(p.name, ()))
        for p in suite.PLACES
        if belongs(p) and wanted(p)
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


def _device(place: suite.Place) -> bool:
    """Whether the place has a device's kernels and can take large work, as the interpreter can't."""
    return place.backend in ("cuda", "triton") and place.name != "triton-interpreted"


@pytest.fixture(params=_params(ATTENTION, _device))
def device_place(request: pytest.FixtureRequest) -> Iterator[suite.Place]:
    """Run the test on each backend of devices that has the attention."""
    yield from _run(request)


@pytest.fixture(params=_params(RECURRENCE, lambda place: place.backend == "cuda"))
def device_recurrence(request: pytest.FixtureRequest) -> Iterator[suite.Place]:
    """Run the test on the CUDA kernels of the recurrence."""
    yield from _run(request)


@pytest.fixture(params=_params(SOFTMAX))
def softmax_place(request: pytest.FixtureRequest) -> Iterator[suite.Place]:
    """Run the test on each backend that has the softmax."""
    yield from _run(request)


@pytest.fixture(params=_params(RECURRENCE))
def recurrence_place(request: pytest.FixtureRequest) -> Iterator[suite.Place]:
    """Run the test on each backend that has the recurrence."""
    yield from _run(request)
