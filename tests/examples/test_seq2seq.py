"""The seq2seq example learns both tasks, and decodes without the targets."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[2] / "examples" / "seq2seq.py"
TINY = ["--symbols", "5", "--length", "2", "5", "--hidden", "48", "--steps", "250", "--batch", "48"]
TINY += ["--lr", "1e-2", "--test-batches", "4"]
FEW = [*TINY, "--steps", "2", "--batch", "8"]


@pytest.fixture(scope="module")
def seq2seq():
    spec = importlib.util.spec_from_file_location("seq2seq", PATH)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look it up there
    spec.loader.exec_module(module)
    return module


def test_tasks(seq2seq):
    source = torch.tensor([[7, 4, 9, 4], [6, 5, 0, 0]])
    lengths = torch.tensor([4, 2])
    reverse, ordered = (seq2seq.solve(task, source, lengths) for task in seq2seq.TASKS)
    assert reverse.tolist() == [[4, 9, 4, 7, 2], [5, 6, 2, 0, 0]]
    assert ordered.tolist() == [[4, 4, 7, 9, 2], [5, 6, 2, 0, 0]]


def test_held_out_sequences_are_not_trained_on(seq2seq):
    options = seq2seq.parse(TINY)
    trained, tested = (next(seq2seq.batches(options, "sort", held_out, 0)) for held_out in (False, True))
    assert len(trained.source) == len(tested.source) == options.batch
    assert not set(map(tuple, trained.source.tolist())) & set(map(tuple, tested.source.tolist()))
    wider = torch.nn.functional.pad(tested.source, (0, 3))
    assert seq2seq.is_held_out(wider).all(), "padding must not decide"


@pytest.mark.parametrize("task", ["reverse", "sort"])
def test_it_learns(seq2seq, task, capsys):
    """To more than 99 %, decoding from the source alone: nothing but `accuracy` reads a target."""
    assert list(inspect.signature(seq2seq.Seq2Seq.decode).parameters) == [
        "self",
        "source",
        "lengths",
        "limit",
    ]
    assert seq2seq.main([*TINY, "--task", task]) == 0
    assert f"{task}: " in capsys.readouterr().out


@pytest.fixture
def model(seq2seq):
    torch.manual_seed(0)
    return seq2seq.Seq2Seq(5, 16).eval()


def test_decoding_feeds_back_its_own_output(seq2seq, model):
    """Given what it said as if that was the target, the decoder says it again."""
    batch = next(seq2seq.batches(seq2seq.parse(FEW), "sort", True, 0))
    said, weights = model.decode(batch.source, batch.lengths, limit=9)
    again = model(batch.source, batch.lengths, said).argmax(2)
    kept = said != seq2seq.PADDING
    assert again[kept].equal(said[kept])
    padding = torch.arange(batch.source.shape[1]) >= batch.lengths.unsqueeze(1)
    assert (weights.transpose(1, 2)[padding] == 0).all(), "padding gets no attention"


def test_decoding_does_not_depend_on_targets(seq2seq, monkeypatch):
    """The test gives wrong targets to no avail: the decoder says the same."""
    options = seq2seq.parse(FEW)
    run = seq2seq.train(options, "reverse")
    heard = []
    monkeypatch.setattr(seq2seq, "accuracy", lambda said, target: heard.append(said) or (0.0, 0.0))
    seq2seq.test(options, run)
    monkeypatch.setattr(seq2seq, "solve", lambda task, source, lengths: torch.full_like(source, 3))
    seq2seq.test(options, run)
    first, second = heard[: len(heard) // 2], heard[len(heard) // 2 :]
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_decoding_stops_at_the_end_symbol(seq2seq, model, monkeypatch):
    source, lengths = torch.full((3, 4), seq2seq.FIRST), torch.tensor([4, 2, 3])
    with torch.no_grad():
        model.head.bias[seq2seq.END] = 1e3
    assert model.decode(source, lengths, limit=9)[0].tolist() == [[seq2seq.END]] * 3
    with torch.no_grad():
        model.head.bias[seq2seq.END] = -1e3
    assert model.decode(source, lengths, limit=9)[0].shape == (3, 9)


def test_padding_changes_nothing(seq2seq, model):
    batch = next(seq2seq.batches(seq2seq.parse(FEW), "sort", True, 0))
    wider = torch.nn.functional.pad(batch.source, (0, 3), value=seq2seq.FIRST)
    torch.testing.assert_close(model(*batch), model(wider, batch.lengths, batch.target))


def test_accuracy(seq2seq):
    target = torch.tensor([[4, 5, 2, 0], [6, 2, 0, 0]])
    said = torch.tensor([[4, 5, 2], [6, 6, 2]])
    assert seq2seq.accuracy(target, target) == (1.0, 1.0)
    assert seq2seq.accuracy(said, target) == (0.8, 0.5)


def test_untrained_fails_and_draws(seq2seq, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert seq2seq.main([*FEW, "--draw", "--out", str(tmp_path)]) == 1
    for task in seq2seq.TASKS:
        assert (tmp_path / f"seq2seq_{task}.png").read_bytes().startswith(b"\x89PNG")


def test_without_tqdm_and_matplotlib(seq2seq, tmp_path, capsys, monkeypatch):
    for name in ("tqdm", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    assert seq2seq.main([*FEW, "--task", "sort", "--draw", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "sort: step 1 of 2" in printed
    assert "pip install matplotlib" in printed
