"""torch.library's own checks, torch.compile, torch.export, autocast, torch.func."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, jvp, vmap

import fusednn

from .cases import DTYPES, fused_step, make, torch_step
from .op_cases import OPS, op_cases


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name):
    op = getattr(torch.ops.fusednn, name).default
    with fusednn.use_backend("reference"):
        for case, args in op_cases(name).items():
            try:
                torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
            except Exception as error:
                raise AssertionError(f"{name} {case}") from error


@pytest.mark.parametrize("name", OPS)
def test_opcheck_of_autograd_and_dynamic_shapes(name):
    """All of opcheck on one case that trains: the rest of it takes seconds a case."""
    op = getattr(torch.ops.fusednn, name).default
    trained = [a for case, a in op_cases(name).items() if case.startswith("N=2") and "False" not in case[4:]]
    trained = trained or [a for case, a in op_cases(name).items() if case.startswith("N=2")]
    torch.library.opcheck(op, trained[-1])


def _fakes_agree(place, name: str, dtype: torch.dtype) -> None:
    op = getattr(torch.ops.fusednn, name)
    for case, args in op_cases(name, dtype).items():
        args = tuple(a.detach().to(place.device) if isinstance(a, torch.Tensor) else a for a in args)
        real = op(*args)
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
        pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (real, fake)), strict=True)
        for index, (r, f) in enumerate(pairs):
            assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride()), f"{case}, result {index}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS[:2])
def test_depthwise_fakes(place, name, dtype):
    _fakes_agree(place, name, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inference_fakes(place, dtype):
    _fakes_agree(place, OPS[2], dtype)


@pytest.mark.in_turn
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS[3:])
def test_training_fakes(training_place, name, dtype):
    _fakes_agree(training_place, name, dtype)


LAYERS = {
    "conv2d": lambda: fusednn.DepthwiseConv2d(4, 8, 3, padding="same", activation="silu"),
    "block": lambda: fusednn.DepthwiseSeparableConv2d(4, 6, 3, padding=1),
    "cumulative": lambda: fusednn.DepthwiseSeparableConv2d(
        4, 4, 3, padding=1, residual=True, norm=lambda c: nn.BatchNorm2d(c, momentum=None)
    ),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_compile_fullgraph(layer, mode):
    """Gradients and running statistics, at batches that change without compiling again and again."""
    torch._dynamo.reset()
    ours = LAYERS[layer]().train(mode)
    theirs = copy.deepcopy(ours)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (3, 5, 4):
        x = torch.randn(batch, 4, 7, 6)
        with torch._dynamo.config.patch(error_on_recompile=batch == 4):
            actual = compiled(x)
        expected = theirs(x)
        for module, out in ((ours, actual), (theirs, expected)):
            module.zero_grad()
            out.square().sum().backward()
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


def test_a_compiled_block_follows_its_weights():
    torch._dynamo.reset()
    block = LAYERS["block"]().eval()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 7, 6)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(x), block(x))
            block.norm1.running_var.mul_(2)
            block.pointwise.weight.data.mul_(2)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("strict", [False, True])
def test_export(layer, strict):
    torch._dynamo.reset()
    module = LAYERS[layer]().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(
            module, (torch.randn(3, 4, 7, 6),), dynamic_shapes={"input": {0: batch}}, strict=strict
        )
        assert any("conv2d_forward" in str(node.target) for node in program.graph.nodes)
        for rows in (2, 9):
            x = torch.randn(rows, 4, 7, 6)
            torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(place, dtype):
    work = make((2, 9, 8, 7), padding=1, device=place.device)
    with torch.autocast(place.device, dtype):
        actual, expected = (step(work.tensors, work.options) for step in (fused_step, torch_step))
        wide = {name: t.double() for name, t in work.tensors.items()}
        assert fused_step(wide, work.options).dtype == torch_step(wide, work.options).dtype
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("layer", LAYERS)
def test_per_sample_gradients(layer):
    """Vmap over grad, the usual use of torch.func; it sees through torch's ops only."""
    module = LAYERS[layer]().eval()
    parameters = {k: v.detach() for k, v in module.named_parameters()}
    buffers = dict(module.named_buffers())
    x = torch.randn(3, 4, 6, 5)

    def loss(p, sample):
        return functional_call(module, (p, buffers), (sample[None],)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for index, sample in enumerate(x):
        module.zero_grad()
        module(sample[None]).square().sum().backward()
        for name, p in module.named_parameters():
            torch.testing.assert_close(found[name][index], p.grad, rtol=1e-4, atol=1e-4)


def test_jvp():
    work = make((2, 3, 6, 5), dtype=torch.float64, padding=1, activation="silu")
    x, direction = work.tensors["input"], torch.randn_like(work.tensors["input"])
    results = [
        jvp(lambda t, s=step: s({**work.tensors, "input": t}, work.options), (x,), (direction,))
        for step in (fused_step, torch_step)
    ]
    torch.testing.assert_close(results[0], results[1])
