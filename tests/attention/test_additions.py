"""MultiheadAttention beyond torch's: grouped queries, windows, soft caps, rotary embedding, ALiBi."""

import itertools
import math

import pytest
import torch
from torch import nn

import fusednn
from fusednn.attention import rotary
from fusednn.functional import alibi_slopes, rotary_embedding

from .module_cases import DEVICES, WEIGHTS, random, randomise

HEADS = 4
ADDITIONS = {
    "num_kv_heads": (None, 2, 1),
    "window": (None, 2, (3, 0)),
    "softcap": (None, 1.5),
    "rotary": (False, True, 50.0),
    "alibi": (False, True),
}


def turned(x: torch.Tensor, base: float) -> torch.Tensor:
    """Each pair of a vector as a complex number, times e^(i angle)."""
    half = x.shape[-1] // 2
    angles = [[position / base ** (i / half) for i in range(half)] for position in range(x.shape[-2])]
    angles = torch.tensor(angles, dtype=torch.float64)
    pairs = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((pairs.real, pairs.imag), -1)


def capped(module: fusednn.MultiheadAttention, scores: torch.Tensor) -> torch.Tensor:
    cap = module.softcap
    return scores if cap is None else cap * torch.tanh(scores / cap)


def by_hand(module: fusednn.MultiheadAttention, query, key, hidden) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output and each head's weights for batch-first self- or cross-attention, head by head."""
    d, h = module.head_dim, module.num_heads
    g = module.num_kv_heads or h
    if module.in_proj_weight is None:
        weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    else:
        weights = module.in_proj_weight.split((h * d, g * d, g * d))
    biases = module.in_proj_bias.split((h * d, g * d, g * d))
    q, k, v = (x @ w.T + b for x, w, b in zip((query, key, key), weights, biases))
    outputs, found = [], []
    for head in range(h):
        shared = head // (h // g)
        q_h, k_h, v_h = (t[..., d * n : d * (n + 1)] for t, n in ((q, head), (k, shared), (v, shared)))
        if module.rotary:
            base = 10000.0 if module.rotary is True else module.rotary
            q_h, k_h = turned(q_h, base), turned(k_h, base)
        scores = capped(module, q_h @ k_h.mT / math.sqrt(d))
        i, j = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
        if module.alibi:
            scores = scores - 2.0 ** (-8 * (head + 1) / h) * (i - j).abs()
        left, right = module.window if isinstance(module.window, tuple) else (module.window, module.window)
        out_of_sight = torch.zeros(len(i), len(j), dtype=torch.bool)
        if module.window is not None:
            out_of_sight = (j < i - left) | (j > i + right)
        if module.bias_k is not None:
            k_x, v_x = (b[0, :, d * shared : d * (shared + 1)] for b in (module.bias_k, module.bias_v))
            scores = torch.cat((scores, capped(module, q_h @ k_x.mT / math.sqrt(d))), -1)
            v_h = torch.cat((v_h, v_x.expand(len(v_h), -1, -1)), 1)
            out_of_sight = nn.functional.pad(out_of_sight, (0, 1))
        hidden_here = out_of_sight | nn.functional.pad(hidden, (0, len(out_of_sight[0]) - len(j)))[:, None]
        p = torch.softmax(scores.masked_fill(hidden_here, -math.inf), -1).nan_to_num(0)
        found.append(p)
        outputs.append(p @ v_h)
    output = torch.cat(outputs, -1) @ module.out_proj.weight.T + module.out_proj.bias
    return output, torch.stack(found, 1)


