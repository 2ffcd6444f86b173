"""The choice of combinations: no pair is lost, few are kept; planted faults are found."""

import itertools
import random

import pytest

from tests import matrix

PARAMETERS = {"dtype": "abcd", "shape": range(6), "masked": (False, True), "output": "wxyz"}
PRODUCT = [dict(zip(PARAMETERS, values)) for values in itertools.product(*PARAMETERS.values())]


def pairs(rows):
    return {pair for row in rows for pair in itertools.combinations(row.items(), 2)}


def lost(rows, kept):
    return pairs(rows) - pairs([rows[i] for i in kept])


def test_every_pair_is_in_a_row_that_is_kept():
    kept = matrix.pairwise(PRODUCT)
    assert lost(PRODUCT, kept) == set()
    assert len(kept) <= 1.5 * 6 * 4  # the longest two parameters need so many
    assert kept == sorted(set(kept))


def test_of_rows_that_are_no_product():
    """Some parameters are missing in some rows, as where a test's cases exclude each other."""
    draw = random.Random(0)
    for _ in range(20):
        rows = draw.sample(PRODUCT, 60)
        rows = [{k: v for k, v in row.items() if draw.random() > 0.1} for row in rows]
        assert lost(rows, matrix.pairwise(rows)) == set()


def test_single_parameters_keep_all_values():
    assert matrix.pairwise([{"a": x} for x in range(5)]) == list(range(5))
    assert matrix.pairwise([{}, {}]) == []
    assert matrix.pairwise([]) == []


def test_a_parameter_in_turn_meets_the_others_in_turn():
    rows = [dict(zip("abc", values)) for values in itertools.product(range(12), range(4), range(2))]
    kept = [rows[i] for i in matrix.pairwise(rows, frozenset("a"))]
    assert sorted(row["a"] for row in kept) == list(range(12))
    assert {(row["b"], row["c"]) for row in kept} == set(itertools.product(range(4), range(2)))
    assert {sum(row["b"] == b for row in kept) for b in range(4)} == {3}


@pytest.mark.parametrize("place", range(len(matrix.pairwise(PRODUCT))))
def test_a_choice_without_one_of_its_rows_loses_a_pair(place):
    """Planted: were one row less kept, the check above would see it."""
    kept = matrix.pairwise(PRODUCT)
    del kept[place]
    assert lost(PRODUCT, kept)


SUITE = """
import pytest

@pytest.fixture(params=[pytest.param(0, id="fast"), pytest.param(1, id="slow", marks=pytest.mark.costly)])
def where(request): return request.param

@pytest.mark.parametrize("a", [1, 2, 3])
@pytest.mark.parametrize("b", [(1,), (2,), (1, 2)], ids=str)
@pytest.mark.parametrize("c", ["x", "y"])
def test_pairs(where, a, b, c): pass

@pytest.mark.costly
@pytest.mark.in_turn("a")
@pytest.mark.parametrize("a", range(10))
@pytest.mark.parametrize("b", "xyz")
def test_in_turn(a, b): pass

@pytest.mark.thorough
def test_thorough(): pass

@pytest.mark.natively
def test_differences(where): pass
"""
INI = "[pytest]\naddopts = -q -p no:cacheprovider\nmarkers =\n"
INI += "".join(f"  {name}: x\n" for name in ("costly", "in_turn", "thorough", "natively"))


def collected(folder, *options):
    """Run pytest on the suite in this process; return how many of each test ran, by place."""
    seen = []

    class Recorder:
        def pytest_runtest_call(self, item):
            params = getattr(item, "callspec", None)
            seen.append((item.originalname, "slow" if params and params.params.get("where") else "fast"))

    from tests import conftest

    assert (
        pytest.main(
            [str(folder), f"--rootdir={folder}", "--import-mode=importlib", *options],
            plugins=[conftest, Recorder()],
        )
        == 0
    )
    return {key: seen.count(key) for key in seen}


@pytest.fixture
def suite(tmp_path):
    (tmp_path / "pytest.ini").write_text(INI)
    (tmp_path / "test_suite.py").write_text(SUITE)
    return tmp_path


def test_costly_tests_are_thinned(suite):
    assert collected(suite) == {
        ("test_pairs", "fast"): 18,
        ("test_pairs", "slow"): 10,
        ("test_in_turn", "fast"): 10,
        ("test_differences", "fast"): 1,
    }


def test_all_runs_all(suite):
    assert collected(suite, "--all") == {
        ("test_pairs", "fast"): 18,
        ("test_pairs", "slow"): 18,
        ("test_in_turn", "fast"): 30,
        ("test_thorough", "fast"): 1,
        ("test_differences", "fast"): 1,
        ("test_differences", "slow"): 1,
    }
