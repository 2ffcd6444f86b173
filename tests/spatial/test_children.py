"""Children whose weights a layer reads: where a call of one does more than its weights say, it is called."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fusednn

X, H = torch.randn(2, 4, 3, 5, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
FRAMES = torch.randn(2, 3, 4, 3, 5, dtype=torch.float64)


class Adapted(nn.Module):
    """A layer with a low-rank addition, as adapters wrap one."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.extra = nn.Linear(base.in_features, base.out_features, bias=False, dtype=torch.float64)

    def forward(self, x):
        return self.base(x) + self.extra(x)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def wrapped(module, name):
    setattr(module, name, Adapted(getattr(module, name)))


def of_another_class(module, name):
    old = getattr(module, name)
    new = Doubled(old.in_features, old.out_features, old.bias is not None, dtype=torch.float64)
    new.load_state_dict(old.state_dict())
    setattr(module, name, new)


def pruned(module, name):
    prune.l1_unstructured(getattr(module, name), "weight", amount=0.5)


def weight_normed(module, name):
    nn.utils.parametrizations.weight_norm(getattr(module, name))
    with torch.no_grad():
        getattr(module, name).parametrizations.weight.original0.mul_(3)


def hooked(module, name):
    getattr(module, name).register_forward_hook(lambda _module, _args, out: out * 3)


CHANGES = [wrapped, of_another_class, pruned, weight_normed, hooked]
every_change = pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)


def spatial(layer, features, hidden):
    """The layer by its children, called."""
    scores = layer.score(features)
    if layer.v is None:
        scores = scores + layer.hidden(hidden).view_as(scores)
    else:
        energies = (scores + layer.hidden(hidden)[:, :, None, None]).tanh()
        scores = layer.v(energies.movedim(1, -1)).movedim(-1, 1)
    map = scores.flatten(2).softmax(-1).view_as(scores)
    return map * features, map


def recurrence(layer, frames, state):
    """The layer by its children, called."""
    hidden, maps = [], []
    for frame in frames.unbind(1):
        attended, map = spatial(layer.attention, frame, state[0])
        state = layer.cell(attended.flatten(1), state)
        hidden.append(state[0])
        maps.append(map)
    return torch.stack(hidden, 1), torch.stack(maps, 1), state


def step(layer, loss):
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@every_change
@pytest.mark.parametrize(
    ("score", "child"), [("positional", "hidden"), ("additive", "hidden"), ("additive", "v")]
)
def test_spatial_attention(change, score, child):
    layer = fusednn.SpatialAttention(4, 6, 3, 5, score=score, dtype=torch.float64)
    before = layer(X, H)[1]
    change(layer, child)
    for _ in range(3):
        found, expected = layer(X, H), spatial(layer, X, H)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs)
        step(layer, found[0].square().sum())
    assert not torch.allclose(before, found[1]), "the change changed nothing: no proof"
    assert fusednn.explain(layer, X, H)[0].backend == "composite"


@pytest.mark.parametrize("output", ["scale", "flatten", "sum", "coordinates"])
@pytest.mark.parametrize("score", ["positional", "additive"])
def test_composite_agrees_with_the_kernels(score, output):
    """With a hook that does nothing; masked positions hold NaN."""
    layer = fusednn.SpatialAttention(4, 6, 3, 5, score=score, output=output, glimpses=2, dtype=torch.float64)
    mask = torch.rand(2, 1, 3, 5) > 0.3
    x = X.masked_fill(~mask, torch.nan)
    expected = layer(x, H, mask), layer(X)
    layer.hidden.register_forward_hook(lambda *_: None)
    for mine, theirs in zip((layer(x, H, mask), layer(X)), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@every_change
def test_attention_lstm(change):
    layer = fusednn.AttentionLSTM(4, 3, 5, 6, dtype=torch.float64)
    state = H, -H
    change(layer.attention, "hidden")
    for _ in range(3):
        found, expected = layer(FRAMES, state), recurrence(layer, FRAMES, state)
        torch.testing.assert_close(found, expected)
        step(layer, found[0].square().sum())


def test_attention_lstm_with_another_cell():
    class Cell(fusednn.LSTMCell):
        def forward(self, x, hx):
            h, c = super().forward(x, hx)
            return h, c / 2

    layer = fusednn.AttentionLSTM(4, 3, 5, 6, dtype=torch.float64)
    layer.cell = Cell(60, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(FRAMES, (H, H)), recurrence(layer, FRAMES, (H, H)))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("output", ["flatten", "sum"])
def test_composite_recurrence_agrees_with_the_kernels(cell, output):
    """With lengths, and NaN in frames that have ended."""
    layer = fusednn.AttentionLSTM(4, 3, 5, 6, cell=cell, output=output, dtype=torch.float64)
    frames = FRAMES.clone()
    frames[1, 2] = torch.nan
    expected = layer(frames, lengths=[3, 2])
    layer.cell.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(layer(frames, lengths=[3, 2]), expected)
    grads = torch.autograd.grad(layer(frames, lengths=[3, 2])[0].sum(), layer.parameters())
    assert all(g.isfinite().all() for g in grads)
