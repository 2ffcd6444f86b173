"""The layers under torch.compile, torch.export, torch.func, torch.fx, and differentiated twice."""

import copy

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap

import fusednn

from .module_cases import random, randomise

OPTIONS = {
    "plain": {},
    "seq first": {"batch_first": False},
    "separate": {"kdim": 8, "vdim": 8},
    "columns": {"add_bias_kv": True, "add_zero_attn": True},
    "additions": {"num_kv_heads": 1, "rotary": True, "alibi": True, "softcap": 2.0, "window": 3},
}
CALLS = {
    "no weights": {"need_weights": False},
    "mean": {},
    "heads": {"average_attn_weights": False},
}
every_layer = pytest.mark.parametrize("layer", OPTIONS)
every_call = pytest.mark.parametrize("kind", CALLS)


def make(layer: str, dtype=torch.float32) -> fusednn.MultiheadAttention:
    options = {"batch_first": True, **OPTIONS[layer]}
    if layer == "separate":
        options["kdim"] = 7
    return randomise(fusednn.MultiheadAttention(8, 2, **options)).to(dtype)


def inputs(module, batch=3, length=5, keys=6, dtype=torch.float32):
    """Return query, key, value."""
    made = [
        random(batch, length, 8),
        random(batch, keys, module.kdim, seed=1),
        random(batch, keys, 8, seed=2),
    ]
    return [(t if module.batch_first else t.transpose(0, 1).contiguous()).to(dtype) for t in made]


def masks(batch, length, keys, kind):
    padding = torch.arange(keys) >= torch.arange(1, batch + 1)[:, None]
    mask = torch.zeros(length, keys).masked_fill(torch.ones(length, keys).triu(3).bool(), -1.0)
    return {"key_padding_mask": padding, "attn_mask": mask if kind == "float" else mask < 0}


def flat(results):
    return [t for t in results if t is not None]


@pytest.mark.costly
@pytest.mark.in_turn
@every_layer
@every_call
def test_compile(layer, kind):
    """Results and gradients, at batches and lengths that change without compiling again and again."""
    torch._dynamo.reset()
    ours = make(layer)
    theirs = copy.deepcopy(ours)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=True)
    for sizes in ((3, 5, 6), (4, 7, 9), (2, 6, 8)):
        given = masks(*sizes, "bool")
        with torch._dynamo.config.patch(error_on_recompile=sizes[0] == 2):
            actual = flat(compiled(*inputs(ours, *sizes), **given, **CALLS[kind]))
        expected = flat(theirs(*inputs(ours, *sizes), **given, **CALLS[kind]))
        torch.testing.assert_close(actual, expected)
        for module, out in ((ours, actual), (theirs, expected)):
            module.zero_grad()
            sum(t.square().sum() for t in out).backward()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_compile_marked_lengths_of_self_attention(training):
    torch._dynamo.reset()
    ours = make("plain").train(training)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(training):
        for length in (5, 9, 12):
            x = random(3, length, 8, dtype=torch.float32)
            torch._dynamo.mark_dynamic(x, 1)
            with torch._dynamo.config.patch(error_on_recompile=length > 5):
                torch.testing.assert_close(compiled(x, x, x), ours(x, x, x))


def test_compile_of_a_causal_hint_and_an_unbatched_call():
    torch._dynamo.reset()
    ours = make("plain")
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)

    def both(x, mask):
        batched = ours(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
        return batched, *ours(x[0], x[0], x[0], attn_mask=mask)

    x = random(3, 5, 8, dtype=torch.float32)
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, causal), both(x, causal))


def test_compile_with_inductor():
    torch._dynamo.reset()
    ours = make("additions").eval()
    compiled = torch.compile(ours, fullgraph=True)
    arguments = inputs(ours)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*arguments), ours(*arguments))


def test_compile_of_dropout_draws_anew():
    torch._dynamo.reset()
    ours = fusednn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    x = random(3, 5, 8, dtype=torch.float32)
    outputs = [compiled(x, x, x)[0] for _ in range(2)]
    assert not torch.equal(*outputs)


