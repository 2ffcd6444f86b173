"""Bad input: torch's type of error, a text that names the argument, and never a crash."""

import math

import pytest
import torch

from fusednn.functional import scaled_dot_product_attention

Q, K, V = torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 7, 8), torch.zeros(2, 4, 7, 3)
EXTRA, EXTRA_V = torch.zeros(4, 1, 8), torch.zeros(4, 1, 3)
SLOPES = torch.ones(4)

BAD = {
    "list for query": (([0.0], K, V), {}, TypeError, "query to be a Tensor, got list"),
    "none for key": ((Q, None, V), {}, TypeError, "key to be a Tensor, got NoneType"),
    "text for value": ((Q, K, "v"), {}, TypeError, "value to be a Tensor, got str"),
    "integer query": ((Q.long(), K, V), {}, RuntimeError, "query to be floating point, got torch.int64"),
    "rank of query": ((Q[0], K, V), {}, RuntimeError, "as many dimensions, at least 2, but key"),
    "rank of value": ((Q, K, V[None]), {}, RuntimeError, "as many dimensions, at least 2, but value"),
    "vector": ((Q[0, 0, 0], K[0, 0, 0], V[0, 0, 0]), {}, RuntimeError, "at least 2, but query"),
    "dtype of key": ((Q, K.half(), V), {}, RuntimeError, "query and key must have the same dtype"),
    "dtype of value": ((Q, K, V.double()), {}, RuntimeError, "query and value must have the same dtype"),
    "device of key": ((Q, K.to("meta"), V), {}, RuntimeError, "key on meta"),
    "device of value": ((Q, K, V.to("meta")), {}, RuntimeError, "value on meta"),
    "size of key": ((Q, K[..., :7], V), {}, RuntimeError, "query and key must have the same last dimension"),
    "length of value": ((Q, K, V[:, :, :6]), {}, RuntimeError, "key and value must have the same length"),
    "heads": (
        (Q, K[:, :2], V[:, :2]), {}, RuntimeError, "4 heads and key 2; expected as many, or enable_gqa",
    ),
    "groups": (
        (Q, K[:, :3], V[:, :3]), {"enable_gqa": True}, RuntimeError, "4 heads and key 3; expected a multiple",
    ),
    "no groups": ((Q, K[:, :0], V[:, :0]), {"enable_gqa": True}, RuntimeError, "4 heads and key 0"),
    "heads of value": (
        (Q, K, V[:, :2]), {"enable_gqa": True}, RuntimeError, "as many heads, but got 4 and 2",
    ),
    "batch": ((Q, K[:1].repeat(3, 1, 1, 1), V), {}, RuntimeError, "batch dimensions of query, key and value"),
    "list for mask": ((Q, K, V, [True]), {}, TypeError, "attn_mask to be a Tensor or None, got list"),
    "shape of mask": ((Q, K, V, torch.ones(7, 5).bool()), {}, RuntimeError, r"attn_mask has shape \[7, 5\]"),
    "batch of mask": ((Q, K, V, torch.ones(3, 1, 5, 7).bool()), {}, RuntimeError, "attn_mask has shape"),
    "rank of mask": ((Q, K, V, torch.ones(1, 2, 4, 5, 7).bool()), {}, RuntimeError, "attn_mask has shape"),
    "integer mask": ((Q, K, V, torch.ones(5, 7).int()), {}, RuntimeError, "attn_mask to be of dtype bool"),
    "wide mask": ((Q, K, V, torch.ones(5, 7).double()), {}, RuntimeError, "attn_mask to be of dtype bool"),
    "device of mask": ((Q, K, V, torch.ones(5, 7, device="meta")), {}, RuntimeError, "attn_mask on meta"),
    "list for padding": (
        (Q, K, V), {"key_padding_mask": [1]}, TypeError, "key_padding_mask to be a Tensor or None, got list",
    ),
    "shape of padding": (
        (Q, K, V), {"key_padding_mask": torch.ones(2, 5).bool()}, RuntimeError,
        r"key_padding_mask has shape \[2, 5\], expected \[2, 7\]",
    ),
    "rank of padding": (
        (Q, K, V), {"key_padding_mask": torch.ones(7).bool()}, RuntimeError, "key_padding_mask has shape",
    ),
    "integer padding": (
        (Q, K, V), {"key_padding_mask": torch.ones(2, 7).int()}, RuntimeError,
        "key_padding_mask to be of dtype",
    ),
    "device of padding": (
        (Q, K, V), {"key_padding_mask": torch.ones(2, 7, device="meta")}, RuntimeError,
        "key_padding_mask on meta",
    ),
    "dropout below": ((Q, K, V), {"dropout_p": -0.1}, ValueError, "dropout_p: got -0.1"),
    "dropout above": ((Q, K, V), {"dropout_p": 1.1}, ValueError, "dropout_p: got 1.1"),
    "dropout NaN": ((Q, K, V), {"dropout_p": math.nan}, ValueError, "dropout_p: got nan"),
    "weights": ((Q, K, V), {"return_weights": "sum"}, ValueError, "return_weights: got 'sum'"),
    "true for weights": ((Q, K, V), {"return_weights": True}, ValueError, "return_weights: got True"),
    "window of three": ((Q, K, V), {"window": (1, 2, 3)}, ValueError, r"window: got \(1, 2, 3\)"),
    "window below": ((Q, K, V), {"window": (-2, 0)}, ValueError, r"window: got \(-2, 0\)"),
    "zero softcap": ((Q, K, V), {"softcap": 0.0}, ValueError, "softcap: got 0.0"),
    "NaN softcap": ((Q, K, V), {"softcap": math.nan}, ValueError, "softcap: got nan"),
    "list for slopes": ((Q, K, V), {"alibi_slopes": [1.0]}, TypeError, "alibi_slopes to be a Tensor or None"),
    "number of slopes": (
        (Q, K, V), {"alibi_slopes": SLOPES[:2]}, RuntimeError, r"alibi_slopes has shape \[2\]",
    ),
    "slopes that learn": (
        (Q, K, V), {"alibi_slopes": SLOPES.clone().requires_grad_()}, RuntimeError,
        "alibi_slopes: got a tensor that",
    ),
    "device of slopes": (
        (Q, K, V), {"alibi_slopes": SLOPES.to("meta")}, RuntimeError, "alibi_slopes has .* on meta",
    ),
    "extra_key alone": ((Q, K, V), {"extra_key": EXTRA}, RuntimeError, "both extra_key and extra_value"),
    "extra_value alone": (
        (Q, K, V), {"extra_value": EXTRA_V}, RuntimeError, "both extra_key and extra_value",
    ),
    "rank of extra_key": (
        (Q, K, V), {"extra_key": EXTRA[0], "extra_value": EXTRA_V}, RuntimeError, "extra_key has shape",
    ),
    "size of extra_key": (
        (Q, K, V), {"extra_key": EXTRA_V, "extra_value": EXTRA_V}, RuntimeError,
        r"extra_key has shape \[4, 1, 3\], expected \[4, 1, 8\]",
    ),
    "columns of extra_value": (
        (Q, K, V), {"extra_key": EXTRA, "extra_value": EXTRA_V.repeat(1, 2, 1)}, RuntimeError,
        r"extra_value has shape \[4, 2, 3\], expected \[4, 1, 3\]",
    ),
    "dtype of extra_value": (
        (Q, K, V), {"extra_key": EXTRA, "extra_value": EXTRA_V.half()}, RuntimeError,
        "query and extra_value must have the same dtype",
    ),
    "text for extra_key": (
        (Q, K, V), {"extra_key": "e", "extra_value": EXTRA_V}, TypeError,
        "extra_key to be a Tensor or None, got str",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_errors(name):
    args, kwargs, error, match = BAD[name]
    with pytest.raises(error, match=f"scaled_dot_product_attention: .*{match}"):
        scaled_dot_product_attention(*args, **kwargs)


def test_good_input_passes():
    """What the bad calls are made of is right otherwise."""
    options = {
        "alibi_slopes": SLOPES, "extra_key": EXTRA, "extra_value": EXTRA_V, "window": (1, None), "softcap": 1,
        "key_padding_mask": torch.ones(2, 7).bool(), "return_weights": "mean", "return_lse": True,
        "dropout_p": 1,
    }  # fmt: skip
    found = scaled_dot_product_attention(Q, K, V, torch.ones(5, 7), **options)
    assert [tuple(t.shape) for t in found] == [(2, 4, 5, 3), (2, 4, 5), (2, 5, 8)]
