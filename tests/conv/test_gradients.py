"""Whether the backwards are derivatives, to the second order, and which are asked for."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import fusednn
from fusednn.functional import depthwise_conv1d, depthwise_conv2d, depthwise_separable_conv2d

from .cases import ACTIVATIONS, ARGUMENTS, Composite, fused_step, make, run

CHECKED = (
    "depthwise_conv2d",
    "separable_conv2d",
    "separable_conv2d_train",
)  # what the tests here differentiate


def leaf(*size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(size))
    return torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()


def depthwise_leaves(bias: bool = True):
    return leaf(1, 2, 4, 3), leaf(4, 1, 3, 2), leaf(4) if bias else None


def interpreted(place) -> bool:
    """Whether a call takes a second: gradients are then checked along one random direction."""
    return place.name == "triton-interpreted"


@pytest.mark.natively
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize(
    "options", [{"padding": 1}, {"stride": 2, "dilation": (1, 2), "padding": (1, 3)}], ids=str
)
def test_gradcheck(place, activation, options):
    leaves, fast = depthwise_leaves(), interpreted(place)
    assert gradcheck(
        lambda *t: depthwise_conv2d(*t, activation=activation, **options), leaves, fast_mode=fast
    )


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_gradgradcheck(reference_place, activation):
    options = {"padding": "same", "activation": activation}
    leaves = depthwise_leaves(activation != "silu")
    assert gradgradcheck(lambda *t: depthwise_conv2d(*t, **options), leaves)


@pytest.mark.natively
def test_of_a_sequence(place):
    leaves = leaf(2, 2, 5), leaf(2, 1, 3), leaf(2)
    for options in ({"causal": True, "dilation": 2}, {"padding": 1, "stride": 2}):
        function = lambda *t, o=options: depthwise_conv1d(*t, activation="silu", **o)  # noqa: E731
        assert gradcheck(function, leaves, fast_mode=interpreted(place))


every_pair_of_activations = pytest.mark.parametrize("acts", [("relu6", None), ("silu", "gelu")], ids=str)


def block_without_norms(acts):
    leaves = leaf(1, 2, 4, 3), leaf(2, 1, 3, 3), leaf(3, 2, 1, 1), leaf(2), leaf(3)
    options = {"padding": 1, "depthwise_activation": acts[0], "pointwise_activation": acts[1]}
    residual = leaf(1, 3, 4, 3)

    def function(*t):
        return depthwise_separable_conv2d(*t[:5], residual=t[5], **options)

    return function, (*leaves, residual)


@pytest.mark.natively
@every_pair_of_activations
def test_of_a_block_without_norms(training_place, acts):
    assert gradcheck(*block_without_norms(acts))


@every_pair_of_activations
def test_twice_of_a_block_without_norms(reference_place, acts):
    assert gradgradcheck(*block_without_norms(acts))


@pytest.mark.parametrize("infinite", ["depthwise", "pointwise"])
def test_infinite_products_without_norms(infinite):
    """ReLU6 bounds an infinite product, whose gradient is 0: a norm that isn't there makes no NaN of it."""
    scale1, scale2 = (1e10, 1.0) if infinite == "depthwise" else (1.0, 1e10)
    acts = ("relu6", None) if infinite == "depthwise" else (None, "relu6")
    tensors = (
        torch.full((1, 2, 3, 4), 1e30),
        torch.full((2, 1, 1, 1), scale1),
        torch.full((3, 2, 1, 1), scale2),
    )
    found, expected = [], []
    for grads, activations in ((found, acts), (expected, None)):
        x, w1, w2 = (t.clone().requires_grad_() for t in tensors)
        if activations is None:
            relu6, conv2d = torch.nn.functional.relu6, torch.nn.functional.conv2d
            middle = conv2d(x, w1, groups=2)
            out = conv2d(relu6(middle) if acts[0] else middle, w2)
            out = relu6(out) if acts[1] else out
        else:
            out = depthwise_separable_conv2d(
                x, w1, w2, depthwise_activation=acts[0], pointwise_activation=acts[1]
            )
        grads += [out, *torch.autograd.grad(out.sum(), (x, w1, w2))]
    for got, wanted in zip(found, expected, strict=True):
        assert torch.equal(got, wanted)


def test_of_a_block_traced_for_inference(reference_place):
    """The inference op has a gradient too, should a graph that holds it be differentiated."""
    leaves = leaf(1, 2, 4, 3), leaf(2, 1, 3, 3), leaf(2), leaf(3, 2, 1, 1), leaf(3), leaf(1, 3, 4, 3)
    op = torch.ops.fusednn.separable_conv2d_forward
    function = lambda *t: op(*t, (1, 1), (1, 1, 1, 1), (1, 1), "silu", "gelu")  # noqa: E731
    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


# Batch statistics and frozen ones, in every mixture.
every_mixture = pytest.mark.parametrize("training", list(itertools.product([True, False], repeat=2)), ids=str)


def block_with_norms(training):
    block = fusednn.DepthwiseSeparableConv2d(
        2, 3, 3, padding=1, activation="silu", pointwise_activation="gelu", dtype=torch.float64
    )
    block.norm1.train(training[0])
    block.norm2.train(training[1])
    names = [name for name, _ in block.named_parameters()]
    leaves = [leaf(*p.shape) for p in block.parameters()]

    def function(x, *parameters):
        for name, p in zip(names, parameters, strict=True):
            module, _, attribute = name.rpartition(".")
            child = block.get_submodule(module)
            del child._parameters[attribute]
            child._parameters[attribute] = p
        return block(x)

    return function, (leaf(2, 2, 3, 3), *leaves)


@pytest.mark.natively
@every_mixture
def test_of_a_block_with_norms(training_place, training):
    assert gradcheck(*block_with_norms(training))


@every_mixture
def test_twice_of_a_block_with_norms(reference_place, training):
    assert gradgradcheck(*block_with_norms(training))


def test_every_subset_of_frozen_arguments(place):
    work = make((2, 5, 7, 6), padding=1, activation="silu", device=place.device)
    complete = run(fused_step, work)
    for size in (1, 2):
        for wanted in itertools.combinations(ARGUMENTS, size):
            for name, t in run(fused_step, work, wanted).items():
                torch.testing.assert_close(t, complete[name])


def test_a_gradient_penalty_through_a_block(training_place):
    """Double backward in float32, batch statistics included, is that of torch's layers."""
    block = fusednn.DepthwiseSeparableConv2d(4, 6, 3, padding=1, activation="silu", dtype=torch.float64)
    composite = Composite(block)
    x = torch.randn(3, 4, 6, 5, dtype=torch.float64)
    found = []
    for module in (block, composite):
        leaf_ = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(module(leaf_).square().sum(), leaf_, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), [leaf_, *module.parameters()]))
    torch.testing.assert_close(found[0], found[1])


def test_a_weight_made_from_the_input(place):
    """Double backward does not follow a weight back to the input that it was computed from."""
    x = leaf(1, 2, 4, 4)
    results = []
    for f in (lambda i, w: depthwise_conv2d(i, w, activation="silu"), _torch):
        w = x[:, :, :2, :2].reshape(2, 1, 2, 2) * 2
        (grad,) = torch.autograd.grad(f(x, w).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), x)[0])
    torch.testing.assert_close(results[0], results[1])


def _torch(x, w):
    return torch.nn.functional.silu(torch.nn.functional.conv2d(x, w, groups=2))
