"""LuongAttention against the paper's formulas, written out step by step."""

import copy
import itertools

import pytest
import torch
from torch.func import functional_call, grad, vmap

import fusednn
from fusednn.functional import luong_attention
from fusednn.testing import assert_close_to_oracle

from .module_cases import DEVICES, DTYPES, random, randomise

SCORES = ("dot", "general", "concat")
pytestmark = pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
B, T, S, HD = 3, 4, 6, 8
every_score = pytest.mark.parametrize("score", SCORES)


def layer(score, device="cpu", dtype=torch.float32, **options):
    sizes = {} if score == "dot" else {"source_size": 10}
    if score == "concat":
        sizes["attention_size"] = 5
    return randomise(fusednn.LuongAttention(HD, score=score, **sizes, **options)).to(device, dtype)


def inputs(module, dtype=torch.float32, device="cpu", steps=(T,)):
    return [
        random(B, *steps, HD).to(device, dtype),
        random(B, S, module.source_size, seed=1).to(device, dtype),
    ]


def by_hand(module, hidden, source, counts=(S,) * B):
    """Return h~, context and weights; every score on its own."""
    shape = hidden.shape[:-1]
    rows = hidden if hidden.dim() == 3 else hidden[:, None]
    contexts, found = [], []
    for b in range(len(rows)):
        for h in rows[b]:
            scores = []
            for s in source[b, : counts[b]]:
                if module.score_kind == "dot":
                    scores.append(h @ s)
                elif module.score_kind == "general":
                    scores.append(h @ module.score.weight @ s)
                else:
                    scores.append(module.v.weight[0] @ torch.tanh(module.score.weight @ torch.cat((h, s))))
            weights = torch.stack(scores).softmax(0) if scores else source.new_zeros(0)
            contexts.append((weights[:, None] * source[b, : counts[b]]).sum(0))
            found.append(torch.nn.functional.pad(weights, (0, source.shape[1] - counts[b])))
    context = torch.stack(contexts).view(*shape, -1)
    attended = torch.tanh(torch.cat((context, hidden), -1) @ module.combine.weight.T)
    return attended, context, torch.stack(found).view(*shape, -1)


def gradients(results, wanted):
    loss = sum((t * random(*t.shape, seed=n).to(t)).sum() for n, t in enumerate(results))
    return torch.autograd.grad(loss, wanted, allow_unused=True)


@pytest.mark.parametrize("device", DEVICES)
@every_score
@pytest.mark.parametrize("counts", [None, (6, 2, 4), (6, 0, 1)], ids=str)
@pytest.mark.parametrize("how", ["lengths", "mask"])
@pytest.mark.parametrize("steps", [(T,), (), (1,)], ids=str)
def test_formula(device, score, counts, how, steps):
    """h~, context, weights and gradients; a source of no length has context and weights 0."""
    module = layer(score, device, torch.float64)
    hidden, source = (t.requires_grad_() for t in inputs(module, torch.float64, device, steps))
    given = {}
    if counts is not None:
        lengths = torch.tensor(counts, device=device)
        given = {"lengths": counts if len(steps) else lengths}
        if how == "mask":
            given = {"source_padding_mask": torch.arange(S, device=device) >= lengths[:, None]}
    attended, weights = module(hidden, source, **given)
    context, again = module.context(hidden, source, **given)
    expected = by_hand(module, hidden, source, counts or (S,) * B)
    assert torch.equal(weights, again)
    assert attended.shape == hidden.shape
    found = [attended, context, weights]
    torch.testing.assert_close(found, list(expected), rtol=1e-11, atol=1e-11)
    wanted = [hidden, source, *module.parameters()]
    torch.testing.assert_close(
        gradients(found, wanted), gradients(expected, wanted), rtol=1e-10, atol=1e-10, check_layout=False
    )


