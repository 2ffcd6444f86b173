"""TransformerEncoderLayer against torch's: alone, in nn.TransformerEncoder, padded, nested."""

import copy
import itertools
import pickle
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fusednn

from .module_cases import DEVICES, masks, random, randomise

MASKS = ("none", "bool", "float")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Support for mismatched"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]


def pair(device="cpu", dtype=torch.float64, **options):
    """Return fusednn's layer and torch's with the same parameters."""
    arguments = {"d_model": 8, "nhead": 2, "dim_feedforward": 12, "dropout": 0.0, **options}
    ours = randomise(fusednn.TransformerEncoderLayer(**arguments)).to(device, dtype)
    theirs = nn.TransformerEncoderLayer(**arguments).to(device, dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def step(module, x, **given):
    """Return the output, and the gradients of the input and the parameters."""
    x = x.clone().requires_grad_()
    out = module(x, **given)
    wanted = [x, *module.parameters()]
    return [out.detach(), *torch.autograd.grad((out * random(*out.shape).to(out)).sum(), wanted)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    ("activation", "bias"),
    [("relu", True), ("gelu", False), (torch.tanh, True)],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_every_combination(device, norm_first, batch_first, bias, activation):
    ours, theirs = pair(
        device, norm_first=norm_first, batch_first=batch_first, bias=bias, activation=activation
    )
    assert type(ours.self_attn) is fusednn.MultiheadAttention
    for batch, attn, per_head, padding in itertools.product((3, None), MASKS, (False, True), MASKS):
        if per_head and attn == "none":
            continue
        lead = (5,) if batch is None else (batch, 5) if batch_first else (5, batch)
        given = {
            "src_mask": masks(attn, *((2 * (batch or 1),) if per_head else ()), 5, 5),
            "src_key_padding_mask": masks(padding, *(() if batch is None else (batch,)), 5, seed="padding"),
        }
        given = {name: None if m is None else m.to(device) for name, m in given.items()}
        x = random(*lead, 8).to(device)
        torch.testing.assert_close(
            step(ours, x, **given),
            step(theirs, x, **given),
            rtol=1e-11,
            atol=1e-11,
            msg=lambda text, w=(batch, attn, per_head, padding): f"{w}: {text}",
        )


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("mask", ["none", "attn", "padding"])
def test_inference(norm_first, batch_first, activation, mask):
    """Torch's native layer gives the same; ours is not that one, and what it gives is what training gives."""
    ours, theirs = pair(
        dtype=torch.float32, norm_first=norm_first, batch_first=batch_first, activation=activation
    )
    x = random(4, 4, 8, dtype=torch.float32)
    given = {
        "none": {},
        "attn": {"src_mask": torch.ones(4, 4, dtype=torch.bool).triu(1)},
        "padding": {"src_key_padding_mask": torch.tensor([[False] * (4 - n) + [True] * n for n in range(4)])},
    }[mask]
    trained = ours(x, **given)
    with torch.no_grad(), mock.patch("torch._transformer_encoder_layer_fwd") as native:
        inferred = ours.eval()(x, **given)
        native.assert_not_called()
    assert torch.equal(inferred, trained)
    with torch.no_grad():
        torch.testing.assert_close(inferred, theirs.eval()(x, **given))


@pytest.mark.parametrize("hint", [True, False])
def test_causal_hint(hint):
    ours, theirs = pair()
    x, causal = random(5, 3, 8), torch.ones(5, 5, dtype=torch.bool).triu(1)
    actual, expected = (step(m, x, src_mask=causal, is_causal=hint) for m in (ours, theirs))
    torch.testing.assert_close(actual, expected)
    with pytest.raises(RuntimeError, match="is_causal"):
        ours.eval()(x, is_causal=True)


@pytest.mark.parametrize("training", [True, False])
def test_rows_of_padding_only(training):
    """A sample of padding only goes through norms and linear layers, without attention."""
    ours, _ = pair(batch_first=True)
    ours.train(training)
    x = random(2, 4, 8)
    padding = torch.tensor([[False] * 4, [True] * 4])
    out, *grads = step(ours, x, src_key_padding_mask=padding)
    alone = ours.norm1(x[1] + ours.self_attn.out_proj.bias)
    torch.testing.assert_close(out[1], ours.norm2(alone + ours._ff_block(alone)))
    assert all(g.isfinite().all() for g in grads)


def encoders(**options):
    ours, theirs = pair(dtype=torch.float32, **options)
    return [nn.TransformerEncoder(layer, 2).eval() for layer in (ours, theirs)]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("given", ["nothing", "mask", "padding", "both", "ragged"])
@pytest.mark.parametrize("grad", [False, True])
def test_in_an_encoder(batch_first, norm_first, given, grad):
    """With torch's conversion of padded batches to nested tensors in inference."""
    ours, theirs = encoders(batch_first=batch_first, norm_first=norm_first)
    x = random(4, 4, 8, dtype=torch.float32)
    causal = nn.Transformer.generate_square_subsequent_mask(4)
    padding = torch.tensor([[False] * (4 - n) + [True] * n for n in range(4)])
    arguments = {
        "nothing": {},
        "mask": {"mask": causal},
        "padding": {"src_key_padding_mask": padding},
        "both": {
            "mask": causal,
            "src_key_padding_mask": torch.zeros(4, 4).masked_fill(padding, -float("inf")),
        },
        "ragged": {"src_key_padding_mask": padding.roll(1, 1)},
    }[given]
    packed = []
    layer = ours.layers[0]
    encode = layer._encode

    def watch(x, attend):
        packed.append(x.dim() == 2)
        return encode(x, attend)

    layer._encode = watch
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(ours(x, **arguments), theirs(x, **arguments))
    assert packed == [given == "padding" and batch_first and not norm_first and not grad]


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("norm_first", [False, True])
def test_nested(layout, norm_first):
    """Each sequence as if it were alone, in training too."""
    ours, _ = pair(batch_first=True, norm_first=norm_first, nhead=1)
    rows = [random(n, 8, seed=n).requires_grad_() for n in (3, 1, 5)]
    out = ours(torch.nested.as_nested_tensor(rows, layout=layout))
    assert out.is_nested
    assert out.layout == layout
    expected = [ours(r) for r in rows]
    for actual, one in zip(out.unbind(), expected, strict=True):
        torch.testing.assert_close(actual, one)
    wanted = [*rows, *ours.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(out.to_padded_tensor(0.0).square().sum(), wanted),
        torch.autograd.grad(sum(t.square().sum() for t in expected), wanted),
    )


def test_is_torchs_class():
    for options in ({}, {"bias": False, "norm_first": True, "activation": "gelu"}, {"device": "meta"}):
        torch.manual_seed(1)
        ours = fusednn.TransformerEncoderLayer(8, 2, 16, **options)
        torch.manual_seed(1)
        theirs = nn.TransformerEncoderLayer(8, 2, 16, **options)
        assert isinstance(ours, nn.TransformerEncoderLayer)
        assert repr(ours) == repr(theirs)
        assert vars(ours).keys() == vars(theirs).keys()
        for (name, a), (other, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            assert (name, a.shape, a.device) == (other, b.shape, b.device)
            assert a.is_meta or a.equal(b)
    with pytest.raises(RuntimeError, match="relu/gelu"):
        fusednn.TransformerEncoderLayer(8, 2, activation="swish")


def test_dropout_is_everywhere_torch_has_it():
    """All of it at once drops everything: norms of what is left are the same."""
    ours, theirs = pair(dropout=1.0)
    x = random(5, 3, 8)
    torch.testing.assert_close(ours(x), theirs(x))
    some, _ = pair(dropout=0.5)
    assert not torch.equal(some(x), some(x))
    assert torch.equal(some.eval()(x), pair()[0](x))


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies(way):
    ours, _ = pair()
    x = random(5, 3, 8)
    copied = copy.deepcopy(ours) if way == "deepcopy" else pickle.loads(pickle.dumps(ours))
    assert type(copied.self_attn) is fusednn.MultiheadAttention
    assert torch.equal(copied(x), ours(x))


def test_masks_that_are_neither_bool_nor_floating():
    ours, theirs = pair()
    x = random(5, 3, 8)
    for given in ({"src_mask": torch.zeros(5, 5).int()}, {"src_key_padding_mask": torch.zeros(3, 5).int()}):
        for module in (ours, theirs):
            with pytest.raises(AssertionError, match=next(iter(given))):
                module(x, **given)
    with pytest.warns(UserWarning, match="mismatched src_key_padding_mask and src_mask"):
        ours(x, torch.zeros(5, 5), torch.zeros(3, 5).bool())


def test_hooks_of_attention_run():
    ours, _ = pair(batch_first=True)
    seen = []
    ours.self_attn.register_forward_hook(lambda m, args, out: seen.append(args[0].is_nested))
    with torch.no_grad():
        ours.eval()(random(2, 3, 8))
        ours(torch.nested.nested_tensor([random(2, 8), random(4, 8)]))
    assert seen == [False, True]


def test_activation_objects():
    for activation in (F.relu, nn.GELU(), nn.Softplus()):
        ours, theirs = pair(activation=activation)
        x = random(5, 3, 8)
        torch.testing.assert_close(step(ours, x), step(theirs, x))
        assert ours.activation_relu_or_gelu == theirs.activation_relu_or_gelu
