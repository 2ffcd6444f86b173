"""scaled_dot_product_attention as torch's: shapes, masks, defaults; and what it has more."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusednn
from fusednn.functional import scaled_dot_product_attention

from .cases import DTYPES


def normal(*size: int, device: str = "cpu", seed: int = 0) -> Tensor:
    """Seeded normal numbers."""
    generator = torch.Generator().manual_seed(sum(size) + seed)
    return torch.randn(size, generator=generator).to(device)


def test_signature_is_torchs_and_more_by_keyword():
    documented = [
        *((name, inspect.Parameter.empty) for name in ("query", "key", "value")),
        ("attn_mask", None),
        ("dropout_p", 0.0),
        ("is_causal", False),
        ("scale", None),
        ("enable_gqa", False),
    ]
    parameters = list(inspect.signature(scaled_dot_product_attention).parameters.values())
    assert [(p.name, p.default) for p in parameters[: len(documented)]] == documented
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[len(documented) :])


SHAPES = {
    "2-D": ((5, 8), (7, 8), (7, 3)),
    "3-D": ((4, 5, 8), (4, 7, 8), (4, 7, 3)),
    "4-D": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 3)),
    "5-D": ((3, 2, 4, 5, 8), (3, 2, 4, 7, 8), (3, 2, 4, 7, 3)),
    "one key for all": ((3, 4, 5, 8), (1, 4, 7, 8), (1, 4, 7, 3)),
    "one query for all": ((1, 4, 5, 8), (3, 4, 7, 8), (1, 4, 7, 3)),
    "5-D broadcast": ((3, 1, 4, 5, 8), (1, 2, 4, 7, 8), (3, 2, 4, 7, 3)),
    "6-D": ((2, 1, 2, 1, 5, 8), (2, 1, 2, 1, 7, 8), (2, 1, 2, 1, 7, 3)),
    "no samples": ((0, 4, 5, 8), (0, 4, 7, 8), (0, 4, 7, 3)),
}


@pytest.mark.in_turn("case")
@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_shapes_as_torchs(place, case, causal):
    q, k, v = (normal(*shape, device=place.device, seed=i) for i, shape in enumerate(SHAPES[case]))
    found = scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, is_causal=causal))
    options = {"return_lse": True, "is_causal": causal}
    for weights in ("mean", "heads"):
        output, lse, w = scaled_dot_product_attention(q, k, v, return_weights=weights, **options)
        torch.testing.assert_close(output, found)
        s = q @ k.mT / math.sqrt(8)
        if causal:
            s = s.masked_fill(torch.ones(5, 7, device=q.device).tril() == 0, -torch.inf)
        p = s.softmax(-1)
        torch.testing.assert_close(lse, s.logsumexp(-1))
        torch.testing.assert_close(w, p.mean(-3) if weights == "mean" and q.dim() > 2 else p)


MASKS = {
    "4-D": [
        (5, 7), (1, 7), (5, 1), (7,), (), (4, 5, 7), (4, 1, 1), (2, 4, 5, 7), (2, 1, 5, 7), (1, 1, 1, 7),
        (2, 4, 1, 1),
    ],
    "3-D": [(5, 7), (4, 5, 7), (4, 1, 7), (1, 5, 1)],
    "2-D": [(5, 7), (7,), (1, 1)],
    "5-D": [(5, 7), (2, 1, 5, 7), (3, 1, 1, 5, 7), (3, 2, 4, 5, 7), (1, 2, 4, 1, 7)],
}  # fmt: skip


@pytest.mark.in_turn("case")
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("case", MASKS)
def test_masks_as_torchs(place, case, kind):
    q, k, v = (normal(*shape, device=place.device, seed=i) for i, shape in enumerate(SHAPES[case]))
    for shape in MASKS[case][:: 3 if place.slow else 1]:
        mask = normal(*shape, device=place.device)
        mask = mask if kind == "float" else mask.add(1) > 0
        if kind == "bool" and mask.dim():
            mask[..., 0] = True  # torch has NaN where nothing is seen
        if not mask.dim() and kind == "bool":
            mask = torch.ones_like(mask)
        theirs = mask.expand(5, 7) if mask.dim() < 2 else mask
        expected = F.scaled_dot_product_attention(q, k, v, theirs)
        found = scaled_dot_product_attention(q, k, v, mask)
        torch.testing.assert_close(found, expected, msg=lambda m, s=shape: f"{s}: {m}")


def test_gradients_of_masks_as_torchs(training_place):
    """Of every shape, reduced over what was broadcast."""
    q, k, v = (normal(*shape, device=training_place.device, seed=i) for i, shape in enumerate(SHAPES["4-D"]))
    for shape in [(5, 7), (1, 7), (4, 1, 1), (2, 1, 5, 7)]:
        mask = normal(*shape, device=training_place.device).requires_grad_()
        results = (f(q, k, v, mask) for f in (scaled_dot_product_attention, F.scaled_dot_product_attention))
        found, expected = (torch.autograd.grad(r.square().sum(), mask) for r in results)
        torch.testing.assert_close(found, expected, msg=lambda m, s=shape: f"{s}: {m}")


def test_a_float32_mask_of_half_queries(place):
    q, k, v = (normal(*shape, device=place.device).bfloat16() for shape in SHAPES["4-D"])
    mask = normal(5, 7, device=place.device)
    found = scaled_dot_product_attention(q, k, v, mask)
    assert found.equal(scaled_dot_product_attention(q, k, v, mask.bfloat16()))


def test_a_mask_and_causal_both_apply(place):
    """Where torch raises."""
    q, k, v = (normal(*shape, device=place.device) for shape in SHAPES["4-D"])
    mask = normal(5, 7, device=place.device)
    lower = torch.ones(5, 7, device=place.device).tril() == 0
    found = scaled_dot_product_attention(q, k, v, mask, is_causal=True)
    expected = F.scaled_dot_product_attention(q, k, v, mask.masked_fill(lower, -torch.inf))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_padding_as_in_the_module(place, kind):
    """True is padding, as in nn.MultiheadAttention; a float is added."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, batch_first=True).to(place.device)
    x = normal(3, 6, 8, device=place.device)
    padding = torch.tensor(
        [[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 1]], device=place.device
    ).bool()
    if kind == "float":
        padding = normal(3, 6, device=place.device).masked_fill(padding, -torch.inf)
    expected, weights = module(x, x, x, key_padding_mask=padding)
    q, k, v = (
        t.unflatten(2, (2, 4)).transpose(1, 2)
        for t in F.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, 2)
    )
    output, found = scaled_dot_product_attention(q, k, v, key_padding_mask=padding, return_weights="mean")
    torch.testing.assert_close(module.out_proj(output.transpose(1, 2).flatten(2)), expected)
    torch.testing.assert_close(found, weights)