@pytest.mark.parametrize("device", DEVICES)
@every_score
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float64], ids=str)
def test_dtypes(device, score, dtype):
    """About as exact as the formula in torch's ops of the same dtype."""
    module = layer(score, device, dtype)
    hidden, source = random(16, 9, HD).to(device, dtype), random(16, 11, module.source_size).to(device, dtype)
    exact = by_hand(copy.deepcopy(module).double(), hidden.double(), source.double(), (11,) * 16)
    scores = {
        "dot": lambda: hidden @ source.mT,
        "general": lambda: hidden @ module.score.weight @ source.mT,
        "concat": lambda: module.v(torch.tanh(module.score(pairs(hidden, source)))).squeeze(-1),
    }[score]()
    weights = scores.softmax(-1)
    theirs = (
        torch.tanh(module.combine(torch.cat((weights @ source, hidden), -1))),
        weights @ source,
        weights,
    )
    attended, found = module(hidden, source)
    context, _ = module.context(hidden, source)
    for name, *three in zip(("h~", "context", "weights"), (attended, context, found), theirs, exact):
        assert_close_to_oracle(*three, name)


def pairs(hidden, source):
    shape = (*hidden.shape[:2], source.shape[1], -1)
    return torch.cat((hidden[:, :, None].expand(shape), source[:, None].expand(shape)), -1)


@pytest.mark.parametrize("device", DEVICES)
@every_score
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_padding_is_not_read(device, score, bad):
    module = layer(score, device)
    hidden, source = inputs(module, device=device)
    padding = (torch.arange(S) >= torch.tensor([6, 2, 0])[:, None]).to(device)
    results = []
    for filler in (0.0, bad):
        filled = source.masked_fill(padding[..., None], filler).requires_grad_()
        found = module(hidden.requires_grad_(), filled, padding)
        wanted = [hidden, filled, *module.parameters()]
        results.append([*found, *gradients(found, wanted)])
    torch.testing.assert_close(results[0], results[1])
    assert not results[1][3][padding].any()


@every_score
def test_steps_are_those_of_teacher_forcing(score):
    module = layer(score)
    hidden, source = inputs(module)
    together = module(hidden, source, lengths=[6, 2, 4])
    alone = [module(h, source, lengths=[6, 2, 4]) for h in hidden.unbind(1)]
    for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(whole, torch.stack(parts, 1))


@every_score
def test_gradgradcheck(score):
    module = layer(score, dtype=torch.float64)
    arguments = [t.requires_grad_() for t in inputs(module, torch.float64)]
    padding = torch.arange(S) >= torch.tensor([6, 0, 4])[:, None]

    def f(hidden, source):
        return module(hidden, source, padding)

    assert torch.autograd.gradcheck(f, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, arguments, fast_mode=True)


@every_score
def test_no_nan_on_the_way_back(score):
    """Not even one that a mask hides at the end: anomaly detection looks at each gradient."""
    module = layer(score)
    hidden, source = (t.requires_grad_() for t in inputs(module))
    with torch.autograd.detect_anomaly(check_nan=True):
        attended, weights = module(hidden, source, lengths=[6, 0, 4])
        (attended.square().sum() + weights.square().sum()).backward()
    assert not source.grad[1].any()


@pytest.mark.costly
@pytest.mark.in_turn
@every_score
def test_compile(score):
    torch._dynamo.reset()
    module = layer(score)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch, steps, length in ((3, 4, 6), (5, 3, 7), (2, 6, 4)):
        hidden, source = random(batch, steps, HD).float(), random(batch, length, module.source_size).float()
        lengths = torch.arange(1, batch + 1)
        with torch._dynamo.config.patch(error_on_recompile=batch == 2):
            actual = compiled(hidden, source, lengths=lengths)
        torch.testing.assert_close(actual, module(hidden, source, lengths=lengths))


@every_score
def test_export(score):
    module = layer(score).eval()
    arguments = tuple(inputs(module))
    dims = ({1: torch.export.Dim("steps", min=2)}, {1: torch.export.Dim("length", min=2)})
    program = torch.export.export(module, arguments, dynamic_shapes=dims)
    others = random(B, 7, HD).float(), random(B, 9, module.source_size).float()
    torch.testing.assert_close(program.module()(*others), module(*others))


@every_score
def test_per_sample_gradients(score):
    module = layer(score)
    parameters = {k: v.detach() for k, v in module.named_parameters()}
    arguments = inputs(module)

    def loss(p, h, s):
        return sum(t.square().sum() for t in functional_call(module, p, (h[None], s[None])))

    found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, *arguments)
    for n in range(B):
        expected = grad(loss)(parameters, *(t[n] for t in arguments))
        torch.testing.assert_close({k: v[n] for k, v in found.items()}, expected)


