"""The block against torch's layers: results, gradients, statistics, saved memory, children, copies."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

import fusednn
from fusednn.testing import assert_close_to_oracle

from .cases import Composite

Block = fusednn.DepthwiseSeparableConv2d
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# C, C', kernel, options.
BLOCKS = {
    "mobilenet": (13, 33, 3, {"padding": 1}),
    "stride 2": (33, 7, 3, {"padding": 1, "stride": 2}),
    "linear bottleneck": (31, 31, 3, {"padding": 1, "pointwise_activation": None, "residual": True}),
    "efficientnet": (7, 13, 5, {"padding": 2, "activation": "silu", "pointwise_activation": None}),
    "atrous": (16, 16, 3, {"padding": 2, "dilation": 2, "activation": "hardswish"}),
    "7x7": (9, 24, 7, {"padding": 3, "activation": "gelu", "pointwise_activation": "gelu_tanh"}),
    "no norms": (8, 12, 3, {"padding": 1, "norm": None, "pointwise_norm": None}),
    "first norm": (8, 12, 3, {"pointwise_norm": None, "bias": True, "activation": "relu"}),
    "second norm": (8, 12, 3, {"norm": None, "activation": None}),
    "reflect": (6, 8, 3, {"padding": 1, "padding_mode": "reflect"}),
    "multiplier": (5, 8, 3, {"multiplier": 3, "padding": "same"}),
}
every_block = pytest.mark.parametrize("case", BLOCKS)


def pair(case: str, device: str = "cpu", dtype: torch.dtype = torch.float32):
    """Return a block, whose norms are not the identity, and torch's layers with the same values."""
    c, c_out, kernel, options = BLOCKS[case]
    torch.manual_seed(5)
    block = Block(c, c_out, kernel, **options)
    for norm in (block.norm1, block.norm2):
        if norm is not None:
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    block = block.to(device, dtype)
    return block, Composite(block)


def images(case: str, device: str = "cpu", dtype: torch.dtype = torch.float32, batch: int = 3):
    return torch.randn(batch, BLOCKS[case][0], 9, 8).to(device, dtype)


