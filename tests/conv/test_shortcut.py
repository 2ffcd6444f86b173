"""The block's shortcut past the dispatcher: the same bits as the general way, and when it stands aside."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fusednn
from fusednn.conv import shortcut
from fusednn.core import native as _native

from .test_block import Block, every_block, images, pair, step

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
TAKEN = ("try_separable_training", "try_separable_inference")

pytestmark = pytest.mark.skipif(
    _native.extension is None, reason="the shortcut is the extension's: tests/test_native.py demands one"
)


@pytest.fixture
def taken(monkeypatch) -> list[str]:
    """Return the names of the shortcut's calls that gave a result, in order."""
    calls: list[str] = []

    def watched(name):
        function = getattr(_native.extension.cpu, name)

        def call(*args):
            result = function(*args)
            if result is not None:
                calls.append(name)
            return result

        return call

    for name in TAKEN:
        monkeypatch.setattr(_native.extension.cpu, name, watched(name))
    return calls


def general_way(monkeypatch) -> None:
    monkeypatch.setattr(shortcut, "applies", lambda input: False)


def assert_same_bits(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert tensor.stride() == theirs[name].stride(), name
        assert torch.equal(tensor, theirs[name]), name


@every_block
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_has_the_general_ways_bits(monkeypatch, taken, case, dtype):
    block, _ = pair(case, dtype=dtype)
    general = copy.deepcopy(block)
    x = images(case, dtype=dtype).contiguous(memory_format=torch.channels_last)
    found = [step(block, x) for _ in range(2)]
    plain = block.depthwise.padding_mode == "zeros" and dtype != torch.bfloat16
    assert taken == (["try_separable_training"] * 2 if plain or block.norm1 is block.norm2 is None else [])
    general_way(monkeypatch)
    for ours in found:
        assert_same_bits(ours, step(general, x))


@every_block
def test_inference_has_the_general_ways_bits(monkeypatch, taken, case):
    block, _ = pair(case)
    x = images(case)
    with torch.no_grad():
        ours = block.eval()(x)
        assert taken == (["try_separable_inference"] if block.depthwise.padding_mode == "zeros" else [])
        general_way(monkeypatch)
        assert torch.equal(ours, block(x))


@pytest.mark.parametrize(
    "change",
    [
        {"momentum": None},
        {"momentum": 0.0},
        {"momentum": 1.0},
        {"affine": False},
        {"track_running_stats": False},
    ],
    ids=str,
)
def test_norms_have_the_general_ways_bits(monkeypatch, taken, change):
    block = Block(6, 8, 3, padding=1, norm=lambda c, **k: nn.BatchNorm2d(c, **change, **k))
    general, x = copy.deepcopy(block), torch.randn(2, 6, 5, 5)
    found = [step(block, x) for _ in range(3)]
    assert len(taken) == 3
    general_way(monkeypatch)
    for ours in found:
        assert_same_bits(ours, step(general, x))


def test_training_that_nobody_records(taken):
    block, composite = pair("mobilenet")
    x = images("mobilenet")
    with torch.no_grad():
        torch.testing.assert_close(block(x), composite(x))
    assert taken == ["try_separable_training"]
    torch.testing.assert_close(block.norm2.running_var, composite.norm2.running_var)
    assert block.norm2.num_batches_tracked == 1


def test_running_statistics_are_seen_to_change():
    block, _ = pair("mobilenet")
    before = [b._version for b in block.buffers()]
    block(images("mobilenet"))
    assert [b._version for b in block.buffers()] == [v + 1 for v in before]


def _hook(block):
    block.norm1.register_forward_hook(lambda *_: None)


def _assigned_forward(block):
    block.pointwise.forward = block.pointwise.forward


def _wider_buffer(block):
    block.norm1.running_mean = block.norm1.running_mean.double()


def _strange_child(block):
    block.norm2 = nn.GroupNorm(1, 33)


@pytest.mark.parametrize("change", [_hook, _assigned_forward, _wider_buffer, _strange_child])
def test_stands_aside_for_children(taken, change):
    block, _ = pair("mobilenet")
    x = images("mobilenet")
    block(x)
    assert len(taken) == 1
    change(block)
    try:
        block(x)
    except RuntimeError:  # torch's own norm has an error for it
        assert change is _wider_buffer
    assert len(taken) == 1


def test_follows_the_childrens_settings():
    block, composite = pair("mobilenet")
    x = images("mobilenet")
    block(x), composite(x)
    for conv in (block.depthwise, composite.depthwise):
        conv.stride, conv.padding = (2, 1), (0, 2)
    torch.testing.assert_close(block(x), composite(x))


@pytest.mark.parametrize("context", [lambda: torch.autocast("cpu"), torch.autograd.profiler.profile])
def test_stands_aside_for_listeners(taken, context):
    block, _ = pair("mobilenet")
    with context():
        block(images("mobilenet"))
    assert not taken


def test_errors_are_the_general_ways():
    block, composite = pair("mobilenet")
    for x in (torch.randn(2, 12, 5, 5), torch.randn(2, 13, 5), torch.randn(2, 13, 0, 5)):
        with pytest.raises(RuntimeError):
            composite(x)
        with pytest.raises(RuntimeError):
            block(x)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        Block(4, 4, 3)(torch.randn(1, 4, 3, 3))
    assert all(int(n.num_batches_tracked) == 0 for n in (block.norm1, block.norm2))


def test_second_derivatives(taken):
    block, composite = pair("mobilenet", dtype=torch.float64)
    x, found = images("mobilenet", dtype=torch.float64, batch=2).requires_grad_(), []
    for module in (block, composite):
        (grad,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), [x, *module.parameters()]))
    assert taken
    torch.testing.assert_close(*found)


