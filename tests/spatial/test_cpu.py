"""What only the CPU kernels have: blocks of positions, threads, and the layer's way past the dispatcher."""

import itertools

import pytest
import torch

import fusednn
from fusednn.core import dispatch
from fusednn.core import native as _native
from fusednn.spatial import shortcut

from .cases import OUTPUTS, SCORES, check_on_average, fused_step, make, run

pytestmark = pytest.mark.skipif(
    not hasattr(getattr(_native.extension, "cpu", None), "try_spatial_attention"),
    reason="this build has no CPU kernels of spatial attention",
)

# One sample and three, each of more than one block of positions, the last one ragged.
LARGE = [(1, 70, 50, 43), (3, 300, 23, 21)]


@pytest.fixture(autouse=True)
def cpu_backend():
    with fusednn.use_backend("cpu"):
        yield


@pytest.fixture
def threads():
    """Give back the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.costly
@pytest.mark.in_turn
@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])
def test_samples_of_several_blocks(shape, score, output, last):
    check_on_average(make(shape, score, output, masked=last, last=last))


@pytest.mark.parametrize("shape", [*LARGE, (37, 5, 40, 9)], ids=str)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("output", ["scale", "sum"])
@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])
def test_same_bits_on_any_number_of_threads(threads, shape, score, output, last):
    """One task per sample, or one per block: the same sums in the same order."""
    work = make(shape, score, output, glimpses=2, last=last)
    found = []
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        found.append(run(fused_step, work))
    for name, t in found[0].items():
        assert all(t.equal(other[name]) for other in found[1:]), name


def layer(**options):
    torch.manual_seed(3)
    options = {"temperature": 0.6, "dtype": torch.float64, **options}
    module = fusednn.SpatialAttention(5, 8, 4, 3, **options)
    dtype = options["dtype"]
    x, h = torch.randn(2, 5, 4, 3, dtype=dtype), torch.randn(2, 8, dtype=dtype)
    return module, x.requires_grad_(), h.requires_grad_()


def both_ways(module, x, h, monkeypatch):
    """Results and gradients past the dispatcher and through it."""
    found = []
    for way in ("shortcut", "general"):
        if way == "general":
            monkeypatch.setattr(shortcut, "applies", lambda features: False)
        else:
            assert shortcut.attend(module, x, h) is not None
        out, a = module(x, h)
        grads = torch.autograd.grad(
            (out, a), (x, h, *module.parameters()), (out.detach().cos(), a.detach().sin())
        )
        found.append((out, a, *grads))
    return found


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("glimpses", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_shortcut_is_the_general_way(output, glimpses, dtype, monkeypatch):
    module, x, h = layer(output=output, glimpses=glimpses, dtype=dtype)
    short, general = both_ways(module, x, h, monkeypatch)
    for a, b in zip(short, general, strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("frozen", list(itertools.combinations(range(5), 2)), ids=str)
def test_shortcut_with_frozen_arguments(frozen, monkeypatch):
    module, x, h = layer()
    tensors = [x, h, *module.parameters()]
    whole = torch.autograd.grad(module(x, h)[0].square().sum(), tensors)
    for i in frozen:
        tensors[i].requires_grad_(False)
    assert shortcut.attend(module, x, h) is not None
    left = [i for i in range(5) if i not in frozen]
    found = torch.autograd.grad(module(x, h)[0].square().sum(), [tensors[i] for i in left])
    for i, g in zip(left, found, strict=True):
        torch.testing.assert_close(g, whole[i])


def test_shortcut_has_second_derivatives():
    module, x, h = layer(output="sum")
    parameters = tuple(module.parameters())
    assert shortcut.attend(module, x, h) is not None

    def call(*tensors):
        return module(*tensors[:2])

    torch.autograd.gradcheck(call, (x, h, *parameters))
    torch.autograd.gradgradcheck(call, (x, h, *parameters))


def test_calls_that_are_not_plain():
    """A mask, no state, other scores, a learned temperature, images of another size: the general way."""
    module, x, h = layer()
    attend = shortcut.attend
    assert attend(module, x, None) is None
    assert attend(module, x.transpose(2, 3), h) is None
    assert attend(module, x.float(), h) is None
    assert attend(module, x[:1], h) is None
    assert attend(layer(score="additive")[0], x, h) is None
    assert attend(layer(learn_temperature=True)[0], x, h) is None
    with pytest.raises(RuntimeError, match="hidden"):
        module(x[:1], h)
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(module, x, h) is None
    with fusednn.use_backend("reference"):
        assert not shortcut.applies(x)
    assert [e.backend for e in dispatch.explain(module, x, h)] == ["cpu"]
