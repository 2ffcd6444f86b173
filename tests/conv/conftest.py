"""Where the convolutions run: the places of the whole suite whose backend has the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fusednn.core import native as _native
from tests import conftest as suite

DEPTHWISE = ("depthwise_conv2d_forward", "depthwise_conv2d_backward")
INFERENCE = ("separable_conv2d_forward",)
TRAINING = ("separable_conv2d_train_forward", "separable_conv2d_train_backward")

# Kernels that this tree has: where one of these is missing, its tests fail or say so. The tests of a kernel
# that is found but not listed run too.
ALL = DEPTHWISE + INFERENCE + TRAINING
KERNELS: dict[str, tuple[str, ...]] = {"cpu": ALL, "cuda": ALL, "triton": ALL}

# On devices these are torch's products around the depthwise kernels, where there is no kernel of the name.
COMPOSED = INFERENCE + TRAINING

# Parameters of which a test in Triton takes one combination for each of its cases: a call takes a second in
# the interpreter, and as long to compile on a device.
CROSSED = ("dtype", "mode", "last")


def _variant(item: pytest.Item) -> tuple[str, str] | None:
    """Values of the crossed parameters and of the others, of a test in Triton."""
    params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    places = [p[0] for p in params.values() if isinstance(p, tuple) and p and isinstance(p[0], suite.Place)]
    if item.path.parent != Path(__file__).parent or not any(place.backend == "triton" for place in places):
        return None
    crossed = {name: p for name, p in params.items() if name in CROSSED}
    others = {name: p for name, p in params.items() if name not in CROSSED}
    return (repr(crossed), repr(others)) if crossed else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In Triton a test of many cases and dtypes takes each case in one dtype, in turn."""
    found = {item: variant for item in items if (variant := _variant(item)) is not None}
    variants: dict[str, dict[str, int]] = {}
    cases: dict[str, dict[str, int]] = {}
    for item, (variant, case) in found.items():
        for numbers, name in ((variants, variant), (cases, case)):
            of_test = numbers.setdefault(item.originalname, {})
            of_test.setdefault(name, len(of_test))
    left = []
    for item, (variant, case) in found.items():
        its_variants, its_cases = variants[item.originalname], cases[item.originalname]
        if len(its_cases) > 1 and its_variants[variant] != its_cases[case] % len(its_variants):
            left.append(item)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in set(left)]


def _found(place: suite.Place, name: str) -> bool:
    if place.backend in ("cuda", "triton") and name in COMPOSED:
        return all(_found(place, depthwise) for depthwise in DEPTHWISE)
    if place.backend == "cpu":
        return _native.extension is not None and hasattr(_native.extension.cpu, name)
    if place.name == "cuda-emulated":
        return hasattr(suite.emulated_module(), name)
    if place.backend == "cuda":
        return any(hasattr(module, name) for module in _native.cuda_modules.values())
    kernels = suite.TEST_MODULES.parents[1] / "triton_kernels" / "conv" / "launch.py"
    return kernels.exists() and f"def {name}(" in kernels.read_text()


def _params(names: tuple[str, ...]) -> list:
    def belongs(place: suite.Place) -> bool:
        if place.backend == "reference":
            return True
        if place.backend == "triton" and names == TRAINING:
            return False  # minutes: test_device_block.py has a few cases of it
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


@pytest.fixture(params=_params(DEPTHWISE))
def place(request: pytest.FixtureRequest) -> Iterator[suite.Place]:
    """Run the test on each backend that has the depthwise kernels."""
    yield from _run(request)


@pytest.fixture(params=_params(INFERENCE))
def inference_place(request: pytest.FixtureRequest) -> Iterator[suite.Place]:
    """Run the test on each backend that has the inference of the block."""
    yield from _run(request)


@pytest.fixture(params=_params(TRAINING))
def training_place(request: pytest.FixtureRequest) -> Iterator[suite.Place]:
    """Run the test on each backend that has the training of the block."""
    yield from _run(request)
