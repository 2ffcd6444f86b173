"""DrivingNet: shapes, streams, and the same training as a network of torch's layers."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import fusednn
from fusednn.models import DrivingNet
from fusednn.models.layers import ConvNormReLU

from .cases import torch_recur

SMALL = (32, 16)


class TorchDrivingNet(nn.Module):
    """The same by torch.nn: the time loop written out."""

    def __init__(self, net: DrivingNet) -> None:
        super().__init__()
        copied = copy.deepcopy(net)
        self.encoder, self.recurrence, self.control = copied.encoder, copied.attention_lstm, copied.control
        self.encoder = nn.Sequential(
            *(nn.Sequential(*(c for c in block.children() if c is not None)) for block in self.encoder)
        )

    def forward(self, frames: Tensor) -> Tensor:
        """Return the control [B, T, 1] from a state of zeros."""
        b, t = frames.shape[:2]
        features = self.encoder(frames.flatten(0, 1)).unflatten(0, (b, t))
        zeros = frames.new_zeros(b, self.recurrence.hidden_size)
        state, controls = (zeros, zeros), []
        for f in features.unbind(1):
            before = state[0]
            state, a = torch_recur(self.recurrence, f, state)
            controls.append(self.control(torch.cat(((f * a).flatten(1), before), 1)))
        return torch.stack(controls, 1)


@pytest.mark.parametrize("encoder", ["plain", "separable"])
def test_internal_shapes(encoder):
    net, seen = DrivingNet(encoder=encoder), []
    for layer in net.encoder:
        layer.register_forward_hook(lambda _m, _i, out: seen.append(tuple(out.shape)))
    control, (h, c), maps = net(torch.randn(1, 2, 3, 160, 80), return_attention=True)
    assert seen == [(2, 24, 80, 40), (2, 36, 40, 20), (2, 48, 20, 10), (2, 64, 20, 10), (2, 64, 20, 10)]
    assert control.shape == (1, 2, 1)
    assert h.shape == c.shape == (1, 128)
    assert maps.shape == (1, 2, 1, 20, 10)
    torch.testing.assert_close(maps.sum((3, 4)), torch.ones(1, 2, 1))
    assert net.attention_lstm.cell.weight_ih.shape == (512, 64 * 200)
    assert net.control.in_features == 64 * 200 + 128
    assert len(net(torch.randn(1, 1, 3, 160, 80))) == 2


@pytest.mark.parametrize("encoder", ["plain", "separable"])
def test_streaming_is_the_sequence(recurrence_place, encoder):
    net = DrivingNet(16, encoder, image_size=SMALL, dtype=torch.float64).to(recurrence_place.device)
    frames = torch.randn(2, 5, 3, *SMALL, dtype=torch.float64, device=recurrence_place.device)
    with torch.no_grad():
        net(frames)  # running statistics that are not the initial ones
        net.eval()
        control, last, maps = net(frames, return_attention=True)
        state, found = None, []
        for t in range(5):
            u, state, a = net(frames[:, t : t + 1], state, return_attention=True)
            torch.testing.assert_close(a[:, 0], maps[:, t], rtol=1e-11, atol=1e-12)
            found.append(u)
    torch.testing.assert_close(torch.cat(found, 1), control, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-11, atol=1e-12)


def test_the_control_looks_at_the_state_before(recurrence_place):
    """u_t = Linear([attended_t, h_{t-1}]): the first frame's control from a state given is that state's."""
    net = DrivingNet(8, image_size=SMALL, dtype=torch.float64).to(recurrence_place.device).eval()
    frames = torch.randn(1, 1, 3, *SMALL, dtype=torch.float64, device=recurrence_place.device)
    h, c = (torch.randn(1, 8, dtype=torch.float64, device=recurrence_place.device) for _ in range(2))
    with torch.no_grad():
        u, _, maps = net(frames, (h, c), return_attention=True)
        attended = net.encoder(frames[:, 0]) * maps[:, 0]
        torch.testing.assert_close(u[:, 0], net.control(torch.cat((attended.flatten(1), h), 1)))


@pytest.mark.natively
@pytest.mark.parametrize("encoder", ["plain", "separable"])
def test_loss_curves_agree(recurrence_place, encoder):
    """Steps of SGD with torch's layers and fusednn's: 100 in float64; 20 in float32, in the mean over seeds.

    Where rounding puts an activation on the other side of 0, curves of float32 part later: a matter of luck.
    """
    slow = recurrence_place.slow
    exact = loss_curves(recurrence_place, encoder, 0, 5 if slow else 100, torch.float64)
    assert exact[0] == pytest.approx(exact[1], rel=1e-6)
    if not slow:
        assert sum(exact[0][-10:]) < 0.5 * sum(exact[0][:10]), "it did not learn"
    seeds = range(1 if slow else 4)
    pairs = torch.tensor([loss_curves(recurrence_place, encoder, s, 5 if slow else 20) for s in seeds])
    apart = (pairs[:, 0] - pairs[:, 1]).abs() / pairs[:, 1].abs()
    assert apart.mean(0).max() <= 1e-3


def loss_curves(
    place, encoder: str, seed: int, steps: int, dtype: torch.dtype = torch.float32
) -> list[list[float]]:
    """Return the losses of fusednn's layers and of torch's."""
    torch.manual_seed(seed)
    ours = DrivingNet(8, encoder, image_size=SMALL, dtype=dtype).to(place.device)
    theirs = TorchDrivingNet(ours)
    generator = torch.Generator().manual_seed(seed + 1)
    frames = torch.randn(8, 3, 3, *SMALL, generator=generator).to(place.device, dtype)
    # A bright column whose place is the target: something to attend to.
    column = torch.randint(0, SMALL[1], (8, 3), generator=generator).to(place.device)
    frames += 4 * nn.functional.one_hot(column, SMALL[1])[:, :, None, None, :]
    target = column[..., None] / SMALL[1] - 0.5
    curves = []
    for model in (ours, theirs):
        # Not Adam: dividing by tiny second moments, it makes rounding differences grow.
        optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
        chosen = torch.Generator().manual_seed(seed + 3)
        losses = []
        for _ in range(steps):
            rows = torch.randperm(8, generator=chosen)[:4]
            optimizer.zero_grad()
            out = model(frames[rows])
            loss = ((out[0] if model is ours else out) - target[rows]).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    return curves


def test_errors_and_copies():
    with pytest.raises(ValueError, match="encoder: got 'other'"):
        DrivingNet(encoder="other")
    net = DrivingNet(4, image_size=SMALL).eval()
    with pytest.raises(RuntimeError, match="frames has size"):
        net(torch.zeros(1, 1, 3, 16, 32))
    with pytest.raises(RuntimeError, match="Expected frames to be 5D"):
        net(torch.zeros(1, 3, *SMALL))
    frames = torch.randn(1, 2, 3, *SMALL)
    with torch.no_grad():
        copied = pickle.loads(pickle.dumps(net))
        torch.testing.assert_close(copied(frames)[0], net(frames)[0])


def one_by_one(layer, x):
    """A layer of the encoder by torch's functions."""
    norm = layer.norm
    y = nn.functional.conv2d(x, layer.conv.weight, None, layer.conv.stride, layer.conv.padding)
    statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    return nn.functional.batch_norm(y, *statistics, eps=norm.eps).relu()


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = ConvNormReLU(3, 5, 3, 2, dtype=torch.float64)
    layer(torch.randn(4, 3, 9, 8, dtype=torch.float64))  # statistics that are not the initial ones
    return layer.eval()