def test_padding_of_fewer_and_more_dimensions(place):
    for case, batch in (("2-D", 1), ("3-D", 1), ("5-D", 6)):
        q, k, v = (normal(*shape, device=place.device, seed=i) for i, shape in enumerate(SHAPES[case]))
        padding = torch.arange(7, device=place.device).expand(batch, 7) % 3 == 1
        found = scaled_dot_product_attention(q, k, v, key_padding_mask=padding)
        torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, ~padding[:1].expand(5, 7)))


WINDOWS = {
    "number": (2, lambda far: far.abs() <= 2),
    "pair": ((3, 1), lambda far: (far >= -3) & (far <= 1)),
    "list": ([0, 4], lambda far: (far >= 0) & (far <= 4)),
    "left": ((1, None), lambda far: far >= -1),
    "right": ((-1, 2), lambda far: far <= 2),
    "none": ((None, -1), lambda far: far == far),
}


@pytest.mark.in_turn("case")
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("case", WINDOWS)
def test_windows(place, case, offset, causal):
    window, rule = WINDOWS[case]
    q, k, v = (normal(*shape, device=place.device) for shape in SHAPES["4-D"])
    far = torch.arange(7, device=place.device) - torch.arange(5, device=place.device)[:, None] - offset
    seen = rule(far) & (far <= 0) if causal else rule(far)
    found = scaled_dot_product_attention(q, k, v, window=window, position_offset=offset, is_causal=causal)
    rows = seen.any(1)
    expected = F.scaled_dot_product_attention(q, k, v, seen | ~rows[:, None])
    torch.testing.assert_close(found, expected * rows[:, None])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_in_order(place, dtype):
    q, k, v = (normal(*shape, device=place.device).to(dtype) for shape in SHAPES["4-D"])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for lse in (False, True):
        for weights in (None, "mean", "heads"):
            found = scaled_dot_product_attention(q, k, v, return_lse=lse, return_weights=weights)
            expected = [((2, 4, 5, 3), dtype)] + [((2, 4, 5), wide)] * lse
            expected += {None: [], "mean": [((2, 5, 7), dtype)], "heads": [((2, 4, 5, 7), dtype)]}[weights]
            if len(expected) == 1:
                assert isinstance(found, Tensor)
                found = (found,)
            assert [(tuple(t.shape), t.dtype) for t in found] == expected


def test_scale_groups_and_slopes(place):
    q, k, v = (normal(*shape, device=place.device) for shape in ((2, 6, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4)))
    options = {"scale": 0.1, "enable_gqa": True}
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, **options), expected)
    slopes = torch.arange(1, 7, device=place.device) / 3
    far = (torch.arange(7, device=q.device) - torch.arange(5, device=q.device)[:, None] - 2).abs()
    bias = -slopes[:, None, None] * far
    found = scaled_dot_product_attention(q, k, v, alibi_slopes=slopes.double(), position_offset=2, **options)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, bias, **options))


def test_extra_columns_are_keys_for_all(place):
    q, k, v = (normal(*shape, device=place.device) for shape in SHAPES["4-D"])
    extra = normal(4, 2, 8, device=place.device), normal(4, 2, 3, device=place.device)
    found = scaled_dot_product_attention(q, k, v, is_causal=True, extra_key=extra[0], extra_value=extra[1])
    k, v = (torch.cat([t, e.expand(2, -1, -1, -1)], 2) for t, e in zip((k, v), extra))
    seen = torch.cat([torch.ones(5, 7).tril(), torch.ones(5, 2)], 1).bool().to(place.device)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, seen))


