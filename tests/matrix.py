"""Which combinations of their parameters the tests run in.

Natively each test runs in all of them. Where a call is costly (marker ``costly``: an interpreter or an
emulator runs the kernels, or a device's compiler makes one first) it runs in so many that every two values
that meet in some combination meet in one that runs; ``pytest --all`` runs all of them there too.

Long lists of sizes or of hand-made cases are gone through once there: a value of a parameter that the marker
``in_turn`` names meets one value of each other parameter, in turn. Without names it speaks of all: so it is
where calls are costliest, in the interpreter.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch

from .places import Place

Values = Mapping[str, Hashable]


def pairwise(rows: Sequence[Values], in_turn: frozenset[str] = frozenset()) -> list[int]:
    """Choose rows, by number, in which all values and pairs occur that occur in any.

    Values of the names `in_turn` needn't meet others. Of rows that add as much, the one of rarer values is
    taken.
    """
    met = [_met(row, in_turn) for row in rows]
    unmet, taken = set().union(*met), Counter[tuple[str, Hashable]]()
    chosen = []
    while unmet:
        best = max(
            range(len(rows)), key=lambda i: (len(met[i] & unmet), -sum(taken[v] for v in rows[i].items()))
        )
        chosen.append(best)
        unmet -= met[best]
        taken.update(rows[best].items())
    return sorted(chosen)


def _met(row: Values, in_turn: frozenset[str]) -> set[frozenset[tuple[str, Hashable]]]:
    pairs = itertools.combinations([v for v in row.items() if v[0] not in in_turn], 2)
    return {frozenset(pair) for pair in pairs} | {frozenset([v]) for v in row.items()}


def thinned(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    """Return the items of costly tests that add nothing."""
    tests: dict[Hashable, list[pytest.Function]] = {}
    for item in items:
        if (
            isinstance(item, pytest.Function)
            and hasattr(item, "callspec")
            and item.get_closest_marker("costly")
        ):
            place = tuple(v for v in item.callspec.params.values() if isinstance(v, Place))
            tests.setdefault((item.parent, item.originalname, place), []).append(item)
    left: set[pytest.Item] = set()
    for of_test in tests.values():
        in_turn = frozenset(
            name
            for item in of_test
            for mark in item.iter_markers("in_turn")
            for name in mark.args or item.callspec.params
        )
        kept = set(pairwise([_values(item) for item in of_test], in_turn))
        left.update(item for i, item in enumerate(of_test) if i not in kept)
    return left


def _values(item: pytest.Function) -> Values:
    """Return an item's parameters but for its place."""
    return {k: _comparable(v) for k, v in item.callspec.params.items() if not isinstance(v, Place)}


def _comparable(value: Any) -> Hashable:
    """Return what is equal for the same value: pytest hands the objects of its lists on."""
    plain = isinstance(value, (str, bool, int, float, type(None), torch.dtype))
    return (type(value).__name__, value) if plain else id(value)