def step(module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the output, gradients and buffers of a training step, by name."""
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    out = module(x)
    generator = torch.Generator().manual_seed(1)
    out.backward(torch.randn(out.shape, generator=generator).to(out.device, out.dtype))
    found = {"output": out.detach(), "grad of input": x.grad}
    found |= {f"grad of {name}": p.grad for name, p in module.named_parameters()}
    return found | {name: b.clone() for name, b in module.named_buffers()}


@pytest.mark.in_turn("case")
@every_block
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
def test_inference_matches_the_oracle(place, case, dtype, last):
    block, composite = pair(case, place.device, dtype)
    x = images(case, place.device, dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    oracle = copy.deepcopy(composite).double().eval()(x.double()).detach()
    with torch.no_grad():
        out, same_dtype = block.eval()(x), composite.eval()(x)
    assert out.stride() == same_dtype.stride()
    assert_close_to_oracle(out, same_dtype, oracle)
    with torch.no_grad():
        (found,) = fusednn.explain(block, x)
    assert (found.operation, found.backend) == ("separable_conv2d_forward", place.backend)


@pytest.mark.in_turn("case")
@every_block
@pytest.mark.parametrize("mode", list(itertools.product([True, False], repeat=2)), ids=str)
def test_training_in_float64(training_place, case, mode):
    """Each norm in either mode: frozen ones are differentiated too."""
    block, composite = pair(case, training_place.device, torch.float64)
    for module in (block, composite):
        for norm, training in zip((module.norm1, module.norm2), mode, strict=True):
            if norm is not None:
                norm.train(training)
    for _ in range(2):
        x = images(case, training_place.device, torch.float64)
        actual, expected = step(block, x), step(composite, x)
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.in_turn("case")
@every_block
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_matches_the_oracle(training_place, case, dtype):
    block, composite = pair(case, training_place.device, dtype)
    if dtype.itemsize == 2:  # at a kink, rounding decides about a whole gradient: luck, not exactness
        for module, name in itertools.product((block, composite), ("activation1", "activation2")):
            if getattr(module, name) is not None:
                setattr(module, name, nn.SiLU())
    x = images(case, training_place.device, dtype)
    oracle = step(copy.deepcopy(composite).double(), x.double())
    actual, same_dtype = step(block, x), step(composite, x)
    for name, expected in same_dtype.items():
        # A bias before a norm has no gradient but torch's rounding.
        if name == "grad of depthwise.bias" or not expected.dtype.is_floating_point:
            continue
        assert_close_to_oracle(actual[name], expected, oracle[name], name)


NORMS = {
    "momentum": {"momentum": 0.3},
    "cumulative": {"momentum": None},
    "no statistics": {"track_running_stats": False},
    "plain": {"affine": False},
    "large eps": {"eps": 0.1},
}


@pytest.mark.parametrize("name", NORMS)
def test_running_statistics(training_place, name):
    def norm(channels, **kwargs):
        return nn.BatchNorm2d(channels, **NORMS[name], **kwargs)

    block = Block(6, 9, 3, padding=1, norm=norm, pointwise_norm=norm).to(training_place.device)
    composite = Composite(block)
    for mode in (True, True, False, True, False):
        block.train(mode)
        composite.train(mode)
        x = 3 * torch.randn(4, 6, 5, 5, device=training_place.device) + 1
        with torch.no_grad():
            torch.testing.assert_close(block(x), composite(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(dict(block.named_buffers()), dict(composite.named_buffers()))


def test_tracking_toggled(training_place):
    """pytorch#20967, #37823: the flag counts where it is read, not where the norm was made."""
    block, composite = pair("mobilenet", training_place.device)
    for tracks, mode in ((False, True), (True, True), (False, False), (True, False)):
        for module in (block, composite):
            module.train(mode)
            module.norm1.track_running_stats = tracks
        x = images("mobilenet", training_place.device)
        torch.testing.assert_close(step(block, x), step(composite, x), rtol=1e-4, atol=1e-4)


def test_large_mean_and_small_variance(training_place):
    block, composite = pair("mobilenet", training_place.device)
    x = images("mobilenet", training_place.device) * 1e-2 + 100
    oracle = step(copy.deepcopy(composite).double(), x.double())
    actual, same_dtype = step(block, x), step(composite, x)
    for name in ("output", "norm1.running_mean", "norm1.running_var"):
        assert_close_to_oracle(actual[name], same_dtype[name], oracle[name], name)


def test_one_value_per_channel(training_place):
    block, composite = pair("mobilenet", training_place.device)
    x = torch.randn(1, 13, 1, 1, device=training_place.device)
    texts = []
    for module in (block, composite):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel") as raised:
            module(x)
        texts.append(str(raised.value))
    assert texts[0] == texts[1]
    torch.testing.assert_close(block.eval()(x), composite.eval()(x))


def test_empty_batch(training_place):
    block, composite = pair("mobilenet", training_place.device)
    x = images("mobilenet", training_place.device, batch=0)
    actual, expected = step(block, x), step(composite, x)
    for name in ("output", *dict(block.named_buffers())):
        torch.testing.assert_close(actual[name], expected[name])
    assert block.eval()(x).shape == expected["output"].shape


def _saved_bytes(module: nn.Module, x: torch.Tensor) -> int:
    parameters = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    storages = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = (storage.nbytes(), t)  # held, so that no address comes back
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    return sum(size for size, _ in storages.values())


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("case", ["mobilenet", "linear bottleneck", "efficientnet"])
def test_saved_memory_is_at_most_half_of_eagers(training_place, case, inplace):
    block, composite = pair(case, training_place.device)
    for module in (*block.modules(), *composite.modules()):
        if hasattr(module, "inplace"):
            module.inplace = inplace
    x = images(case, training_place.device, batch=8).requires_grad_()
    ours, eagers = _saved_bytes(block, x), _saved_bytes(composite, x)
    assert 0 < ours <= eagers / 2, f"{ours} bytes, eager {eagers}"


def test_repeats_in_every_bit(training_place):
    block, _ = pair("mobilenet", training_place.device)
    x = images("mobilenet", training_place.device)
    first = step(copy.deepcopy(block), x)
    before = torch.get_num_threads()
    try:
        # PyTorch's own sums depend on the number of threads.
        for threads in (before, before) if training_place.backend == "reference" else (1, 2, 3):
            torch.set_num_threads(threads)
            for name, t in step(copy.deepcopy(block), x).items():
                assert t.equal(first[name]), f"{threads} threads: {name}"
    finally:
        torch.set_num_threads(before)


def hooked(block):
    block.norm1.register_forward_hook(lambda *_: None)


def synchronised(block):
    nn.SyncBatchNorm.convert_sync_batchnorm(block)


def parametrized(block):
    parametrizations.weight_norm(block.depthwise)


def overridden(block):
    block.pointwise.forward = lambda x: nn.Conv2d.forward(block.pointwise, x)


def subclassed(block):
    block.norm2.__class__ = type("Mine", (nn.BatchNorm2d,), {})


def other_activation(block):
    block.activation1 = nn.Mish()


def other_norm(block):
    block.norm2 = nn.GroupNorm(3, 33)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (hooked, "norm1 has hooks"),
        (parametrized, "depthwise is a ParametrizedConv2d"),
        (overridden, "pointwise has a forward that was assigned"),
        (subclassed, "norm2 is a Mine"),
        (other_activation, "activation1 is a Mish"),
        (other_norm, "norm2 is a GroupNorm"),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_children_that_must_be_called(change, said):
    block, _ = pair("mobilenet")
    change(block)
    composite = Composite(block)
    x = images("mobilenet")
    (found,) = fusednn.explain(copy.deepcopy(block), x)
    assert found.backend == "composite"
    assert said in str(found)
    torch.testing.assert_close(block(x), composite(x))


def test_synchronised_norms_are_called():
    block, _ = pair("mobilenet")
    synchronised(block)
    assert type(block.norm1) is nn.SyncBatchNorm
    (found,) = fusednn.explain(block.eval(), images("mobilenet"))
    assert "norm1 is a SyncBatchNorm" in str(found)
    assert found.backend == "composite"


def test_hooks_on_children_run():
    block, seen = pair("mobilenet")[0], []
    handle = block.activation1.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    block(images("mobilenet"))
    assert seen == [(3, 13, 9, 8)]
    handle.remove()
    assert fusednn.explain(block, images("mobilenet"))[0].backend != "composite"


def test_from_modules_shares_them():
    layers = [nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)]
    layers += [nn.Conv2d(4, 6, 1), None, None]
    block = Block.from_modules(*layers)
    assert [*block.parameters()] == [p for layer in layers if layer is not None for p in layer.parameters()]
    x = torch.randn(2, 4, 5, 5)
    copied = copy.deepcopy(nn.Sequential(*layers[:4]))
    torch.testing.assert_close(block(x), copied(x))
    assert layers[1].num_batches_tracked == 1
    assert not Block.from_modules(*[x if x is None else x.eval() for x in layers]).training


