"""What runs, and the fixtures of all families: a backend's place, the CPU's kernels, an instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import fusednn
from fusednn import testing
from fusednn.core import native as _native

from . import matrix, places


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--all``."""
    parser.addoption(
        "--all",
        action="store_true",
        help="every combination of parameters where calls are costly too, every target, every sanitizer",
    )


def _is_thorough(item: pytest.Item) -> bool:
    marks = {mark.name for mark in item.iter_markers()}
    params = item.callspec.params.values() if hasattr(item, "callspec") else ()
    elsewhere = "costly" in marks or any(p.name == "reference" for p in params if isinstance(p, places.Place))
    return "thorough" in marks or ("natively" in marks and elsewhere)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep what this process can run, and what was asked for."""
    every = config.getoption("all")
    left = {
        item
        for item in items
        if (item.get_closest_marker("interpreter") is not None) != places.INTERPRETED
        or (item.get_closest_marker("gpu") is not None and not torch.cuda.is_available())
        or (not every and _is_thorough(item))
    }
    if not every:
        left |= matrix.thinned(item for item in items if item not in left)
    if left:
        config.hook.pytest_deselected(items=list(left))
        items[:] = [item for item in items if item not in left]


place = places.fixture()
reference_place = places.fixture(lambda place: place.name == "reference")


@pytest.fixture
def native():
    """Return the compiled kernels for CPU tensors."""
    if _native.extension is None:
        places.missing(f"no compiled kernels: {_native.unavailable_reason}")
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
