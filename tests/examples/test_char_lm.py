"""The character model trains alike with either cell, writes its files, and notices when it does not."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fusednn

PATH = Path(__file__).parents[2] / "examples" / "char_lm.py"
SMALL = ["--steps", "12", "--batch", "4", "--hidden", "24", "--seq", "10"]


@pytest.fixture(scope="module")
def char_lm():
    spec = importlib.util.spec_from_file_location("char_lm", PATH)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look it up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def no_plot(char_lm, monkeypatch):
    """Spare the seconds that drawing takes."""
    monkeypatch.setattr(char_lm, "plot", lambda *_: None)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_losses_agree(char_lm, no_plot, cell, tmp_path, capsys):
    assert char_lm.main([*SMALL, "--cell", cell, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "the losses agree" in printed
    assert "speed-up" in printed
    assert "\ndef " in printed  # the sample

    record = json.loads((tmp_path / f"char_lm_{cell}.json").read_text())
    theirs, ours = record["runs"]
    assert len(ours["losses"]) == len(theirs["seconds"]) == 12
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
    assert theirs["losses"][-1] < theirs["losses"][0]
    assert ours["perplexity"][1] < ours["perplexity"][0]


def test_plot(char_lm, tmp_path):
    pytest.importorskip("matplotlib")
    assert char_lm.main([*SMALL, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "char_lm_lstm.png").read_bytes().startswith(b"\x89PNG")


class ForgetfulLSTMCell(fusednn.LSTMCell):
    """Wrong by one part in a thousand, in the state alone."""

    def forward(self, input, hx=None):
        h, c = super().forward(input, hx)
        return h, 0.999 * c


class BrokenGRUCell(fusednn.GRUCell):
    """Gives NaN, of which every comparison is false."""

    def forward(self, input, hx=None):
        return super().forward(input, hx) * float("nan")


class WrongGradient(torch.autograd.Function):
    """The identity, whose gradient is one percent too large."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return 1.01 * grad


class WrongBackwardGRUCell(fusednn.GRUCell):
    """Right forward, wrong backward."""

    def forward(self, input, hx=None):
        return WrongGradient.apply(super().forward(input, hx))


@pytest.mark.parametrize(
    ("cell", "broken"),
    [("lstm", ForgetfulLSTMCell), ("gru", BrokenGRUCell), ("gru", WrongBackwardGRUCell)],
)
def test_a_wrong_cell_fails(char_lm, no_plot, cell, broken, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(char_lm, "generate", lambda *_: "")
    torch_class = {"lstm": nn.LSTMCell, "gru": nn.GRUCell}[cell]
    cells = {cell: (torch_class, broken)}
    assert char_lm.main([*SMALL, "--cell", cell, "--out", str(tmp_path)], cells) == 1
    assert "the losses differ: at step" in capsys.readouterr().err


def test_backend_reaches_the_cells(char_lm, no_plot, tmp_path):
    with pytest.raises(RuntimeError, match="backend 'cuda' can't serve"):
        char_lm.main([*SMALL, "--backend", "cuda", "--out", str(tmp_path)])
    assert char_lm.main([*SMALL, "--backend", "reference", "--out", str(tmp_path)]) == 0


def test_without_tqdm_and_matplotlib(char_lm, tmp_path, capsys, monkeypatch):
    for name in ("tqdm", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    assert char_lm.main([*SMALL, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "step 6 of 12" in printed
    assert "pip install matplotlib" in printed
    assert not list(tmp_path.glob("*.png"))