@pytest.mark.parametrize(
    ("children", "residual", "error", "match"),
    [
        ((nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)), False, ValueError, "depthwise: got groups=1"),
        ((nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 3)), False, ValueError, "pointwise"),
        ((nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(8, 4, 1)), False, ValueError, "in_channels=8"),
        ((nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 6, 1)), True, ValueError, "residual"),
        ((nn.Conv1d(4, 4, 3, groups=4), nn.Conv2d(4, 6, 1)), False, TypeError, "depthwise: got Conv1d"),
    ],
)
def test_modules_that_make_no_block(children, residual, error, match):
    with pytest.raises(error, match=match):
        Block.from_modules(children[0], None, None, children[1], None, None, residual=residual)


def test_activation_that_is_no_module():
    with pytest.raises(TypeError, match="activation1: got str"):
        Block.from_modules(nn.Conv2d(4, 4, 3, groups=4), None, "relu", nn.Conv2d(4, 4, 1), None, None)


def test_errors_are_those_of_torchs_layers():
    block, composite = pair("mobilenet")
    for bad in (
        torch.randn(3, 12, 9, 8),
        torch.randn(13, 9, 8),
        torch.randn(2, 13, 9, 8).double(),
        torch.randn(3),
    ):
        with pytest.raises(Exception) as theirs:  # noqa: PT011  its type is what is asked
            composite(bad)
        with pytest.raises(theirs.type) as ours:
            block(bad)
        assert str(ours.value) == str(theirs.value)


def test_residual_of_another_size_is_named():
    with pytest.raises(RuntimeError, match="residual has shape"):
        Block(4, 4, 3, residual=True)(torch.randn(1, 4, 3, 3))


@pytest.mark.parametrize("mode", [True, False])
def test_copies_files_and_functional_call(mode):
    block, composite = pair("mobilenet")
    block.train(mode), composite.train(mode)
    x = images("mobilenet")
    with torch.no_grad():
        block.eval()(x)  # so that folded weights exist
    block.train(mode)
    for copied in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        torch.testing.assert_close(step(copied, x), step(copy.deepcopy(composite), x), rtol=1e-4, atol=1e-5)
    state = {k: torch.rand_like(v) if v.is_floating_point() else v for k, v in block.state_dict().items()}
    expected = functional_call(
        composite, dict(zip(composite.state_dict(), map(torch.clone, state.values()))), (x,)
    )
    torch.testing.assert_close(functional_call(block, state, (x,)), expected, rtol=1e-4, atol=1e-5)
    assert list(block.state_dict()) == list(composite.state_dict())


@pytest.mark.parametrize("mode", [True, False])
def test_autocast(training_place, mode):
    block, composite = pair("linear bottleneck", training_place.device)
    block.train(mode), composite.train(mode)
    x = images("linear bottleneck", training_place.device)
    with torch.autocast(training_place.device, torch.bfloat16):
        actual, expected = block(x), composite(x)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)
    for out in (actual, expected):
        out.float().square().mean().backward()
    for a, b in zip(block.parameters(), composite.parameters(), strict=True):
        assert a.grad.dtype == b.grad.dtype
        torch.testing.assert_close(a.grad, b.grad, rtol=0.1, atol=0.02)
