"""torch.library's own checks, torch.compile, torch.export, autocast, torch.func."""

import copy

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, jvp, vmap

import fusednn
from tests.recurrence.op_cases import OPS as RECURRENCE
from tests.registry import cases_of as op_cases

from .cases import DTYPES, fused_step, make, torch_step
from .op_cases import OPS as SPATIAL

OPS = (*SPATIAL, *RECURRENCE)


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name):
    op = getattr(torch.ops.fusednn, name).default
    with fusednn.use_backend("reference"):
        for case, args in op_cases(name).items():
            args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
            try:
                torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
            except Exception as error:
                raise AssertionError(f"{name} {case}") from error


@pytest.mark.parametrize("name", OPS)
def test_opcheck_of_autograd_and_dynamic_shapes(name):
    """All of opcheck on one case that trains: the rest of it takes seconds a case."""
    args = [a for case, a in op_cases(name).items() if "additive" in case or "masked" in case][-1]
    if name.endswith("backward"):
        args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
    torch.library.opcheck(getattr(torch.ops.fusednn, name).default, args)


def _fakes_agree(place, name: str, dtype: torch.dtype) -> None:
    op = getattr(torch.ops.fusednn, name)
    for case, args in op_cases(name, dtype).items():
        args = tuple(a.detach().to(place.device) if isinstance(a, torch.Tensor) else a for a in args)
        real = op(*args)
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
        for index, (r, f) in enumerate(zip(real, fake, strict=True)):
            assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride()), f"{case}, result {index}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS[:2])
def test_softmax_fakes(place, name, dtype):
    _fakes_agree(place, name, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS[2:4])
def test_attention_fakes(place, name, dtype):
    _fakes_agree(place, name, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS[4:])
def test_recurrence_fakes(recurrence_place, name, dtype):
    _fakes_agree(recurrence_place, name, dtype)


LAYERS = {
    "positional": lambda: fusednn.SpatialAttention(4, 6, 5, 3, output="flatten"),
    "additive": lambda: fusednn.SpatialAttention(
        4, 6, 5, 3, score="additive", output="coordinates", learn_temperature=True, glimpses=2
    ),
    "sequence": lambda: fusednn.AttentionLSTM(4, 5, 3, 6),
    "gru": lambda: fusednn.AttentionLSTM(4, 5, 3, 6, cell="gru", score="additive", output="sum"),
}


def arguments(layer: str, rows: int) -> tuple:
    if layer in ("sequence", "gru"):
        return (torch.randn(rows, 3, 4, 5, 3),)
    return torch.randn(rows, 4, 5, 3), torch.randn(rows, 6)


def flat(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else [t for r in result for t in flat(r)]


@pytest.mark.parametrize("layer", LAYERS)
def test_compile_fullgraph(layer):
    """Results and gradients, at batches that change without compiling again and again."""
    torch._dynamo.reset()
    ours = LAYERS[layer]()
    theirs = copy.deepcopy(ours)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (3, 5, 4):
        inputs = arguments(layer, batch)
        with torch._dynamo.config.patch(error_on_recompile=batch == 4):
            actual = flat(compiled(*inputs))
        expected = flat(theirs(*inputs))
        for module, out in ((ours, actual), (theirs, expected)):
            module.zero_grad()
            sum(t.square().sum() for t in out).backward()
        torch.testing.assert_close(actual, expected)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_compile_with_mask_and_lengths():
    torch._dynamo.reset()
    attention, sequence = LAYERS["positional"](), LAYERS["sequence"]()
    mask, lengths = torch.rand(2, 1, 5, 3) > 0.4, torch.tensor([3, 1])

    def both(x, h, frames, mask, lengths):
        return attention(x, h, mask), sequence(frames, lengths=lengths)

    inputs = (*arguments("positional", 2), *arguments("sequence", 2), mask, lengths)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(flat(compiled(*inputs)), flat(both(*inputs)))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("strict", [False, True])
def test_export(layer, strict):
    torch._dynamo.reset()
    module = LAYERS[layer]().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    inputs = arguments(layer, 3)
    with torch.no_grad():
        program = torch.export.export(
            module, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs), strict=strict
        )
        targets = {str(node.target) for node in program.graph.nodes}
        assert any("spatial_attention_forward" in t or "attention_lstm_forward" in t for t in targets)
        for rows in (2, 9):
            inputs = arguments(layer, rows)
            torch.testing.assert_close(flat(program.module()(*inputs)), flat(module(*inputs)))


def test_a_graph_traced_for_inference_has_gradients_too():
    args = op_cases("attention_lstm_forward", torch.float64)
    trained = args["lstm flatten direct positional"]
    found = []
    for save in (True, False):
        hidden, *_ = torch.ops.fusednn.attention_lstm_forward(*trained[:-1], save)
        leaves = [a for a in trained if isinstance(a, torch.Tensor)]
        found.append(torch.autograd.grad(hidden.square().sum(), leaves))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(place, dtype):
    """The features' dtype decides, as a softmax and a product with float32 features do in torch."""
    work = make(score="additive", output="sum", device=place.device)
    with torch.autocast(place.device, dtype):
        actual, expected = (step(work, work.tensors) for step in (fused_step, torch_step))
        half = {k: t.to(dtype) if k == "features" else t for k, t in work.tensors.items()}
        assert all(t.dtype == dtype for t in fused_step(work, half))
    assert actual[0].dtype == expected[0].dtype == torch.float32
    torch.testing.assert_close(actual, fused_step(work, work.tensors))
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05, check_dtype=False)


def test_autocast_of_the_recurrence(recurrence_place):
    module = LAYERS["sequence"]().to(recurrence_place.device)
    x = torch.randn(2, 3, 4, 5, 3, device=recurrence_place.device)
    expected = module(x)
    with torch.autocast(recurrence_place.device, torch.bfloat16):
        actual = module(x)
        actual[0].float().square().sum().backward()
    assert {t.dtype for t in flat(actual)} == {torch.bfloat16}
    assert module.cell.weight_ih.grad.dtype == torch.float32
    torch.testing.assert_close(flat(actual), flat(expected), rtol=0.05, atol=0.02, check_dtype=False)


@pytest.mark.parametrize("layer", LAYERS)
def test_per_sample_gradients(layer):
    """Vmap over grad, the usual use of torch.func; it sees through torch's ops only."""
    module = LAYERS[layer]()
    parameters = {k: v.detach() for k, v in module.named_parameters()}
    inputs = arguments(layer, 3)

    def loss(p, *sample):
        result = flat(functional_call(module, p, tuple(s[None] for s in sample)))
        return sum(t.square().sum() for t in result)

    found = vmap(grad(loss), in_dims=(None, *(0 for _ in inputs)))(parameters, *inputs)
    for index in range(3):
        module.zero_grad()
        loss(dict(module.named_parameters()), *(i[index] for i in inputs)).backward()
        for name, p in module.named_parameters():
            torch.testing.assert_close(found[name][index], p.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("score", ["positional", "additive"])
def test_jvp(score):
    work = make(score=score, dtype=torch.float64)
    x, direction = work.tensors["features"], torch.randn_like(work.tensors["features"])
    results = [
        jvp(lambda t, s=step: s(work, {**work.tensors, "features": t}), (x,), (direction,))
        for step in (fused_step, torch_step)
    ]
    torch.testing.assert_close(results[0], results[1])
