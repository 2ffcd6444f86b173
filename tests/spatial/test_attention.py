"""SpatialAttention against PyTorch's operations: options, layouts, dtypes, masks and edges."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

import fusednn
from fusednn.functional import spatial_attention

from .cases import (
    DTYPES,
    OUTPUTS,
    SCORES,
    check,
    fused_step,
    interpreted,
    make,
    run,
    torch_attend,
    torch_softmax,
)

every_score = pytest.mark.parametrize("score", SCORES)
every_output = pytest.mark.parametrize("output", OUTPUTS)


@pytest.mark.in_turn
@every_score
@every_output
@pytest.mark.parametrize(
    ("glimpses", "masked", "last"), [(1, False, False), (1, True, True), (3, False, True), (3, True, False)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_torch(place, score, output, glimpses, masked, last, dtype):
    """Results, and all gradients, through the output and through the map."""
    options = {"glimpses": glimpses, "masked": masked, "dtype": dtype, "last": last, "device": place.device}
    check(make((3, 7, 5, 6), score, output, **options))


SHAPES = [
    (0, 3, 2, 2),
    (1, 1, 1, 1),
    (2, 1, 3, 5),
    (2, 31, 1, 1),
    (1, 5, 1, 9),
    (2, 33, 9, 1),
    (3, 64, 20, 10),
]


@pytest.mark.in_turn
@every_score
@every_output
@pytest.mark.parametrize("shape", [*SHAPES, (2, 129, 17, 31)], ids=str)
def test_shapes(place, score, output, shape):
    check(make(shape, score, output, device=place.device))


@every_score
@every_output
def test_without_a_state_or_a_temperature(place, score, output):
    work = make(score=score, output=output, temperature=None, device=place.device)
    check(work)
    check(work.with_(hidden_term=None))


def every_other(t):
    """Values two apart in the last dimension."""
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan, dtype=t.dtype, device=t.device)
    wide[..., ::2] = t
    return wide[..., ::2]


def offset(t):
    """Contiguous, one element past an aligned address."""
    flat = torch.full((t.numel() + 1,), torch.nan, dtype=t.dtype, device=t.device)
    flat[1:] = t.flatten()
    return flat[1:].view(t.shape)


def reversed_order(t):
    """Dimensions in reverse order in memory."""
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


@pytest.mark.in_turn
@every_score
@every_output
@pytest.mark.parametrize("layout", [every_other, offset, reversed_order], ids=lambda f: f.__name__)
def test_layouts(place, score, output, layout):
    work = make(score=score, output=output, glimpses=2, masked=True, device=place.device)
    for name, t in work.tensors.items():
        if t is not None and t.dim() and not interpreted(place):
            check(work.with_(**{name: layout(t)}), f"{name}: ")
    check(work.map(lambda t: layout(t) if t.dim() else t))


@every_score
@every_output
def test_expanded_arguments(place, score, output):
    """Every element the same memory, and every row: as copies of them give."""
    work = make(score=score, output=output, glimpses=2, masked=True, device=place.device)
    for name in ("features", "weight", "hidden_term")[: 1 if interpreted(place) else 3]:
        t = work.tensors[name]
        for expanded in (t.flatten()[:1].view([1] * t.dim()).expand(t.shape), t[:1].expand(t.shape)):
            found, expected = (run(fused_step, work.with_(**{name: x})) for x in (expanded, expanded.clone()))
            for key, value in found.items():
                torch.testing.assert_close(value, expected[key], msg=lambda m, k=(name, key): f"{k}: {m}")


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])
def test_memory_format_is_that_of_the_features(place, last):
    work = make((2, 4, 3, 5), glimpses=2, last=last, device=place.device)
    fmt = torch.channels_last if last else torch.contiguous_format
    results = run(fused_step, work)
    for name in ("attended", "grad of features"):
        assert results[name].is_contiguous(memory_format=fmt), name
    assert results["map"].is_contiguous()


@every_output
def test_softmax_is_over_all_positions(place, output):
    work = make((3, 5, 4, 6), output=output, device=place.device, dtype=torch.float64)
    a = run(fused_step, work)["map"]
    torch.testing.assert_close(a.sum((2, 3)), torch.ones_like(a[..., 0, 0]))
    features, weight, term, _, t = work.tensors.values()
    s = F.conv2d(features, weight[:, :, None, None]) + term.view_as(a)
    for axis in (2, 3):
        wrong = (s / t).softmax(axis)
        assert (wrong - a).abs().max() > 0.1
        assert (wrong.sum((2, 3)) > 2).all()


@every_score
@every_output
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fully_masked(place, score, output, dtype):
    """Nothing to attend to: map, output and gradients 0, whatever is there; other samples don't notice."""
    work = make(score=score, output=output, dtype=dtype, device=place.device)
    mask = torch.ones(2, 1, 4, 3, dtype=torch.bool, device=place.device)
    mask[1] = False
    object.__setattr__(work, "mask", mask)
    expected = run(fused_step, work)
    bad = work.map(torch.clone)
    for name in ("features", "hidden_term"):
        if name == "features" or score == "positional":
            bad.tensors[name][1] = torch.nan
    for tensor in bad.grads:
        tensor[1] = torch.nan
    found = run(fused_step, bad)
    for results in (expected, found):
        for name in ("attended", "map", "grad of features", "grad of hidden_term"):
            assert results[name][1].eq(0).all(), name
    for name, t in found.items():
        assert t.equal(expected[name]), name