@pytest.mark.costly
@pytest.mark.in_turn
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_compile_encoder(norm_first, training):
    torch._dynamo.reset()
    layer = fusednn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(randomise(layer), 2, enable_nested_tensor=False).train(training)
    compiled = torch.compile(encoder, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch, length in ((3, 5), (4, 7)):
        x = random(batch, length, 8, dtype=torch.float32)
        padding = torch.arange(length) >= torch.arange(2, batch + 2)[:, None]
        torch.testing.assert_close(
            compiled(x, src_key_padding_mask=padding), encoder(x, src_key_padding_mask=padding)
        )


@pytest.mark.costly
@pytest.mark.in_turn
@every_layer
@every_call
@pytest.mark.parametrize("strict", [False, True])
def test_export(layer, kind, strict):
    torch._dynamo.reset()
    ours = make(layer).eval()
    batch, length, keys = (torch.export.Dim(n, min=2, max=64) for n in ("batch", "length", "keys"))
    lead = [(batch, n) if ours.batch_first else (n, batch) for n in (length, keys, keys)]
    shapes = {name: dict(enumerate(dims)) for name, dims in zip(("query", "key", "value"), lead)}
    shapes |= {"key_padding_mask": {0: batch, 1: keys}, "attn_mask": {0: length, 1: keys}}
    shapes |= dict.fromkeys(CALLS[kind])

    def arguments(*sizes):
        tensors = dict(zip(("query", "key", "value"), inputs(ours, *sizes)))
        return {**tensors, **masks(*sizes, "float"), **CALLS[kind]}

    with torch.no_grad():
        program = torch.export.export(ours, (), arguments(3, 5, 6), dynamic_shapes=shapes, strict=strict)
        assert any("attention_forward" in str(node.target) for node in program.graph.nodes)
        for sizes in ((2, 4, 3), (5, 9, 11)):
            actual = program.module()(**arguments(*sizes))
            torch.testing.assert_close(flat(actual), flat(ours(**arguments(*sizes))))


def test_export_encoder_layer():
    ours = randomise(fusednn.TransformerEncoderLayer(8, 2, 12, batch_first=True)).eval()
    shapes = {"src": {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("length", min=2)}}
    program = torch.export.export(ours, (random(3, 5, 8).float(),), dynamic_shapes=shapes)
    x = random(4, 9, 8).float()
    torch.testing.assert_close(program.module()(x), ours(x))


@every_layer
@every_call
def test_per_sample_gradients(layer, kind):
    """Vmap over grad, unbatched calls inside."""
    ours = make(layer)
    parameters = {k: v.detach() for k, v in ours.named_parameters()}
    arguments = [t if ours.batch_first else t.transpose(0, 1) for t in inputs(ours)]
    padding = masks(3, 5, 6, "bool")["key_padding_mask"]

    def loss(p, q, k, v, mask):
        found = functional_call(ours, p, (q, k, v, mask), CALLS[kind])
        return sum(t.square().sum() for t in flat(found))

    found = vmap(grad(loss), in_dims=(None, 0, 0, 0, 0))(parameters, *arguments, padding)
    for n in range(3):
        ours.zero_grad()
        loss(dict(ours.named_parameters()), *(t[n] for t in (*arguments, padding))).backward()
        for name, p in ours.named_parameters():
            expected = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(found[name][n], expected, rtol=1e-4, atol=1e-5)


def test_ensemble():
    """Vmap over the parameters of several layers."""
    members = [make("plain") for _ in range(3)]
    for n, member in enumerate(members):
        with torch.no_grad():
            member.in_proj_weight.mul_(n + 1)
    parameters, buffers = torch.func.stack_module_state(members)
    arguments = inputs(members[0])
    base = copy.deepcopy(members[0]).to("meta")
    found = vmap(lambda p, b: functional_call(base, (p, b), tuple(arguments)))(parameters, buffers)
    for n, member in enumerate(members):
        torch.testing.assert_close((found[0][n], found[1][n]), member(*arguments))


@every_layer
def test_forward_mode(layer):
    """jvp, and jacfwd against jacrev."""
    ours = make(layer, torch.float64)
    query, key, value = inputs(ours, 2, 3, 4, torch.float64)
    direction = torch.randn_like(query)

    def f(q):
        return ours(q, key, value)

    _, tangents = jvp(f, (query,), (direction,))
    step = 1e-6
    for tangent, ahead, behind in zip(tangents, f(query + step * direction), f(query - step * direction)):
        torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(jacfwd(f)(query), jacrev(f)(query))


@every_layer
@every_call
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_double_backward(layer, kind):
    ours = make(layer, torch.float64)
    arguments = [t.requires_grad_() for t in inputs(ours, 2, 3, 4, torch.float64)]
    mask = random(3, 4, seed="mask").requires_grad_()
    padding = torch.tensor([[False] * 4, [False, False, True, True]])

    def f(q, k, v, mask, weight):
        parameters = {**dict(ours.named_parameters()), "out_proj.weight": weight}
        given = {"attn_mask": mask, "key_padding_mask": padding, **CALLS[kind]}
        return tuple(flat(functional_call(ours, parameters, (q, k, v), given)))

    tensors = (*arguments, mask, ours.out_proj.weight)
    assert torch.autograd.gradcheck(f, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, tensors, fast_mode=True)


def test_fx():
    """A layer is one node beside its parameters."""
    model = nn.ModuleDict({"attention": make("plain")})

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = model["attention"]

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0] + x

    traced, x = torch.fx.symbolic_trace(Model()), random(3, 5, 8, dtype=torch.float32)
    torch.testing.assert_close(traced(x), Model()(x))
    assert sum("_attend" in str(node.target) for node in traced.graph.nodes) == 1


def test_jit_trace():
    ours = make("plain").eval()
    arguments = tuple(inputs(ours))
    traced = torch.jit.trace(ours, arguments)
    torch.testing.assert_close(traced(*arguments), ours(*arguments))


def test_checkpoint_draws_the_same_dropout():
    ours = fusednn.MultiheadAttention(8, 2, dropout=0.5)
    x = random(5, 3, 8, dtype=torch.float32).requires_grad_()
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        f = (
            ours
            if not checkpointed
            else lambda *a: torch.utils.checkpoint.checkpoint(ours, *a, use_reentrant=False)
        )
        output = f(x, x, x)[0]
        found.append((output, *torch.autograd.grad(output.square().sum(), x)))
    torch.testing.assert_close(found[0], found[1])
