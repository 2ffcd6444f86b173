"""MultiheadAttention against torch's, in every combination of options: outputs, weights, gradients."""

import itertools

import pytest
import torch
from torch import nn

import fusednn

from .module_cases import (
    DEVICES,
    DTYPES,
    NO_WEIGHTS,
    SAME,
    WEIGHTS,
    assert_agree,
    assert_equal_in_float64,
    call,
    layers,
    run,
)

MASKS = ("none", "bool", "float")
CONSTRUCTORS = list(itertools.product((False, True), repeat=5))

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("constructor", CONSTRUCTORS, ids=lambda c: "".join(str(int(x)) for x in c))
def test_every_combination(device, constructor):
    """All masks and weights for each layer; which inputs are the same tensor, and batches, take turns.

    In float64, where what is not the same sum shows; rounding in other dtypes is the next test's.
    """
    bias, add_bias_kv, add_zero_attn, batch_first, packed = constructor
    sizes = (8, 8, 8) if packed else (8, 5, 6)
    ours, _, oracle = layers(
        8,
        2,
        dtype=torch.float64,
        bias=bias,
        add_bias_kv=add_bias_kv,
        add_zero_attn=add_zero_attn,
        batch_first=batch_first,
        kdim=sizes[1],
        vdim=sizes[2],
        device=device,
    )
    inputs = itertools.cycle(SAME if packed else ["distinct"])
    batches = itertools.cycle([3, None, 1, 2, None])
    for attn, per_head, padding, weights in itertools.product(MASKS, (False, True), MASKS, WEIGHTS):
        if per_head and attn == "none":
            continue
        made = call(
            next(inputs),
            next(batches),
            sizes=sizes,
            batch_first=batch_first,
            attn_mask=attn,
            key_padding_mask=padding,
            per_head=per_head,
            **WEIGHTS[weights],
        )
        assert_equal_in_float64(ours, oracle, made, (made.inputs, attn, per_head, padding, weights))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("inputs", SAME)
def test_dtypes_and_lengths(device, dtype, weights, inputs):
    ours, theirs, oracle = layers(48, 3, batch_first=True, device=device, dtype=dtype)
    # One key alone is for float64: its score's gradient is 0, the difference of two equal sums.
    short = (1, 1) if dtype == torch.float64 else (2, 2)
    row = 2 if inputs in ("self", "positions") else 1
    for length, keys, attn, padding in (
        (*short, "none", "none"),
        (row, 33, "bool", "bool"),
        (40, 17, "float", "none"),
        (33, 64, "none", "float"),
    ):
        made = call(inputs, 8, length, keys, (48,) * 3, 3, True, attn, padding, **WEIGHTS[weights])
        assert_agree(ours, theirs, oracle, made, (length, keys))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("batch", [2, None])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_causal_hint(batch_first, batch, weights, padding, kind):
    ours, _, oracle = layers(8, 2, batch_first=batch_first, dtype=torch.float64)
    made = call(
        "self", batch, batch_first=batch_first, key_padding_mask=padding, is_causal=True, **WEIGHTS[weights]
    )
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    if kind == "float":
        mask = torch.zeros(5, 5, dtype=torch.float64).masked_fill(mask, float("-inf"))
    made.tensors["attn_mask"] = mask
    assert_equal_in_float64(ours, oracle, made)


def test_causal_hint_is_taken_where_torch_takes_it():
    """A wrong hint shows where the mask is read: where there is other use for it."""
    ours, _, oracle = layers(8, 2, dtype=torch.float64)
    for padding, weights in itertools.product(MASKS, WEIGHTS):
        made = call("self", attn_mask="bool", key_padding_mask=padding, is_causal=True, **WEIGHTS[weights])
        assert_equal_in_float64(ours, oracle, made, (padding, weights))
        unhinted = call("self", attn_mask="bool", key_padding_mask=padding, **WEIGHTS[weights])
        same = torch.equal(run(ours, made)["output"], run(ours, unhinted)["output"])
        assert same == (padding != "none" or weights != "none")