@every_score
@every_output
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])
def test_masked_positions_never_leak(place, score, output, value, last):
    work = make(score=score, output=output, glimpses=2, masked=True, last=last, device=place.device)
    expected = run(fused_step, work)
    hidden = ~work.mask
    bad = work.map(torch.clone)
    bad.tensors["features"].masked_fill_(hidden, value)
    bad.grads[1].masked_fill_(hidden, value)
    if score == "positional":
        bad.tensors["hidden_term"].masked_fill_(hidden.flatten(2), value)
    if output == "scale":
        bad.grads[0].masked_fill_(hidden, value)
    for name, t in run(fused_step, bad).items():
        assert t.equal(expected[name]), name
    assert expected["map"].masked_select(hidden).eq(0).all()
    assert expected["grad of features"].masked_select(hidden).eq(0).all()


@pytest.mark.parametrize("shape", [(4, 3), (1, 4, 3), (1, 1, 4, 3), (2, 1, 4, 3), (3,), (4, 1), (2, 1, 1, 1)])
def test_masks_broadcast(place, shape):
    work = make(glimpses=2, device=place.device)
    mask = torch.rand(shape, device=place.device) > 0.4
    found = []
    for m in (mask, mask.expand(2, 1, 4, 3).clone()):
        object.__setattr__(work, "mask", m)
        found.append(run(fused_step, work))
    for name, t in found[0].items():
        assert t.equal(found[1][name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_scores(place, dtype):
    """-inf takes no part; a row of nothing else is 0; +inf and NaN make their own sample NaN, as in torch."""
    work = make((4, 3, 2, 3), output="sum", dtype=dtype, device=place.device, temperature=None)
    term = work.tensors["hidden_term"].clone()
    term[0, 0, :2], term[1], term[2, 0, 3] = -torch.inf, -torch.inf, torch.inf
    found = run(fused_step, work.with_(hidden_term=term))
    map = found["map"].flatten(1)
    assert map[0, :2].eq(0).all()
    assert map[1].eq(0).all()
    assert found["attended"][1].eq(0).all()
    assert map[2].isnan().any()
    for name in ("attended", "map", "grad of features", "grad of hidden_term"):
        assert found[name][[0, 1, 3]].isfinite().all(), name
    expected = run(fused_step, work)
    assert found["map"][3].equal(expected["map"][3])
    finite = work.with_(hidden_term=term[:1, :, 2:].clone(), features=work.tensors["features"][:1, :, :1])
    kept = work.tensors["features"][:1].flatten(2)[:, :, 2:].reshape(1, 3, 1, 4)
    finite = finite.with_(features=kept)
    torch.testing.assert_close(fused_step(finite, finite.tensors)[0], found["attended"][:1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("learned", [False, True])
def test_one_hot_and_uniform(place, dtype, learned):
    """Small temperatures tend to the largest score's position, large ones to all; nothing overflows."""
    work = make((3, 5, 4, 6), output="sum", dtype=dtype, device=place.device)
    features, weight, term, _, _ = work.tensors.values()
    s = F.conv2d(features.float(), weight.float()[:, :, None, None]).flatten(2) + term.float()
    best = s.argmax(-1, keepdim=True)
    for t in (1e-30, 1e-300):
        t = max(t, torch.finfo(dtype).tiny) if learned else t
        given = torch.tensor(t, dtype=dtype, device=place.device) if learned else t
        leaves = [x.detach().requires_grad_() for x in (features, weight, term)]
        if learned:
            leaves.append(given.requires_grad_())
        out, a = spatial_attention(*leaves[:3], temperature=given, output="sum")
        assert a.flatten(2).gather(2, best).eq(1).all()
        assert a.sum() == 3
        torch.testing.assert_close(out, features.flatten(2).gather(2, best.expand(-1, 5, -1)).squeeze(2))
        for grad in torch.autograd.grad(out.sum() + a.square().sum(), leaves):
            assert grad.isfinite().all()
    for t in (1e30, torch.inf):
        _, a = spatial_attention(features, weight, term, temperature=t)
        torch.testing.assert_close(a, torch.full_like(a, 1 / 24))


@pytest.mark.parametrize("t", [0.0, -1.0, torch.nan])
def test_learned_temperature_that_is_not_positive(place, t):
    work = make(device=place.device).with_(temperature=torch.tensor(t, device=place.device))
    assert fused_step(work, work.tensors)[1].isnan().all()


def test_coordinates_of_half_precision(place):
    """The sums are taken before the map is rounded: a map of 4096 equal weights has its centre at 0."""
    for dtype in (torch.float16, torch.bfloat16):
        features = torch.zeros(1, 2, 64, 64, dtype=dtype, device=place.device)
        weight = torch.ones(1, 2, dtype=dtype, device=place.device)
        out, _ = spatial_attention(features, weight, output="coordinates")
        assert out.abs().max() < 1e-6
        term = torch.full((1, 1, 64, 64), -torch.inf, dtype=dtype, device=place.device)
        term[..., 5, 60] = 0
        out, _ = spatial_attention(features, weight, term.flatten(2), output="coordinates")
        expected = torch.tensor([2 * 60 / 63 - 1, 2 * 5 / 63 - 1], device=place.device).to(dtype)
        assert out.flatten().equal(expected)


@every_score
@every_output
def test_subsets_of_frozen_arguments(place, score, output):
    work = make(score=score, output=output, masked=True, device=place.device)
    complete = run(fused_step, work)
    for name in (n for n, t in work.tensors.items() if t is not None):
        for key, t in run(fused_step, work, (name,)).items():
            torch.testing.assert_close(t, complete[key])


def test_gradient_through_one_result(place):
    """Through the output alone, and the map alone: what is absent counts as 0."""
    work = make(output="sum", device=place.device)
    leaf = work.tensors["features"].detach().requires_grad_()
    tensors = {**work.tensors, "features": leaf}
    both = fused_step(work, tensors)
    parts = [
        torch.autograd.grad(r, leaf, g, retain_graph=True)[0] for r, g in zip(both, work.grads, strict=True)
    ]
    whole = torch.autograd.grad(both, leaf, work.grads)[0]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.natively
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeats_in_every_bit(place, dtype):
    work = make((3, 33, 20, 10), "additive", "flatten", 2, True, dtype=dtype, device=place.device)
    first = run(fused_step, work)
    for _ in range(2):
        again = run(fused_step, work.map(torch.clone))
        assert all(t.equal(first[name]) for name, t in again.items())


@every_score
@every_output
@pytest.mark.parametrize("glimpses", [1, 2])
def test_module(place, score, output, glimpses):
    """The layer is its children's composition."""
    options = {"score": score, "output": output, "glimpses": glimpses, "temperature": 0.5}
    module = fusednn.SpatialAttention(5, 8, 4, 3, **options, learn_temperature=True, dtype=torch.float64)
    module = module.to(place.device)
    x = torch.randn(2, 5, 4, 3, dtype=torch.float64, device=place.device)
    for h in (torch.randn(2, 8, dtype=torch.float64, device=place.device), None):
        out, a = module(x, h)
        term = module.hidden(torch.zeros(2, 8).to(x) if h is None else h)
        s = module.score(x)
        if score == "positional":
            s = s + term.view(2, glimpses, 4, 3)
        else:
            s = F.conv2d((s + term[:, :, None, None]).tanh(), module.v.weight[:, :, None, None])
        expected_map = torch_softmax(s, None, module.log_temperature.exp())
        expected = torch_attend(x, expected_map, output)
        torch.testing.assert_close((out, a), (expected, expected_map))
        for results in ((out, a), (expected, expected_map)):
            module.zero_grad()
            sum(r.square().sum() for r in results).backward()
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]
            if results[0] is out:
                first = grads
        torch.testing.assert_close(first, grads)
    assert module.temperature.item() == pytest.approx(0.5)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    torch.testing.assert_close(copied(x)[0], module(x)[0])


def test_additive_scores_take_any_size():
    module = fusednn.SpatialAttention(3, 4, None, None, score="additive")
    for size in ((2, 7), (5, 5)):
        out, a = module(torch.randn(2, 3, *size), torch.randn(2, 4))
        assert out.shape == (2, 3, *size)
        assert a.shape == (2, 1, *size)


def test_without_hidden_state():
    module = fusednn.SpatialAttention(3, 0, 4, 3, output="coordinates")
    assert list(module.state_dict()) == ["score.weight"]
    x = torch.randn(2, 3, 4, 3)
    torch.testing.assert_close(module(x)[1], torch_softmax(module.score(x), None, 1.0))
    assert "coordinates" in repr(module)
