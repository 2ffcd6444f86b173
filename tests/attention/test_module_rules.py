"""MultiheadAttention beyond torch's results: rows with nothing to attend to, NaN, dropout, state, errors."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fusednn

from .module_cases import DEVICES, DTYPES, WEIGHTS, call, layers, masks, random, run

NAN, INF = float("nan"), float("inf")


def in_masks(kind: str, hidden: torch.Tensor) -> torch.Tensor:
    return hidden if kind == "bool" else torch.zeros(hidden.shape).masked_fill(hidden, -INF)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("where", ["attn_mask", "key_padding_mask"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_rows_with_nothing_to_attend_to(device, training, kind, where, weights):
    """Their output is the projection of zeros, in training and inference; what they would see is not read."""
    ours, *_ = layers(8, 2, batch_first=True, device=device)
    ours.train(training)
    x = random(3, 4, 8, dtype=torch.float32).to(device).requires_grad_()
    if where == "attn_mask":
        mask = torch.zeros(4, 4, dtype=torch.bool)
        mask[2] = True  # row 2 of all samples
        rows = (slice(None), 2)
    else:
        mask = torch.zeros(3, 4, dtype=torch.bool)
        mask[1] = True  # all rows of sample 1
        rows = (1,)
    output, found = ours(x, x, x, **{where: in_masks(kind, mask).to(device)}, **WEIGHTS[weights])
    assert torch.equal(output[rows], ours.out_proj.bias.expand_as(output[rows]))
    if found is not None:
        at = (slice(None), *rows) if weights == "heads" and where == "attn_mask" else rows
        at = (slice(None), slice(None), 2) if weights == "heads" and where == "attn_mask" else at
        assert not found[at].any()
    others = torch.ones(3, 4, dtype=torch.bool)
    others[rows] = False
    output[others].square().sum().backward(retain_graph=True)
    assert x.grad.isfinite().all()
    assert x.grad.any()
    if where == "key_padding_mask":
        assert not x.grad[1].any()
    (gone,) = torch.autograd.grad(output[rows].sum(), x)
    assert not gone.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_what_is_masked_does_not_leak(device, bad, kind, need_weights):
    ours, *_ = layers(8, 2, batch_first=True, device=device)
    query, key = random(2, 3, 8, dtype=torch.float32), random(2, 5, 8, dtype=torch.float32, seed=1)
    padding = torch.tensor([[False] * 5, [False, True, False, True, True]])
    found = []
    for filler in (0.0, bad):
        source = key.masked_fill(padding[..., None], filler).to(device).requires_grad_()
        output, weights = ours(
            query.to(device),
            source,
            source,
            in_masks(kind, padding).to(device),
            need_weights=need_weights,
        )
        ours.zero_grad()
        output.square().sum().backward()
        results = [output, *([weights] if need_weights else []), source.grad[~padding]]
        found.append([t.detach() for t in results])
        assert not source.grad[padding].nan_to_num(0).any() or filler == bad
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("p", [0.25, 1.0])
def test_dropout(device, batch_first, p):
    """In training only, of the right share of weights; the weights returned are those used."""
    ours, *_ = layers(8, 2, dropout=p, batch_first=batch_first, device=device)
    x = torch.randn(40, 40, 8, device=device)
    output, weights = ours(x, x, x, average_attn_weights=False)
    values = x @ ours.in_proj_weight[16:].T + ours.in_proj_bias[16:]
    per_sample = values if batch_first else values.transpose(0, 1)
    heads = weights @ per_sample.unflatten(-1, (2, 4)).transpose(1, 2)
    expected = ours.out_proj(heads.transpose(1, 2).flatten(2))
    torch.testing.assert_close(output, expected if batch_first else expected.transpose(0, 1))
    kept, clean = ours.eval()(x, x, x, average_attn_weights=False)
    dropped = weights == 0
    deviation = (p * (1 - p) / weights.numel()) ** 0.5
    assert abs(dropped.float().mean().item() - p) <= 3 * deviation
    assert not (clean == 0).any()
    torch.testing.assert_close(weights[~dropped], clean[~dropped] / (1 - p) if p < 1 else clean[~dropped])
    assert torch.equal(kept, ours(x, x, x)[0])
    memory = x.clone()  # not self-attention
    torch.testing.assert_close(ours(x, memory, memory)[0], kept)
    assert not torch.equal(ours.train()(x, memory, memory)[0], kept)


def test_dropout_follows_the_seed():
    ours, *_ = layers(8, 2, dropout=0.5)
    x = torch.randn(6, 2, 8)
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(ours(x, x, x, need_weights=seed == 1)[0])
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[1], made[2])


OPTIONS = [
    {},
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"kdim": 5},
    {"vdim": 6, "add_bias_kv": True},
    {"dtype": torch.float64},
    {"device": "meta"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_is_torchs_class(options):
    """isinstance, attributes, repr, parameters and their initial values, and the generator's state."""
    torch.manual_seed(1)
    ours, state = fusednn.MultiheadAttention(12, 3, 0.1, **options), torch.get_rng_state()
    torch.manual_seed(1)
    theirs = nn.MultiheadAttention(12, 3, 0.1, **options)
    assert torch.equal(state, torch.get_rng_state())
    assert isinstance(ours, nn.MultiheadAttention)
    assert repr(ours) == repr(theirs)
    assert vars(ours).keys() == vars(theirs).keys()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        assert a.is_meta or a.equal(b)