def test_decoding_step_by_step(place):
    """Row by row against a cache, each at its offset: as all rows at once."""
    q, k, v = (normal(2, 2, 6, 8, device=place.device, seed=i) for i in range(3))
    expected = scaled_dot_product_attention(q, k, v, is_causal=True, window=(3, None))
    for i in range(6):
        one = scaled_dot_product_attention(
            q[:, :, i : i + 1], k, v, is_causal=True, window=(3, None), position_offset=i
        )
        torch.testing.assert_close(one, expected[:, :, i : i + 1])


def test_parts_of_the_keys_combine_by_lse(place):
    """What lse is for."""
    q, k, v = (normal(2, 4, n, 8, device=place.device) for n in (5, 9, 9))
    parts = [
        scaled_dot_product_attention(q, k[:, :, s], v[:, :, s], return_lse=True)
        for s in (slice(4), slice(4, 9))
    ]
    share = torch.stack([lse for _, lse in parts]).softmax(0)[..., None]
    found = share[0] * parts[0][0] + share[1] * parts[1][0]
    torch.testing.assert_close(found, scaled_dot_product_attention(q, k, v))


def test_explain_tells_the_backend(place):
    q, k, v = (normal(*shape, device=place.device) for shape in SHAPES["4-D"])
    (told,) = fusednn.explain(scaled_dot_product_attention, q, k, v, return_weights="mean")
    assert told.operation == "attention_forward"
    assert told.backend == told.requested == place.backend
    others = {"cpu", "cuda", "triton", "torch", "reference"} - {place.backend}
    assert set(told.passed_over) == others
    assert all(told.passed_over[name] for name in others)
    assert f"attention_forward: {place.backend}" in str(told)


def test_explain_of_a_backend_that_cannot_serve():
    q = torch.zeros(1, 1, 2, 2, dtype=torch.float8_e4m3fn)
    rest = (*[None] * 8, 0, 0, 1.0, -1, -1, 0, 0.0, 0.0, "none")
    with fusednn.use_backend("cpu"):
        (told,) = fusednn.explain(torch.ops.fusednn.attention_forward, q, q, q, *rest)
        with pytest.raises(RuntimeError, match="attention_forward: backend 'cpu' can't serve this call"):
            torch.ops.fusednn.attention_forward(q, q, q, *rest)
    assert told.backend is None
    assert told.passed_over["cpu"]


def test_steps_of_decoding_are_torchs():
    """One row with many keys, in inference: measured to be faster, and said so; whatever else is ours."""
    q, k = torch.randn(2, 3, 1, 8), torch.randn(2, 3, 40, 8)
    said = fusednn.explain(scaled_dot_product_attention, q, k, k)
    assert said[0].backend == "torch"
    assert "1 query rows" in said[0].passed_over["cpu"][0]
    assert torch.equal(scaled_dot_product_attention(q, k, k), F.scaled_dot_product_attention(q, k, k))
    kept = torch.ones(2, 40, dtype=torch.bool)
    for call in (
        lambda: scaled_dot_product_attention(q, k, k, key_padding_mask=~kept),
        lambda: scaled_dot_product_attention(q.requires_grad_(), k, k),
        lambda: scaled_dot_product_attention(k, k, k),
    ):
        assert fusednn.explain(call)[0].backend != "torch"


def test_torchs_attention_by_name():
    """It serves with torch's gradients, or says what it has not."""
    q, k = torch.randn(2, 3, 20, 8, requires_grad=True), torch.randn(2, 3, 40, 8)
    with fusednn.use_backend("torch"):
        found = scaled_dot_product_attention(q, k, k, is_causal=True)
        for options, reason in (
            ({"window": 3}, "got a window"),
            ({"attn_mask": torch.ones(20, 40)}, "got mask, expected None"),
            ({"return_lse": True}, "torch's op has no lse and no weights"),
        ):
            with pytest.raises(RuntimeError, match=f"backend 'torch' can't serve this call:\n  - {reason}"):
                scaled_dot_product_attention(q, k, k, **options)
    expected = F.scaled_dot_product_attention(q, k, k, is_causal=True)
    assert torch.equal(found, expected)
    grads = (torch.autograd.grad(t.square().sum(), q)[0] for t in (found, expected))
    assert torch.equal(*grads)


def test_layers_keep_their_bits_in_inference():
    """Few rows of a layer are ours in training and inference."""
    layer = fusednn.MultiheadAttention(16, 2, batch_first=True)
    query, key = torch.randn(2, 1, 16), torch.randn(2, 40, 16)
    trained, _ = layer(query, key, key, need_weights=False)
    with torch.no_grad():
        inferred, _ = layer.eval()(query, key, key, need_weights=False)
    assert torch.equal(trained, inferred)