@pytest.mark.parametrize("extra", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_causal_hint_leaves_added_columns_visible(extra):
    """Torch hides them, but only without weights; here the hint changes nothing."""
    ours, *_ = layers(8, 2, **extra)
    made = call("self", **NO_WEIGHTS)
    made.tensors["attn_mask"] = torch.ones(5, 5, dtype=torch.bool).triu(1)
    expected = run(ours, made)
    made.options["is_causal"] = True
    actual = run(ours, made)
    made.options["need_weights"] = True
    assert torch.equal(actual["output"], expected["output"])
    torch.testing.assert_close(run(ours, made)["output"], expected["output"])


@pytest.mark.parametrize("batch_first", [False, True])
def test_training_and_inference_are_the_same(batch_first):
    ours, *_ = layers(8, 2, batch_first=batch_first, dropout=0.0)
    made = call("self", batch_first=batch_first, key_padding_mask="bool", **WEIGHTS["mean"])
    expected = run(ours, made)
    x, mask = made.tensors["query"].float(), made.tensors["key_padding_mask"]
    with torch.no_grad():
        output, weights = ours.eval()(x, x, x, mask)
    assert torch.equal(output, expected["output"])
    assert torch.equal(weights, expected["weights"])


@pytest.mark.parametrize("batch_first", [False, True])
def test_against_torchs_fast_path(batch_first):
    """In inference torch takes another way, which must agree as well."""
    ours, theirs, _ = layers(8, 2, batch_first=batch_first)
    x = torch.randn(4, 4, 8)
    padding = torch.zeros(4, 4, dtype=torch.bool)
    padding[1, 2:] = True
    ours.eval(), theirs.eval()
    with torch.no_grad():
        for given in ({}, {"key_padding_mask": padding}, {"attn_mask": torch.ones(4, 4).triu(1).bool()}):
            for weights in WEIGHTS.values():
                actual, expected = (m(x, x, x, **given, **weights) for m in (ours, theirs))
                torch.testing.assert_close(actual[0], expected[0])
                if weights is not NO_WEIGHTS:
                    torch.testing.assert_close(actual[1], expected[1])


@pytest.mark.parametrize("shape", [(0, 3, 3), (3, 0, 3), (3, 3, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_nothing_in_a_dimension(shape, batch_first, need_weights):
    """Without keys the output is the projection of zeros."""
    batch, length, keys = shape
    ours, theirs, _ = layers(8, 2, batch_first=batch_first)
    lead = [(batch, n) if batch_first else (n, batch) for n in (length, keys, keys)]
    query, key, value = (torch.randn(*rows, 8, requires_grad=True) for rows in lead)
    output, weights = ours(query, key, value, need_weights=need_weights)
    assert output.shape == query.shape
    if keys == 0:
        assert torch.equal(output, theirs.out_proj.bias.expand_as(output))
    if need_weights:
        assert weights.shape == shape
    output.sum().backward()
    assert all(t.grad is not None and not t.grad.any() for t in (key, value) if 0 in (length, batch))


@pytest.mark.parametrize("batch_first", [False, True])
def test_memory(batch_first):
    """The output is contiguous, and nothing between the projections is copied where the batch comes first."""
    ours, *_ = layers(64, 4, batch_first=batch_first)
    x, y = torch.randn(2, 9, 10, 64)  # more rows than a step of decoding has
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket._qualified_op_name)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        output, _ = ours(x, x, x, need_weights=False)
        in_self = len(seen)
        ours(x, y, y, need_weights=False)
    assert output.is_contiguous()
    products = [name for name in seen if name in ("aten::addmm", "fusednn::projection_forward")]
    assert len(products) == 2 + 3  # one for each input, and one for the output
    copies = {"aten::clone", "aten::copy_", "aten::cat", "aten::_to_copy", "aten::contiguous"}
    for ops in (seen[:in_self], seen[in_self:]):
        assert sum(name in copies for name in ops) == (0 if batch_first else 1), ops


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("how", ["transposed", "expanded", "strided"])
def test_inputs_of_any_strides(batch_first, how):
    ours, theirs, _ = layers(8, 2, batch_first=batch_first)
    x = {
        "transposed": torch.randn(5, 3, 8).transpose(0, 1),
        "expanded": torch.randn(3, 1, 8).expand(3, 5, 8),
        "strided": torch.randn(3, 5, 16)[..., ::2],
    }[how]
    mask = torch.rand(1, 5, 5).expand(6 if batch_first else 10, 5, 5)
    length = 5 if batch_first else 3
    mask = (mask[:, :length, :length] > 0.9).clone()[:1].expand(-1, length, length)
    mask = mask.expand((3 if batch_first else 5) * 2, length, length)
    for kwargs in ({}, {"attn_mask": mask}):
        actual, expected = (m(x, x, x, **kwargs) for m in (ours, theirs))
        torch.testing.assert_close(actual[0], expected[0])
        torch.testing.assert_close(actual[1], expected[1])


def test_explain_names_the_op():
    ours, *_ = layers(8, 2)
    x = torch.randn(3, 2, 8)
    assert "attention_forward" in [e.operation for e in fusednn.explain(ours, x, x, x)]


def test_inside_torchs_decoder_layer():
    torch.manual_seed(0)
    theirs = nn.TransformerDecoderLayer(16, 4, 32, dropout=0.0, batch_first=True).eval()
    target, memory = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    masks = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(5),
        "memory_key_padding_mask": torch.tensor([[False] * 7, [False] * 3 + [True] * 4]),
        "tgt_is_causal": True,
    }
    expected = theirs(target, memory, **masks)
    report = fusednn.replace_layers(theirs)
    assert len(report.changed) == 2
    torch.testing.assert_close(theirs(target, memory, **masks), expected)