@pytest.mark.parametrize(
    "options", [{}, {"num_kv_heads": 2, "window": (2, 0), "rotary": 100.0, "alibi": True}]
)
@pytest.mark.parametrize("way", ["copy", "deepcopy", "pickle", "torch.save"])
def test_copies_and_files(options, way):
    ours = fusednn.MultiheadAttention(16, 4, **options)
    x = torch.randn(5, 2, 16)
    if way == "torch.save":
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    else:
        ways = {
            "copy": copy.copy,
            "deepcopy": copy.deepcopy,
            "pickle": lambda m: pickle.loads(pickle.dumps(m)),
        }
        copied = ways[way](ours)
    assert type(copied) is fusednn.MultiheadAttention
    assert repr(copied) == repr(ours)
    assert torch.equal(copied(x, x, x)[0], ours(x, x, x)[0])


def test_parametrized():
    ours, theirs, _ = layers(8, 2)
    x = torch.randn(5, 2, 8)
    for module in (ours, theirs):
        parametrizations.weight_norm(module, "in_proj_weight")
        parametrizations.spectral_norm(module.out_proj).eval()
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x, x, x), theirs(x, x, x))


def test_on_meta():
    ours = fusednn.MultiheadAttention(8, 2, batch_first=True, device="meta", num_kv_heads=1, rotary=True)
    x = torch.empty(3, 5, 8, device="meta")
    output, weights = ours(x, x, x, torch.empty(3, 5, device="meta", dtype=torch.bool))
    assert (output.shape, weights.shape) == ((3, 5, 8), (3, 5, 5))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True, "add_zero_attn": True}], ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_autocast(device, dtype, extra, weights, mask):
    ours, theirs, _ = layers(8, 2, device=device, **extra)
    x = random(5, 3, 8, dtype=torch.float32).to(device)
    given = masks(mask, 5, 5)
    given = given if given is None or mask == "bool" else given.float()
    given = given if given is None else given.to(device)
    made = []
    for module in (ours, theirs):
        with torch.autocast(device, dtype):
            results = module(x, x, x, attn_mask=given, **WEIGHTS[weights])
            results[0].float().square().sum().backward()
        made.append([*results, module.in_proj_weight.grad])
    for actual, expected in zip(*made, strict=True):
        if expected is None:
            assert actual is None
            continue
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)