def forms(layer, x):
    return [e.backend for e in fusednn.explain(layer, x)]


def test_folded_for_inference(layer):
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), one_by_one(layer, x))
        assert forms(layer, x) == ["folded"]
        nan = x.clone()
        nan[0, 0, 0, 0] = float("nan")
        torch.testing.assert_close(layer(nan), one_by_one(layer, nan), equal_nan=True)
    assert forms(layer, x) == ["torch"]  # a gradient is wanted
    layer(x).sum().backward()
    assert layer.norm.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("change", ["step", "statistics", "data", "load", "train"])
def test_folds_are_never_stale(layer, change):
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        before = layer(x)
        if change == "step":
            layer.conv.weight.add_(0.1)
        elif change == "statistics":
            layer.norm.running_var.mul_(2)
        elif change == "data":
            layer.conv.weight.data.mul_(2)
        elif change == "load":
            layer.load_state_dict({k: v * 2 for k, v in layer.state_dict().items()})
        else:
            layer.train()(5 * x)
            layer.eval()
        assert not layer(x).equal(before)
        torch.testing.assert_close(layer(x), one_by_one(layer, x))


def test_children_are_called_where_they_must_be(layer):
    x, seen = torch.randn(2, 3, 9, 8, dtype=torch.float64), []
    with torch.no_grad():
        expected = layer(x)
        handle = layer.norm.register_forward_hook(lambda *_: seen.append(1))
        torch.testing.assert_close(layer(x), expected)
        assert seen == [1]
        assert forms(layer, x) == ["torch"]
        handle.remove()
        assert forms(layer, x) == ["folded"]
        layer.activation = nn.SiLU()
        torch.testing.assert_close(layer(x), nn.functional.silu(layer.norm(layer.conv(x))))
    with pytest.raises(RuntimeError, match="to have 3 channels"):
        layer(torch.randn(1, 4, 9, 8, dtype=torch.float64))
