"""Bad input: torch's type of error, a text that names the argument, and never a crash."""

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import fusednn
from fusednn.functional import attention_lstm, spatial_attention, spatial_softmax

X, W, TERM = torch.zeros(2, 3, 4, 5), torch.zeros(1, 3), torch.zeros(2, 1, 20)
W_A, TERM_A, V = torch.zeros(6, 3), torch.zeros(2, 6), torch.zeros(1, 6)

BAD = {
    "rank of features": ((X[0], W), {}, RuntimeError, "features to be 4D"),
    "no tensor": (("x", W), {}, TypeError, "features to be a Tensor, got str"),
    "integer features": ((X.long(), W), {}, RuntimeError, "features to be floating point"),
    "no positions": ((X[:, :, :0], W), {}, RuntimeError, "features to have positions"),
    "channels": (
        (X, torch.zeros(1, 4)),
        {},
        RuntimeError,
        r"weight has shape \[1, 4\], expected \[rows, 3\]",
    ),
    "rank of weight": ((X, torch.zeros(3)), {}, RuntimeError, "weight has shape"),
    "no maps": ((X, W[:0]), {}, RuntimeError, "weight has shape"),
    "list for weight": ((X, [0.0]), {}, TypeError, "weight to be a Tensor, got list"),
    "positions of hidden_term": ((X, W, TERM[..., 1:]), {}, RuntimeError, "hidden_term has shape"),
    "batch of hidden_term": ((X, W, TERM[:1]), {}, RuntimeError, "hidden_term has shape"),
    "rows of hidden_term": ((X, W_A, TERM_A[:, 1:], V), {}, RuntimeError, "hidden_term has shape"),
    "rows of v": ((X, W_A, TERM_A, V[:, 1:]), {}, RuntimeError, "v has shape"),
    "number for v": ((X, W_A, TERM_A, 1.0), {}, TypeError, "v to be a Tensor or None"),
    "dtype of weight": ((X, W.double()), {}, RuntimeError, "features and weight must have the same dtype"),
    "dtype of term": ((X, W, TERM.half()), {}, RuntimeError, "hidden_term must have the same dtype"),
    "device of weight": ((X, W.to("meta")), {}, RuntimeError, "weight on meta"),
    "output": ((X, W), {"output": "mean"}, ValueError, "output: got 'mean'"),
    "zero temperature": ((X, W), {"temperature": 0.0}, ValueError, "temperature: got 0.0"),
    "NaN temperature": ((X, W), {"temperature": float("nan")}, ValueError, "temperature: got nan"),
    "two temperatures": ((X, W), {"temperature": torch.ones(2)}, RuntimeError, "temperature to hold one"),
    "integer temperature": (
        (X, W),
        {"temperature": torch.tensor(1)},
        RuntimeError,
        "temperature to hold one",
    ),
    "text for temperature": ((X, W), {"temperature": "1"}, TypeError, "temperature to be a number"),
    "float mask": ((X, W), {"mask": torch.ones(4, 5)}, RuntimeError, "mask to be of dtype bool"),
    "shape of mask": ((X, W), {"mask": torch.ones(5, 4).bool()}, RuntimeError, "mask has shape"),
    "maps of mask": ((X, W), {"mask": torch.ones(2, 2, 4, 5).bool()}, RuntimeError, "mask has shape"),
    "device of mask": (
        (X, W),
        {"mask": torch.ones(4, 5, device="meta").bool()},
        RuntimeError,
        "mask on meta",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_attention(name):
    args, kwargs, error, match = BAD[name]
    with pytest.raises(error, match=match):
        spatial_attention(*args, **kwargs)


@pytest.mark.parametrize(
    ("logits", "options", "error", "match"),
    [
        (X[0], {}, RuntimeError, "logits to be 4D"),
        (X.int(), {}, RuntimeError, "logits to be floating point"),
        (X[..., :0], {}, RuntimeError, "logits to have positions"),
        (X, {"mask": torch.ones(7).bool()}, RuntimeError, "mask has shape"),
        (X, {"temperature": -1.0}, ValueError, "temperature: got -1.0"),
    ],
)
def test_softmax(logits, options, error, match):
    with pytest.raises(error, match=match):
        spatial_softmax(logits, **options)


@pytest.mark.parametrize(
    ("args", "options", "match"),
    [
        ((3, 4, 5, 5), {"score": "dot"}, "score: got 'dot'"),
        ((3, 4, 5, 5), {"output": "max"}, "output: got 'max'"),
        ((3, 4, 5, None), {}, "width: got None"),
        ((0, 4, 5, 5), {}, "in_channels: got 0"),
        ((3, -1, 5, 5), {}, "hidden_size: got -1"),
        ((3, 4, 5, 5), {"glimpses": 0}, "glimpses: got 0"),
        ((3, 4, 5, 5), {"temperature": 0}, "temperature: got 0"),
        ((3, 4, 5, 5), {"score": "additive", "attention_size": 0}, "attention_size: got 0"),
    ],
)
def test_constructor(args, options, match):
    with pytest.raises(ValueError, match=match):
        fusednn.SpatialAttention(*args, **options)


def test_module():
    module = fusednn.SpatialAttention(3, 6, 4, 5)
    with pytest.raises(RuntimeError, match=r"expected images of \[4, 5\]"):
        module(X.transpose(2, 3), torch.zeros(2, 6))
    with pytest.raises(RuntimeError, match="hidden has shape"):
        module(X, torch.zeros(2, 7))
    with pytest.raises(TypeError, match="hidden to be a Tensor"):
        module(X, (torch.zeros(2, 6),))
    with pytest.raises(RuntimeError, match="expected None for hidden_size=0"):
        fusednn.SpatialAttention(3, 0, 4, 5)(X, torch.zeros(2, 6))


FRAMES, H = torch.zeros(2, 4, 3, 2, 2), torch.zeros(2, 5)
WEIGHTS = (torch.zeros(1, 3), torch.zeros(4, 5), torch.zeros(20, 12), torch.zeros(20, 5))


def swapped(index: int, value) -> tuple:
    return (*WEIGHTS[:index], value, *WEIGHTS[index + 1 :])


RECURRENCES = {
    "rank of features": ((FRAMES[0], (H, H), *WEIGHTS), {}, RuntimeError, "features to be 5D"),
    "no steps": ((FRAMES[:, :0], (H, H), *WEIGHTS), {}, RuntimeError, "sequence length to be larger than 0"),
    "one state": ((FRAMES, (H,), *WEIGHTS), {}, RuntimeError, r"hx: got 1 states, expected \(h, c\)"),
    "no state": ((FRAMES, None, *WEIGHTS), {}, TypeError, "hx to be a pair"),
    "batch of h": ((FRAMES, (H[:1], H), *WEIGHTS), {}, RuntimeError, "hidden state has shape"),
    "size of c": ((FRAMES, (H, H[:, :4]), *WEIGHTS), {}, RuntimeError, "cell state has shape"),
    "dtype of c": (
        (FRAMES, (H, H.double()), *WEIGHTS),
        {},
        RuntimeError,
        "cell state must have the same dtype",
    ),
    "score": ((FRAMES, (H, H), *swapped(0, torch.zeros(2, 3))), {}, RuntimeError, "score_weight has shape"),
    "positions": (
        (FRAMES, (H, H), *swapped(1, torch.zeros(5, 5))),
        {},
        RuntimeError,
        "hidden_weight has shape",
    ),
    "inputs": ((FRAMES, (H, H), *WEIGHTS), {"output": "sum"}, RuntimeError, "weight_ih has shape"),
    "gates": (
        (FRAMES, H, *WEIGHTS),
        {},
        RuntimeError,
        r"weight_ih has shape \[20, 12\], expected \[15, 12\]",
    ),
    "rank of weight_hh": (
        (FRAMES, (H, H), *swapped(3, torch.zeros(20))),
        {},
        RuntimeError,
        "weight_hh to be 2D",
    ),
    "bias": ((FRAMES, (H, H), *WEIGHTS, torch.zeros(3)), {}, RuntimeError, "hidden_bias has shape"),
    "rows of v": ((FRAMES, (H, H), *WEIGHTS), {"v": torch.zeros(1, 2)}, RuntimeError, "has shape"),
    "output": ((FRAMES, (H, H), *WEIGHTS), {"output": "scale"}, ValueError, "output: got 'scale'"),
    "form": ((FRAMES, (H, H), *WEIGHTS), {"form": "fast"}, ValueError, "form: got 'fast'"),
    "zero length": (
        (FRAMES, (H, H), *WEIGHTS),
        {"lengths": [4, 0]},
        RuntimeError,
        "lengths: got 0, expected 1 to",
    ),
    "long length": ((FRAMES, (H, H), *WEIGHTS), {"lengths": [4, 5]}, RuntimeError, "lengths: got 5"),
    "number of lengths": ((FRAMES, (H, H), *WEIGHTS), {"lengths": [4]}, RuntimeError, "lengths has shape"),
    "float lengths": (
        (FRAMES, (H, H), *WEIGHTS),
        {"lengths": [4.0, 1.0]},
        TypeError,
        "lengths to be integers",
    ),
}


@pytest.mark.parametrize("name", RECURRENCES)
def test_recurrence(name):
    args, kwargs, error, match = RECURRENCES[name]
    with pytest.raises(error, match=match):
        attention_lstm(*args, **kwargs)


def test_attention_lstm():
    with pytest.raises(ValueError, match="cell: got 'rnn'"):
        fusednn.AttentionLSTM(3, 2, 2, 5, cell="rnn")
    with pytest.raises(ValueError, match="output: got 'coordinates'"):
        fusednn.AttentionLSTM(3, 2, 2, 5, output="coordinates")
    with pytest.raises(ValueError, match="hidden_size: got 0"):
        fusednn.AttentionLSTM(3, 2, 2, 0)
    module = fusednn.AttentionLSTM(3, 2, 2, 5)
    with pytest.raises(RuntimeError, match=r"expected frames of \[3, 2, 2\]"):
        module(FRAMES.flatten(3)[..., None])
    with pytest.raises(TypeError, match="hx to be a pair of Tensors"):
        module(FRAMES, H)
    with pytest.raises(TypeError, match="hx to be a Tensor h"):
        fusednn.AttentionLSTM(3, 2, 2, 5, cell="gru")(FRAMES, (H, H))
    with pytest.raises(RuntimeError, match="packed features have theirs"):
        module(pack_sequence([FRAMES[0], FRAMES[1]]), lengths=[4, 4])