X, Y = torch.zeros(5, 3, 8), torch.zeros(7, 3, 8)
BAD = {
    "rank of query": ({}, (X[None], Y, Y), {}, "query"),
    "rank of key": ({}, (X, Y[0], Y), {}, "key"),
    "unbatched value": ({}, (X[:, 0], Y[:, 0], Y), {}, "value"),
    "features of query": ({}, (X[..., :7], Y, Y), {}, "query"),
    "features of key": ({}, (X, Y[..., :7], Y), {}, "key|value"),
    "features of key and value": ({}, (X, Y[..., :7], Y[..., :7]), {}, "key"),
    "features of value": ({}, (X, Y, Y[..., :7]), {}, "value"),
    "kdim": ({"kdim": 6}, (X, Y, Y), {}, "key"),
    "vdim": ({"vdim": 6}, (X, Y, Y), {}, "value"),
    "length of value": ({}, (X, Y, Y[:6]), {}, "value"),
    "length of value, separate": ({"kdim": 8, "vdim": 6}, (X, Y, Y[:6, :, :6]), {}, "value"),
    "batch of key": ({}, (X, Y[:, :2], Y[:, :2]), {}, "key"),
    "one sample of key": ({}, (X, Y[:, :1], Y[:, :1]), {}, "key"),
    "integer attn_mask": ({}, (X, Y, Y), {"attn_mask": torch.zeros(5, 7).long()}, "attn_mask"),
    "integer padding": ({}, (X, Y, Y), {"key_padding_mask": torch.zeros(3, 7).int()}, "key_padding_mask"),
    "rank of attn_mask": ({}, (X, Y, Y), {"attn_mask": torch.zeros(1, 1, 5, 7)}, "attn_mask"),
    "transposed attn_mask": ({}, (X, Y, Y), {"attn_mask": torch.zeros(7, 5)}, "attn_mask"),
    "attn_mask of a row": ({}, (X, Y, Y), {"attn_mask": torch.zeros(1, 7)}, "attn_mask"),
    "attn_mask of samples": ({}, (X, Y, Y), {"attn_mask": torch.zeros(3, 5, 7)}, "attn_mask"),
    "attn_mask of one": ({}, (X, Y, Y), {"attn_mask": torch.zeros(1, 5, 7)}, "attn_mask"),
    "unbatched attn_mask": (
        {},
        (X[:, 0], Y[:, 0], Y[:, 0]),
        {"attn_mask": torch.zeros(3, 5, 7)},
        "attn_mask",
    ),
    "rank of padding": ({}, (X, Y, Y), {"key_padding_mask": torch.zeros(7).bool()}, "key_padding_mask"),
    "transposed padding": ({}, (X, Y, Y), {"key_padding_mask": torch.zeros(7, 3).bool()}, "key_padding_mask"),
    "unbatched padding": (
        {},
        (X[:, 0], Y[:, 0], Y[:, 0]),
        {"key_padding_mask": torch.zeros(1, 7).bool()},
        "key_padding_mask",
    ),
    "hint alone": ({}, (X, Y, Y), {"is_causal": True}, "is_causal"),
    "hint with padding": (
        {},
        (X, Y, Y),
        {"is_causal": True, "key_padding_mask": torch.zeros(3, 7).bool()},
        "is_causal",
    ),
    "dtype of query": ({}, (X.double(), Y, Y), {}, None),
    "dtype of key": ({}, (X, Y.half(), Y.half()), {}, None),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("need_weights", [False, True])
def test_errors_are_torchs(name, need_weights):
    """The same type of error, by a text that names the argument."""
    options, inputs, given, match = BAD[name]
    types = []
    for cls in (fusednn.MultiheadAttention, nn.MultiheadAttention):
        with pytest.raises(Exception, match=match if cls is fusednn.MultiheadAttention else None) as caught:
            cls(8, 2, **options)(*inputs, need_weights=need_weights, **given)
        types.append(caught.type)
    assert types[0] is types[1]


def test_mixed_masks_warn_as_torch_does():
    ours, theirs, _ = layers(8, 2)
    for module in (ours, theirs):
        with pytest.warns(UserWarning, match="Support for mismatched key_padding_mask and attn_mask"):
            module(X, Y, Y, torch.zeros(3, 7).bool(), attn_mask=torch.zeros(5, 7))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads: got 3, expected a divisor of num_heads=4"),
        ({"num_kv_heads": 0}, "num_kv_heads: got 0"),
        ({"window": -2}, "window: got -2"),
        ({"window": (1, 2, 3)}, "window: got"),
        ({"softcap": 0.0}, "softcap: got 0.0"),
        ({"rotary": -1.0}, "rotary: got -1.0"),
        ({"rotary": True, "embed_dim": 12}, "rotary: got heads of 3 features"),
    ],
)
def test_errors_of_the_additions(options, match):
    with pytest.raises(ValueError, match=match):
        fusednn.MultiheadAttention(**{"embed_dim": 16, "num_heads": 4, **options})
    with pytest.raises(ValueError, match="greater than 0"):
        fusednn.MultiheadAttention(0, 1)
    with pytest.raises(AssertionError, match="divisible"):
        fusednn.MultiheadAttention(8, 3)


def test_gradients_of_frozen_parts():
    """Nothing is computed for what needs no gradient."""
    ours, *_ = layers(8, 2)
    ours.requires_grad_(False)
    x = torch.randn(5, 3, 8)
    assert not ours(x, x, x)[0].requires_grad
    ours.bias_k, made = None, call("self")
    ours.in_proj_weight.requires_grad_(True)
    found = run(ours.requires_grad_(True), made)
    assert found["gradient of in_proj_weight"].isfinite().all()
