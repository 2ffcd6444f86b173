"""The driving example: its road, its twin of torch.nn's layers, its files, and that it learns a little."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[2] / "examples" / "driving.py"
SMALL = [
    "--steps",
    "4",
    "--compare",
    "2",
    "--batch",
    "2",
    "--seq",
    "3",
    "--hidden",
    "8",
    "--test-batches",
    "1",
]
SMALL += ["--image-size", "32", "16"]


@pytest.fixture(scope="module")
def driving():
    spec = importlib.util.spec_from_file_location("driving", PATH)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look it up there
    spec.loader.exec_module(module)
    return module


def test_the_road_is_seeded_and_bends(driving):
    options = driving.parse(SMALL)
    first, again, other = (next(driving.drives(options, 2, seed)) for seed in (1, 1, 2))
    assert first[0].shape == (2, 3, 3, 32, 16)
    assert first[1].abs().max() <= 1
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    assert not first[0].equal(other[0])
    pictures = []
    for bend in (-1.0, 1.0):
        generator = torch.Generator().manual_seed(5)
        pictures.append(driving.render(torch.full((1, 1), bend), (64, 32), generator)[0, 0])
    assert pictures[0][:, 20:30].allclose(pictures[1][:, 20:30]) is False
    assert pictures[0][:, :15].allclose(pictures[1][:, :15]), "the sky does not depend on the road"


def test_both_networks_compute_the_same(driving):
    net = driving.DrivingNet(8, image_size=(32, 16)).double()
    twin = driving.TorchDrivingNet(8, image_size=(32, 16)).double()
    twin.load_state_dict(net.state_dict())
    frames = torch.randn(2, 3, 3, 32, 16, dtype=torch.float64)
    torch.testing.assert_close(net(frames, None, True), twin(frames, None, True))


def test_runs_saves_and_goes_on(driving, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(driving, "plot", lambda *_: None)
    assert driving.main([*SMALL, "--out", str(tmp_path), "--target=-1e9"]) == 0
    printed = capsys.readouterr().out
    assert "torch.nn:" in printed
    assert "test R²" in printed
    state = torch.load(tmp_path / "driving.pt", weights_only=True)
    assert len(state["losses"]) == 4
    arguments = [*SMALL, "--out", str(tmp_path), "--resume", str(tmp_path / "driving.pt")]
    assert driving.main([*arguments, "--target", "2"]) == 1, "an R² below the target must not pass"
    assert len(torch.load(tmp_path / "driving.pt", weights_only=True)["losses"]) == 8


def test_plot(driving, tmp_path):
    pytest.importorskip("matplotlib")
    assert driving.main([*SMALL, "--out", str(tmp_path), "--target=-1e9"]) == 0
    assert (tmp_path / "driving.png").read_bytes().startswith(b"\x89PNG")


def test_it_learns(driving):
    """A few dozen steps on small images: the loss falls well below that of a constant."""
    options = driving.parse([*SMALL, "--steps", "60", "--compare", "0", "--batch", "8", "--lr", "3e-3"])
    _, ours = driving.train(options)
    assert sum(ours.losses[-10:]) < 0.5 * sum(ours.losses[:10])


def test_without_tqdm_and_matplotlib(driving, tmp_path, capsys, monkeypatch):
    for name in ("tqdm", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    assert driving.main([*SMALL, "--out", str(tmp_path), "--target=-1e9"]) == 0
    printed = capsys.readouterr().out
    assert "step 3 of 4" in printed
    assert "pip install matplotlib" in printed
