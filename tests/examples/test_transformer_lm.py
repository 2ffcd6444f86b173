"""The Transformer language model trains alike with either layer, and notices when it does not."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import fusednn

PATH = Path(__file__).parents[2] / "examples" / "transformer_lm.py"
SMALL = ["--steps", "100", "--batch", "4", "--hidden", "16", "--heads", "2", "--seq", "12"]


@pytest.fixture(scope="module")
def transformer_lm():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PATH.parent)  # it imports char_lm
        spec = importlib.util.spec_from_file_location("transformer_lm", PATH)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def no_plot(transformer_lm, monkeypatch):
    """Spare the seconds that drawing takes."""
    monkeypatch.setattr(transformer_lm.char_lm, "plot", lambda *_: None)


@pytest.mark.parametrize("layer", ["attention", "encoder"])
def test_losses_agree_for_100_steps(transformer_lm, no_plot, layer, tmp_path, capsys):
    assert transformer_lm.main([*SMALL, "--layer", layer, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "the losses agree" in printed
    assert "ms per step" in printed
    assert "\ndef " in printed  # the sample

    record = json.loads((tmp_path / f"transformer_lm_{layer}.json").read_text())
    theirs, ours = record["runs"]
    assert [theirs["name"][:8], ours["name"][:7]] == ["torch.nn", "fusednn"]
    assert len(ours["losses"]) == len(theirs["seconds"]) == 100
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-3)
    assert sum(theirs["losses"][-10:]) < 0.9 * sum(theirs["losses"][:10])
    assert ours["perplexity"][1] < ours["perplexity"][0]


def test_plot(transformer_lm, tmp_path):
    pytest.importorskip("matplotlib")
    assert transformer_lm.main([*SMALL, "--steps", "4", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "transformer_lm_attention.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("layer", ["attention", "encoder"])
def test_no_character_sees_later_ones(transformer_lm, layer):
    options = transformer_lm.parse([*SMALL, "--layer", layer])
    for layer_class in transformer_lm.LAYERS[layer]:
        model = transformer_lm.build(options, layer_class).double()
        tokens = torch.randint(50, (2, 12))
        changed = tokens.clone()
        changed[:, 8:] += 1
        before, after = model(tokens)[0], model(changed)[0]
        torch.testing.assert_close(before[:, :8], after[:, :8])
        assert not before[:, 8:].allclose(after[:, 8:])


class WithoutMask(fusednn.MultiheadAttention):
    """Lets every character see those it should predict."""

    def forward(self, query, key, value, **options):
        return super().forward(query, key, value, need_weights=False)


def test_a_wrong_layer_fails(transformer_lm, no_plot, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(transformer_lm.char_lm, "generate", lambda *_: "")
    layers = {"attention": (nn.MultiheadAttention, WithoutMask)}
    assert transformer_lm.main([*SMALL, "--steps", "4", "--out", str(tmp_path)], layers) == 1
    assert "the losses differ: at step" in capsys.readouterr().err