@pytest.mark.parametrize("device", DEVICES)
@every_score
def test_autocast(device, score):
    module = layer(score, device)
    hidden, source = inputs(module, device=device)
    expected = module(hidden, source)
    with torch.autocast(device, torch.bfloat16):
        found = module(hidden, source, lengths=[S] * B)
    assert found[0].dtype == torch.bfloat16
    torch.testing.assert_close([t.float() for t in found], list(expected), rtol=0.05, atol=0.05)


def test_parameters():
    shapes = {score: {k: tuple(p.shape) for k, p in layer(score).named_parameters()} for score in SCORES}
    assert shapes == {
        "dot": {"combine.weight": (8, 16)},
        "general": {"score.weight": (8, 10), "combine.weight": (8, 18)},
        "concat": {"score.weight": (5, 18), "v.weight": (1, 5), "combine.weight": (8, 18)},
    }
    assert "score='concat'" in repr(layer("concat"))
    assert fusednn.LuongAttention(4, device="meta", dtype=torch.bfloat16).combine.weight.is_meta


def test_dot_and_general_take_the_kernels():
    for score in SCORES:
        module = layer(score)
        called = [e.operation for e in fusednn.explain(module, *inputs(module))]
        assert called == ([] if score == "concat" else ["attention_forward"])


H, X, W = torch.zeros(2, 3, 4), torch.zeros(2, 5, 6), torch.zeros(4, 6)


@pytest.mark.parametrize(
    ("args", "options", "match"),
    [
        ((H[0, 0], X, W), {}, "hidden to be 2D or 3D"),
        ((H, X[0], W), {}, "source has size"),
        ((H, X[:1], W), {}, r"source has size \[1, 5, 6\], expected \[2, S, He\]"),
        ((H, X), {}, "source has 6 features, expected 4"),
        ((H, X, W.T), {}, "weight has shape"),
        ((H, X, None, W[0]), {}, "v: got one without weight"),
        ((H, X, torch.zeros(3, 10), torch.zeros(4)), {}, r"v has shape \[4\], expected \[3\]"),
        ((H, X, torch.zeros(3, 9), torch.zeros(3)), {}, "weight has shape"),
        ((H, X.double(), W), {}, "hidden and source must have the same dtype"),
        ((H, X, W.to("meta")), {}, "weight on meta"),
        ((H, X, W), {"source_padding_mask": torch.zeros(2, 5)}, r"source_padding_mask: got torch\.float32"),
        ((H, X, W), {"source_padding_mask": torch.zeros(2, 3).bool()}, "source_padding_mask: got"),
    ],
)
def test_errors(args, options, match):
    with pytest.raises(RuntimeError, match=match):
        luong_attention(*args, **options)


def test_errors_of_the_layer():
    for options, match in (
        ({"score": "cosine"}, "score: got 'cosine'"),
        ({"score": "dot", "source_size": 5}, "source_size: got 5, expected 4"),
        ({"source_size": 0}, "source_size: got 0"),
        ({"score": "concat", "attention_size": -1}, "attention_size: got -1"),
    ):
        with pytest.raises(ValueError, match=match):
            fusednn.LuongAttention(4, **options)
    module = fusednn.LuongAttention(4, 6)
    with pytest.raises(ValueError, match="lengths: got a source_padding_mask too"):
        module(H, X, torch.zeros(2, 5).bool(), [1, 2])
    for lengths in ([1], [1.0, 2.0], [[1, 2]]):
        with pytest.raises(RuntimeError, match="lengths: got"):
            module(H, X, lengths=lengths)


@every_score
@pytest.mark.parametrize("shape", list(itertools.product((0, 2), (0, 3), (0, 4))), ids=str)
def test_nothing_in_a_dimension(score, shape):
    batch, steps, length = shape
    module = layer(score)
    hidden = torch.randn(batch, steps, HD, requires_grad=True)
    attended, weights = module(hidden, torch.randn(batch, length, module.source_size))
    assert (attended.shape, weights.shape) == (hidden.shape, shape)
    attended.sum().backward()
    assert hidden.grad.isfinite().all()
