"""Nested tensors: each sequence as if it were alone."""

import pytest
import torch
from torch import nn

import fusednn

from .module_cases import DEVICES, WEIGHTS, layers, random

LAYOUTS = [torch.strided, torch.jagged]
LENGTHS = (3, 1, 0, 5)
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


def sequences(lengths=LENGTHS, features=8, seed=0, device="cpu", dtype=torch.float32):
    return [random(n, features, seed=(seed, i), dtype=dtype).to(device) for i, n in enumerate(lengths)]


def nested(rows, layout):
    return torch.nested.as_nested_tensor(rows, layout=layout)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"num_kv_heads": 1}, {"rotary": True}, {"window": 1, "alibi": True}],
    ids=str,
)
def test_self_attention(device, layout, weights, options):
    ours = fusednn.MultiheadAttention(8, 2, batch_first=True, device=device, **options)
    rows = [t.requires_grad_() for t in sequences(device=device)]
    x = nested(rows, layout)
    output, found = ours(x, x, x, **WEIGHTS[weights])
    assert (output.is_nested, output.layout, output.dim()) == (True, layout, 3)
    parts, alone = output.unbind(), [ours(r, r, r, **WEIGHTS[weights]) for r in rows]
    for actual, (expected, _) in zip(parts, alone, strict=True):
        torch.testing.assert_close(actual, expected)
    loss, expected_loss = sum(p.square().sum() for p in parts), sum(o.square().sum() for o, _ in alone)
    if weights != "none":
        assert found.shape == ((4, 5, 5) if weights == "mean" else (4, 2, 5, 5))
        for n, (_, expected) in enumerate(alone):
            inside = found[n, ..., : LENGTHS[n], : LENGTHS[n]]
            torch.testing.assert_close(inside, expected)
            assert found[n].count_nonzero() == inside.count_nonzero()
        loss, expected_loss = (
            loss + found.square().sum(),
            expected_loss + sum(w.square().sum() for _, w in alone),
        )
    wanted = [*rows, *ours.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(loss, wanted), torch.autograd.grad(expected_loss, wanted), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("weights", WEIGHTS)
def test_against_torchs_fast_path(weights):
    ours, theirs, _ = layers(8, 2, batch_first=True)
    x = nested(sequences((3, 4, 5)), torch.strided)
    with torch.no_grad():
        actual, expected = (m.eval()(x, x, x, **WEIGHTS[weights]) for m in (ours, theirs))
    for a, b in zip(actual[0].unbind(), expected[0].unbind(), strict=True):
        torch.testing.assert_close(a, b)
    if weights != "none":  # torch's rows beyond a sequence's end are not defined
        for n, length in enumerate((3, 4, 5)):
            torch.testing.assert_close(actual[1][n, ..., :length, :], expected[1][n, ..., :length, :])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("need_weights", [False, True])
def test_cross_attention(layout, need_weights):
    ours = fusednn.MultiheadAttention(8, 2, batch_first=True, kdim=5, vdim=6)
    queries, keys = sequences(), sequences((2, 0, 4, 1), 5, seed=1)
    values = sequences((2, 0, 4, 1), 6, seed=2)
    q, k, v = (nested(t, layout) for t in (queries, keys, values))
    output, _ = ours(q, k, v, need_weights=need_weights)
    for actual, *alone in zip(output.unbind(), queries, keys, values, strict=True):
        torch.testing.assert_close(actual, ours(*alone)[0])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_result_goes_on_with_the_input(layout):
    """Lengths of the output are those of the input, for layers after it."""
    ours, *_ = layers(8, 2, batch_first=True)
    x = nested(sequences((3, 1, 5)), layout)
    with torch.no_grad():
        output, _ = ours.eval()(x, x, x, need_weights=False)
        norm = nn.LayerNorm(8)
        total = norm(x + output)
    assert [t.shape for t in total.unbind()] == [(3, 8), (1, 8), (5, 8)]


def test_views_and_odd_memory():
    """Sequences that don't lie one after the other."""
    ours, *_ = layers(8, 2, batch_first=True)
    rows = sequences((3, 1, 5))
    x = nested([r.T.contiguous() for r in rows], torch.strided).transpose(1, 2)
    assert not x.is_contiguous()
    with torch.no_grad():
        output, _ = ours(x, x, x, need_weights=False)
        for actual, r in zip(output.unbind(), rows, strict=True):
            torch.testing.assert_close(actual, ours(r, r, r)[0])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_dropout_and_autocast(layout):
    ours = fusednn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
    x = nested(sequences((3, 1, 5)), layout)
    assert not torch.equal(*(ours(x, x, x, need_weights=False)[0].to_padded_tensor(0.0) for _ in range(2)))
    ours.eval()
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = ours(x, x, x, need_weights=False)
    assert output.dtype == torch.bfloat16
    expected = ours(x, x, x, need_weights=False)[0].to_padded_tensor(0.0)
    torch.testing.assert_close(output.to_padded_tensor(0.0).float(), expected, rtol=0.05, atol=0.05)


def test_compile():
    torch._dynamo.reset()
    ours = fusednn.MultiheadAttention(8, 2, batch_first=True).eval()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    x = nested(sequences((3, 1, 5)), torch.jagged)
    with torch.no_grad():
        actual, expected = (m(x, x, x, need_weights=False)[0] for m in (compiled, ours))
    torch.testing.assert_close(actual.to_padded_tensor(0.0), expected.to_padded_tensor(0.0))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_errors(layout):
    """What torch refuses with nested tensors, by its type of error."""
    x = nested(sequences(), layout)
    ours = fusednn.MultiheadAttention(8, 2, batch_first=True)
    with pytest.raises(AssertionError, match="key: got a tensor that is not nested"):
        ours(x, torch.zeros(4, 5, 8), torch.zeros(4, 5, 8))
    with pytest.raises(AssertionError, match=r"query: got a tensor that is not nested|key: got"):
        ours(torch.zeros(4, 5, 8), x, x)
    with pytest.raises(AssertionError, match="key_padding_mask"):
        ours(x, x, x, torch.zeros(4, 5).bool())
    with pytest.raises(AssertionError, match="attn_mask"):
        ours(x, x, x, attn_mask=torch.zeros(5, 5))
    with pytest.raises(AssertionError, match="is_causal"):
        ours(x, x, x, is_causal=True)
    with pytest.raises(AssertionError, match="batch_first"):
        fusednn.MultiheadAttention(8, 2)(x, x, x)
    with pytest.raises(AssertionError, match="add_bias_kv"):
        fusednn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True)(x, x, x)
    with pytest.raises(AssertionError, match="value"):
        ours(x, x, nested(sequences((3, 1, 0, 6)), layout))
    with pytest.raises(AssertionError, match="value"):
        ours(x, x, nested(sequences((3, 1, 1, 4)), layout))
    narrow, heads = (nested([torch.zeros(n, *size) for n in (3, 1)], layout) for size in ((6,), (2, 4)))
    with pytest.raises(AssertionError, match="query has 6 features"):
        ours(narrow, narrow, narrow)
    with pytest.raises(RuntimeError, match="3-D"):
        ours(heads, heads, heads)
