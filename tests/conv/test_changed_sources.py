"""Folded norms are those of the sources of this moment: every way to change one (pytorch#108863)."""

import copy

import pytest
import torch
from torch import nn

import fusednn
from fusednn.conv import shortcut
from fusednn.core import native as _native

SOURCES = [f"{c}.{n}" for c in ("depthwise", "pointwise") for n in ("weight", "bias")] + [
    f"norm{i}.{n}" for i in (1, 2) for n in ("weight", "bias", "running_mean", "running_var")
]
X = torch.randn(2, 6, 7, 7)


def assert_current(block: nn.Module) -> None:
    """Check a block against its children on their tensors of this moment."""
    expected = X
    for child in block.children():
        expected = child(expected)
    with torch.no_grad():
        torch.testing.assert_close(block(X), expected.detach(), rtol=1e-4, atol=1e-4)


@pytest.fixture(params=["shortcut", "general"])
def way(request, monkeypatch) -> str:
    """Fold where the extension's shortcut does, or where the general way does."""
    if request.param == "general":
        monkeypatch.setattr(shortcut, "applies", lambda input: False)
    elif _native.extension is None:
        pytest.skip("the shortcut is the extension's: tests/test_native.py demands one")
    return request.param


@pytest.fixture
def block(way):
    made = fusednn.DepthwiseSeparableConv2d(6, 40, 3, padding=1, bias=True).eval()
    for _ in range(3):  # whatever is kept of the sources is kept now
        assert_current(made)
    return made


def tensor(block, name):
    return (
        block.get_submodule(name.split(".")[0]).get_parameter(name.split(".")[1])
        if not name.split(".")[1].startswith("running")
        else block.get_buffer(name)
    )


def in_place(block, name):
    with torch.no_grad():
        tensor(block, name).mul_(1.5).add_(0.25)


def one_element(block, name):
    with torch.no_grad():
        tensor(block, name).view(-1)[3] += 2


def through_data(block, name):
    tensor(block, name).data.mul_(1.5).add_(0.25)


def through_numpy(block, name):
    tensor(block, name).detach().numpy()[:] += 0.5


def new_data(block, name):
    tensor(block, name).data = tensor(block, name).data * 1.5 + 0.25


def new_tensor(block, name):
    module, attribute = name.split(".")
    value = tensor(block, name).detach() * 1.5 + 0.25
    is_buffer = attribute.startswith("running")
    setattr(block.get_submodule(module), attribute, value if is_buffer else nn.Parameter(value))


def loaded(block, name):
    state = block.state_dict()
    block.load_state_dict({**state, name: state[name] * 1.5 + 0.25})


def assigned(block, name):
    state = block.state_dict()
    block.load_state_dict({**state, name: state[name] * 1.5 + 0.25}, assign=True)


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize(
    "change",
    [in_place, one_element, through_data, through_numpy, new_data, new_tensor, loaded, assigned],
    ids=lambda f: f.__name__,
)
def test_a_changed_source(block, change, name):
    with torch.no_grad():
        before = block(X)
    change(block, name)
    assert_current(block)
    with torch.no_grad():
        assert not torch.allclose(block(X), before), "the change changed nothing: no proof"


def test_training_between_inferences(block):
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    for _ in range(3):
        block.train()
        block(3 * X + 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_current(block.eval())


def test_training_a_child_alone(block):
    """Whoever sets a child's mode goes past the block's own train()."""
    block.norm1.train()
    with torch.no_grad():
        block(5 * X + 2)
    block.norm1.eval()
    assert_current(block)


def test_another_eps(block):
    block.norm1.eps = 0.5
    assert_current(block)


def test_another_dtype(block):
    with torch.no_grad():
        for dtype in (torch.float64, torch.float32):
            out = block.to(dtype)(X.to(dtype))
            assert out.dtype == dtype
    assert_current(block)


def test_swapped_children(block):
    block.norm1 = nn.BatchNorm2d(6, eps=1.0).eval()
    assert_current(block)
    block.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
    assert_current(block)


def test_inference_mode(block):
    with torch.inference_mode():
        block(X)
    assert_current(block)
    in_place(block, "norm1.weight")
    with torch.inference_mode():
        torch.testing.assert_close(block(X), copy.deepcopy(block)(X))
    assert_current(block)


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        made = fusednn.DepthwiseSeparableConv2d(6, 40, 3, padding=1).eval()
        for _ in range(2):
            made(X)
            made.norm1.weight.mul_(2)
        expected = X
        for child in made.children():
            expected = child(expected)
        torch.testing.assert_close(made(X), expected, rtol=1e-4, atol=1e-4)