@pytest.mark.parametrize("values", list(itertools.product(*ADDITIONS.values())), ids=str)
def test_every_combination(values):
    options = dict(zip(ADDITIONS, values))
    query, key = random(2, 6, 16), random(2, 9, 16, seed=1)
    hidden = torch.zeros(2, 9, dtype=torch.bool)
    hidden[1, 7:] = True
    kinds = itertools.cycle(WEIGHTS)
    for extra, separate in itertools.product((False, True), repeat=2):
        kind = next(kinds)
        layout = {"kdim": 15, "vdim": 15} if separate else {}
        key_here = key[..., :15] if separate else key
        module = fusednn.MultiheadAttention(
            16, HEADS, add_bias_kv=extra, batch_first=True, dtype=torch.float64, **layout, **options
        )
        randomise(module)
        output, found = module(query, key_here, key_here, hidden, **WEIGHTS[kind])
        expected, weights = by_hand(module, query, key_here, hidden)
        torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)  # slopes are float32
        if kind != "none":
            weights = weights.mean(1) if kind == "mean" else weights
            torch.testing.assert_close(found, weights, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("options", [{"num_kv_heads": 2}, {"rotary": True, "window": 2}], ids=str)
def test_gradients(batch_first, options):
    module = randomise(
        fusednn.MultiheadAttention(8, 4, batch_first=batch_first, dtype=torch.float64, **options)
    )
    x = random(3, 2, 8).requires_grad_()
    parameters = list(module.parameters())

    def f(x, *parameters):
        made = dict(zip((n for n, _ in module.named_parameters()), parameters))
        return torch.func.functional_call(module, made, (x, x, x))

    assert torch.autograd.gradcheck(f, (x, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (x, *parameters), fast_mode=True)


def test_shapes_of_shared_heads():
    module = fusednn.MultiheadAttention(16, 4, num_kv_heads=2, add_bias_kv=True)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert shapes["in_proj_weight"] == (16 + 2 * 8, 16)
    assert shapes["in_proj_bias"] == (16 + 2 * 8,)
    assert shapes["bias_k"] == shapes["bias_v"] == (1, 1, 8)
    assert "num_kv_heads=2" in repr(module)
    separate = fusednn.MultiheadAttention(16, 4, kdim=5, vdim=6, num_kv_heads=1)
    shapes = {name: tuple(p.shape) for name, p in separate.named_parameters()}
    assert (shapes["k_proj_weight"], shapes["v_proj_weight"]) == ((4, 5), (4, 6))
    assert fusednn.MultiheadAttention(16, 4, num_kv_heads=4).num_kv_heads is None


def test_torchs_containers_do_not_bypass_the_additions():
    """Torch's encoder layer computes attention by itself if it knows the parameters."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True).eval()
    layer.self_attn = fusednn.MultiheadAttention(16, 4, batch_first=True, window=1)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = layer.norm1(x + layer.self_attn(x, x, x)[0])
        expected = layer.norm2(expected + layer._ff_block(expected))
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_rotary_embedding(device, dtype):
    x = random(2, 3, 70, 8, dtype=dtype)
    exact = turned(x.double(), 10000.0)
    actual = rotary_embedding(x.to(device))
    assert (actual.dtype, actual.device.type) == (dtype, device)
    tolerance = max(4 * torch.finfo(dtype).eps, 1e-13)  # the angles themselves are rounded
    torch.testing.assert_close(actual.double().cpu(), exact, rtol=tolerance, atol=tolerance)
    tail = rotary_embedding(x[..., 60:, :].to(device), position_offset=60)
    assert torch.equal(tail, actual[..., 60:, :])
    back = rotary_embedding(x.flip(-2).to(device), positions=torch.arange(69, -1, -1))
    torch.testing.assert_close(back.flip(-2), actual)


def test_rotary_products_depend_on_distance():
    q, k = random(1, 8), random(1, 8, seed=1)
    products = [
        rotary_embedding(q, position_offset=i) @ rotary_embedding(k, position_offset=i + 5).T
        for i in (0, 3, 1000)
    ]
    torch.testing.assert_close(products[0], products[1])
    torch.testing.assert_close(products[0], products[2])
    assert not torch.allclose(products[0], q @ k.T)


def test_rotary_errors():
    with pytest.raises(RuntimeError, match="even D"):
        rotary_embedding(torch.zeros(3, 5))
    with pytest.raises(RuntimeError, match=r"x: got torch\.int64"):
        rotary_embedding(torch.zeros(3, 4).long())
    with pytest.raises(ValueError, match="base: got 0"):
        rotary_embedding(torch.zeros(3, 4), base=0)


def test_tables_are_kept_and_serve_training_after_inference():
    rotary._TABLES.clear()
    x = random(40, 8, dtype=torch.float32).requires_grad_()
    with torch.inference_mode():
        rotary_embedding(x)
    (kept,) = rotary._TABLES.values()
    rotary_embedding(x).sum().backward()
    assert next(iter(rotary._TABLES.values())) is kept
    rotary_embedding(random(65, 8, dtype=torch.float32))
    assert next(iter(rotary._TABLES.values()))[0].shape[0] == 128
    for dim in range(2, 100, 2):
        rotary_embedding(torch.zeros(2, dim))
    assert len(rotary._TABLES) <= 16


def test_tables_made_while_tracing_are_not_kept():
    rotary._TABLES.clear()
    x = torch.randn(5, 8)
    with torch._subclasses.FakeTensorMode() as mode:
        rotary_embedding(mode.from_tensor(x))
        alibi_slopes(4)
    rotary_embedding(x.to("meta"))
    torch.func.vmap(rotary_embedding)(torch.randn(2, 5, 8))
    assert not rotary._TABLES


def test_alibi_slopes():
    """Of the paper for 8 heads; for others as in its code."""
    assert alibi_slopes(8).tolist() == [2.0**-n for n in range(1, 9)]
    assert alibi_slopes(1).tolist() == [2.0**-8]
    twelve = [2.0**-n for n in range(1, 9)] + [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]
    torch.testing.assert_close(alibi_slopes(12), torch.tensor(twelve))
    assert alibi_slopes(12).dtype == torch.float32
    with pytest.raises(ValueError, match="num_heads: got 0"):
        alibi_slopes(0)