def test_mapped_cotangents(taken):
    found = []
    block, composite = pair("linear bottleneck", dtype=torch.float64)
    x = images("linear bottleneck", dtype=torch.float64, batch=2).requires_grad_()
    cotangents = torch.randn(3, 2, 31, 9, 8, dtype=torch.float64)
    for module in (block, lambda x: composite(x)):
        found.append(torch.autograd.grad(module(x), x, cotangents, is_grads_batched=True))
    assert taken
    torch.testing.assert_close(*found)


def test_partial_gradients(taken):
    block, composite = pair("linear bottleneck", dtype=torch.float64)
    x = images("linear bottleneck", dtype=torch.float64)
    for module in (block, composite):
        module.depthwise.weight.requires_grad_(False)
        module.norm2.bias.requires_grad_(False)
        module(x).square().sum().backward()
    assert taken
    for ours, theirs in zip(block.parameters(), composite.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_weight_that_was_written_to_is_refused():
    block, _ = pair("mobilenet")
    out = block(images("mobilenet"))
    with torch.no_grad():
        block.pointwise.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_saved_tensor_hooks_and_checkpoints(taken):
    block, _ = pair("mobilenet")
    x = images("mobilenet").requires_grad_()
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
        expected = torch.autograd.grad(block(x).square().sum(), x)
    assert x.shape in packed
    assert len(taken) == 1
    for module in (block, block.eval()):  # in training on the shortcut, with frozen norms on the general way
        plain = torch.autograd.grad(module(x).square().sum(), x)
        again = torch.autograd.grad(checkpoint(module, x, use_reentrant=False).square().sum(), x)
        assert torch.equal(plain[0], again[0])
    assert expected[0].shape == x.shape


def test_copies_and_files_go_their_own_way(tmp_path):
    block, _ = pair("mobilenet")
    x = images("mobilenet")
    block(x)
    twin = copy.deepcopy(block)
    torch.save(block, tmp_path / "block.pt")
    loaded = torch.load(tmp_path / "block.pt", weights_only=False)
    assert torch.equal(twin(x), loaded(x))


def test_explain_still_sees_the_block():
    block, _ = pair("mobilenet")
    assert "separable_conv2d_train_forward: cpu" in str(fusednn.explain(block, images("mobilenet")))
