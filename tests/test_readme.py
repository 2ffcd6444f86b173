"""The README's examples run, each alone; its figures are the committed results'; its links work anywhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fusednn
from benchmarks.report import overview, readme
from benchmarks.results import Document
from benchmarks.summary import BEST_TORCH, speedup, times

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()
MEASURED = (ROOT / "benchmarks" / "README.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
TABLES = re.findall(r"^<!-- measured (\S+) -->\n(.*?)^<!-- end -->", MEASURED, re.DOTALL | re.MULTILINE)


def results() -> dict[str, Document]:
    return {name: Document.from_json((RESULTS / name).read_text()) for name, _ in TABLES}


def operations(code: str) -> set[str]:
    """Run a block in an empty namespace; return the operations that it called outside its own `explain`."""
    return {e.operation for e in fusednn.explain(lambda: exec(code, {}))}


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_each_example_runs_alone(code, capsys):
    operations(code)


def test_the_first_example_shows_what_it_promises(capsys):
    exec(EXAMPLES[0], {})
    said = capsys.readouterr().out
    assert "12 of 12 candidates changed" in said
    assert "6 x attention_forward" in said


def test_the_block_takes_the_training_and_the_inference_operation():
    (block,) = [code for code in EXAMPLES if "DepthwiseSeparableConv2d" in code]
    assert {"separable_conv2d_train_forward", "separable_conv2d_forward"} <= operations(block)


def test_commands_are_the_makefiles_and_the_examples():
    rules = re.findall(r"^([a-z -]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = {target for rule in rules for target in rule.split()}
    named = set(re.findall(r"\bmake ([a-z-]+)", TEXT))
    assert {"test", "bench", "bench-full", "gpu-check"} <= named
    assert named - targets == set()
    assert all(f"`{path.stem}`" in TEXT for path in (ROOT / "examples").glob("[a-z]*.py"))


def test_no_link_depends_on_where_the_readme_is_read():
    """A package index shows it without the repository around it."""
    links = re.findall(r"\]\(([^)]*)\)", TEXT)
    assert [link for link in links if not link.startswith("https://")] == []
    for path in re.findall(r"`((?:docs|benchmarks)/[\w./-]+|[A-Z]+\.md)`", TEXT):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\((?!https:)([^)]*)\)", MEASURED):
        assert (ROOT / "benchmarks" / link).exists(), link


def test_the_figures_are_those_of_the_committed_results():
    documents = results()
    for name, table in TABLES:
        assert table == readme(documents[name]), name
    by_family = {document.cases[0].family: document for document in documents.values()}
    order = ("rnn", "conv", "attention", "spatial", "recurrence")
    assert overview([by_family[family] for family in order]) in TEXT
    ratios = [speedup(case, BEST_TORCH) for document in documents.values() for case in document.cases]
    assert f"between {times(min(ratios))} and {times(max(ratios))}" in " ".join(TEXT.split())
