"""Where attention runs: the places of the whole suite whose backend has the kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fusednn.core import native as _native
from tests import conftest as suite

FORWARD, BACKWARD = "attention_forward", "attention_backward"

# Kernels that this tree has: where one of these is missing, its tests fail or say so. The tests of a kernel
# that is found but not listed run too.
KERNELS: dict[str, tuple[str, ...]] = {
    "cpu": (FORWARD, BACKWARD),
    "cuda": (FORWARD,),
    "triton": (FORWARD, BACKWARD),
}

# Parameters of which a test in Triton or the emulator takes all values; the others take turns, as a call
# takes a tenth of a second there, and seconds to compile on a device.
IN_FULL = ("case",)

# In the interpreter a call and its backward take a second: of so many neighbours among a test's cases it runs
# the first. Tests not listed run all of theirs.
ONE_OF = {
    "test_agrees_with_torch": 2,
    "test_masks": 3,
    "test_lengths": 2,
    "test_head_sizes": 2,
    "test_expanded": 3,
    "test_gradients_of_some_results": 3,
    "test_gradients_of_some_tensors": 3,
    "test_hidden_keys_and_values_do_not_leak": 2,
    "test_nothing_to_attend_to": 3,
    "test_large_queries": 3,
    "test_scores_far_from_zero": 2,
    "test_the_same_bits_again": 3,
    "test_empty": 3,
    "test_shapes_as_torchs": 3,
    "test_masks_as_torchs": 2,
    "test_windows": 3,
    "test_results_in_order": 4,
    "test_every_backend_draws_the_same_mask": 2,
    "test_gradcheck": 5,
    "test_gradgradcheck": 6,
    "test_fakes_of_the_forward": 4,
    "test_fakes_of_the_backward": 4,
}


def _variant(item: pytest.Item) -> tuple[str, str] | None:
    """Values of the parameters in full and of the others, of a test where calls are slow."""
    params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    places = [p[0] for p in params.values() if isinstance(p, tuple) and p and isinstance(p[0], suite.Place)]
    if item.path.parent != Path(__file__).parent or not places or "case" not in params:
        return None
    if not (places[0].slow or places[0].backend == "triton"):
        return None
    full = {name: p for name, p in params.items() if name in IN_FULL or name.endswith("place")}
    others = {name: p for name, p in params.items() if name not in full}
    return repr(full), repr(others)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where calls are slow, a test of many cases takes one combination of its other parameters for each."""
    found = {item: variant for item in items if (variant := _variant(item)) is not None}
    cases: dict[tuple[Path, str], dict[str, int]] = {}
    variants: dict[tuple[Path, str], dict[str, int]] = {}
    for item, (case, variant) in found.items():
        for numbers, name in ((cases, case), (variants, variant)):
            of_test = numbers.setdefault((item.path, item.originalname), {})
            of_test.setdefault(name, len(of_test))
    left = set()
    for item, (case, variant) in found.items():
        test = item.path, item.originalname
        if variants[test][variant] != cases[test][case] % len(variants[test]):
            left.add(item)
    seen: Counter[tuple[Path, str]] = Counter()
    for item in items:
        if item.path.parent != Path(__file__).parent or item in left or not suite.INTERPRETED:
            continue
        test = item.path, item.originalname
        if item.get_closest_marker("interpreter") and seen[test] % ONE_OF.get(test[1], 1):
            left.add(item)
        seen[test] += 1
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
    kernels = suite.TEST_MODULES.parents[1] / "triton_kernels" / "attention" / "launch.py"
    return kernels.exists() and name in kernels.read_text()


def trains(place: suite.Place) -> bool:
    """Whether the place's backend has the backward too."""
    return place.backend == "reference" or BACKWARD in KERNELS[place.backend] or _found(place, BACKWARD)


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


@pytest.fixture(params=_params((FORWARD,)))
def place(request: pytest.FixtureRequest) -> Iterator[suite.Place]:
    """Run the test on each backend that has the forward."""
    yield from _run(request)


@pytest.fixture(params=_params((FORWARD, BACKWARD)))
def training_place(request: pytest.FixtureRequest) -> Iterator[suite.Place]:
    """Run the test on each backend that has the backward too."""
    yield from _run(request)


def _fast(place: suite.Place) -> bool:
    return not place.slow


def _fast_kernels(place: suite.Place) -> bool:
    return not place.slow and place.backend != "reference"


@pytest.fixture(params=_params((FORWARD,), _fast))
def fast_place(request: pytest.FixtureRequest) -> Iterator[suite.Place]:
    """Run the test on each backend that neither an interpreter nor an emulator runs."""
    yield from _run(request)


@pytest.fixture(params=_params((FORWARD,), _fast_kernels))
def kernels(request: pytest.FixtureRequest) -> Iterator[suite.Place]:
    """Run the test on each of those that has kernels of its own."""
    yield from _run(request)


@pytest.fixture(params=_params((FORWARD, BACKWARD), _fast_kernels))
def training_kernels(request: pytest.FixtureRequest) -> Iterator[suite.Place]:
    """Run the test on each of those that has the backward too."""
    yield from _run(request)
