"""torch.library's own checks, torch.compile, torch.export, autocast, torch.func."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import check_significant_strides
from torch._subclasses import FakeTensorMode
from torch.func import grad, jacfwd, jacrev, jvp, vmap

import fusednn
from fusednn.functional import scaled_dot_product_attention, varlen_attention

from .cases import DTYPES
from .op_cases import OPS, op_cases


def detached(args: tuple, device: str = "cpu") -> tuple:
    """The arguments, without a graph."""
    return tuple(a.detach().to(device) if isinstance(a, Tensor) else a for a in args)


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name):
    op = getattr(torch.ops.fusednn, name).default
    with fusednn.use_backend("reference"):
        for case, args in op_cases(name).items():
            try:
                torch.library.opcheck(op, detached(args), test_utils=("test_schema", "test_faketensor"))
            except Exception as error:
                raise AssertionError(f"{name} {case}") from error


@pytest.mark.parametrize("case", ["everything", "packed causal", "bool mask"])
@pytest.mark.parametrize("name", OPS)
def test_opcheck_of_autograd_and_dynamic_shapes(name, case):
    """All of opcheck on cases that train: the rest of it takes seconds a case."""
    args = op_cases(name)[case]
    if name.endswith("backward"):
        args = detached(args)
    torch.library.opcheck(getattr(torch.ops.fusednn, name).default, args)


def _fakes_agree(place, name: str, dtype: torch.dtype) -> None:
    op = getattr(torch.ops.fusednn, name)
    first, step = (DTYPES.index(dtype), 5) if place.slow else (0, 1)
    for case, args in list(op_cases(name, dtype).items())[first::step]:
        args = detached(args, place.device)
        real = op(*args)
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
        for index, (r, f) in enumerate(zip(real, fake, strict=True)):
            assert (r.shape, r.dtype) == (f.shape, f.dtype), f"{case}, result {index}"
            same, where = check_significant_strides(r, f)
            assert same, f"{case}, result {index}: strides {r.stride()} and {f.stride()} at {where}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fakes_of_the_forward(place, dtype):
    _fakes_agree(place, "attention_forward", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fakes_of_the_backward(training_place, dtype):
    _fakes_agree(training_place, "attention_backward", dtype)


def test_meta():
    q, k = torch.empty(2, 4, 5, 8, device="meta"), torch.empty(2, 2, 7, 8, device="meta")
    options = {"enable_gqa": True, "return_lse": True, "return_weights": "mean", "dropout_p": 0.1}
    padding = torch.empty(2, 7, dtype=torch.bool, device="meta")
    output, lse, weights = scaled_dot_product_attention(q, k, k, key_padding_mask=padding, **options)
    assert (output.shape, lse.shape, weights.shape) == ((2, 4, 5, 8), (2, 4, 5), (2, 5, 7))
    assert output.is_meta
    assert weights.is_meta


def inputs(
    length: int, keys: int | None = None, batch: int = 2, heads: int = 4, size: int = 8
) -> list[Tensor]:
    """Queries, keys, values, padding and a floating mask, seeded."""
    generator = torch.Generator().manual_seed(length)
    keys = keys or length
    q, k, v = (torch.randn(batch, heads, n, size, generator=generator) for n in (length, keys, keys))
    padding = torch.rand(batch, keys, generator=generator) < 0.3
    mask = torch.randn(heads, length, keys, generator=generator)
    return [*(t.requires_grad_() for t in (q, k, v)), padding, mask.requires_grad_()]


CALLS = {
    "plain": lambda q, k, v, padding, mask: (scaled_dot_product_attention(q, k, v),),
    "causal": lambda q, k, v, padding, mask: scaled_dot_product_attention(
        q, k, v, is_causal=True, window=5, softcap=3.0, return_lse=True
    ),
    "masked": lambda q, k, v, padding, mask: scaled_dot_product_attention(
        q, k, v, mask, key_padding_mask=padding, return_weights="mean"
    ),
    "decode": lambda q, k, v, padding, mask: scaled_dot_product_attention(
        q[:, :, -1:], k, v, is_causal=True, position_offset=k.shape[2] - 1, return_weights="heads"
    ),
}


def gradients(results, given: list[Tensor]) -> list[Tensor]:
    """Gradients of a loss to all that require one; zeros where a call doesn't use it."""
    leaves = [t for t in given if t.requires_grad]
    loss = sum(t.square().sum() for t in results)
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]


@pytest.mark.parametrize("call", CALLS)
def test_compile_fullgraph(call):
    """Results and gradients, at lengths that change without compiling again and again."""
    torch._dynamo.reset()
    compiled = torch.compile(CALLS[call], fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (5, 12, 7):
        given = inputs(length)
        with torch._dynamo.config.patch(error_on_recompile=length == 7):
            actual = compiled(*given)
        expected = CALLS[call](*given)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(gradients(actual, given), gradients(expected, given))


def test_compile_by_inductor():
    """Around the op: with the strides that the fakes promise."""
    torch._dynamo.reset()
    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))

    def block(q, k, v, padding, mask):
        output, weights = CALLS["masked"](q, k, v, padding, mask)
        return F.linear(output.transpose(1, 2).flatten(2), weight), weights * 2

    given = inputs(6)
    actual, expected = torch.compile(block, fullgraph=True)(*given), block(*given)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients(actual, given), gradients(expected, given), rtol=1e-3, atol=1e-4)


def test_compile_with_dropout():
    """A seed is drawn in the graph: another each time, and the backward's is the forward's."""
    torch._dynamo.reset()
    value = torch.eye(12).expand(2, 4, 12, 12)

    def call(q, k, v):
        return scaled_dot_product_attention(q, k, v, dropout_p=0.5)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    q, k, *_ = inputs(12)
    v = value.clone().requires_grad_()
    first, second = compiled(q, k, v), compiled(q, k, v)
    assert not first.ne(0).equal(second.ne(0))
    assert abs(first.ne(0).float().mean().item() - 0.5) < 0.1
    (g,) = torch.autograd.grad(first[0, 0, 3].sum(), v)
    assert g[0, 0].ne(0).all(-1).equal(first[0, 0, 3].ne(0))


def test_compile_packed():
    torch._dynamo.reset()

    def call(q, k, v, bounds, longest: int):
        return varlen_attention(q, k, v, bounds, bounds, longest, longest, is_causal=True)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (9, 14, 11):
        q, k, v = (torch.randn(rows, 2, 4) for _ in range(3))
        bounds = torch.tensor([0, 4, rows], dtype=torch.int32)
        with torch._dynamo.config.patch(error_on_recompile=rows == 11):
            torch.testing.assert_close(compiled(q, k, v, bounds, rows - 4), call(q, k, v, bounds, rows - 4))


class Layer(torch.nn.Module):
    """A call as a module, which torch.export asks for."""

    def __init__(self, call: str) -> None:
        super().__init__()
        self.call = CALLS[call]

    def forward(self, q, k, v, padding, mask):
        """Make the call."""
        return self.call(q, k, v, padding, mask)


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("call", CALLS)
def test_export(call, strict):
    torch._dynamo.reset()
    length, batch = torch.export.Dim("length", min=3, max=64), torch.export.Dim("batch", min=2, max=64)
    shapes = (*({0: batch, 2: length},) * 3, {0: batch, 1: length}, {1: length, 2: length})
    with torch.no_grad():
        program = torch.export.export(
            Layer(call), tuple(inputs(6, batch=3)), dynamic_shapes=shapes, strict=strict
        )
        assert any("attention_forward" in str(node.target) for node in program.graph.nodes)
        for n, b in ((4, 2), (17, 5)):
            given = inputs(n, batch=b)
            torch.testing.assert_close(program.module()(*given), CALLS[call](*given))


def test_deterministic_algorithms(training_place):
    """Nothing warns of, or refuses, torch's switch."""
    given = [t.detach().to(training_place.device) for t in inputs(7)]
    given = [t.requires_grad_(t.is_floating_point()) for t in given]
    torch.use_deterministic_algorithms(True)
    try:
        first = gradients(CALLS["masked"](*given), given)
        assert all(a.equal(b) for a, b in zip(first, gradients(CALLS["masked"](*given), given), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(place, dtype):
    """All of it in autocast's dtype, as torch's attention; lse stays float32."""
    q, k, v, padding, mask = (t.detach().to(place.device) for t in inputs(6))
    options = {"key_padding_mask": padding, "return_lse": True, "return_weights": "mean"}
    with torch.autocast(place.device, dtype):
        found = scaled_dot_product_attention(q, k, v, mask, **options)
        theirs = F.scaled_dot_product_attention(q, k, v, mask)
        packed = varlen_attention(*(t[0].transpose(0, 1) for t in (q, k, v)),
                                  *(torch.tensor([0, 6], device=q.device),) * 2)  # fmt: skip
    assert [t.dtype for t in found] == [dtype, torch.float32, dtype]
    assert theirs.dtype == packed.dtype == dtype
    lowered = [t.to(dtype) for t in (q, k, v, mask)]
    expected = scaled_dot_product_attention(*lowered, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    exact = scaled_dot_product_attention(q, k, v, mask, **options)
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0.05, check_dtype=False)


def test_autocast_of_the_backward(training_place):
    """Gradients in the leaves' own dtypes."""
    q, k, v, padding, mask = (t.detach().to(training_place.device) for t in inputs(6))
    leaves = [t.requires_grad_() for t in (q, k, v, mask)]
    with torch.autocast(training_place.device, torch.bfloat16):
        output = scaled_dot_product_attention(*leaves, key_padding_mask=padding)
        output.float().square().sum().backward()
    assert all(t.grad.dtype == torch.float32 and t.grad.ne(0).any() for t in leaves)


BATCHED = {
    "all": ((0, 0, 0, 0, None), "masked"),
    "queries": ((0, None, None, None, None), "plain"),
    "keys and values": ((None, 0, 0, 0, None), "masked"),
    "mask": ((None, None, None, None, 0), "masked"),
    "causal": ((0, 0, 0, None, None), "causal"),
}


@pytest.mark.parametrize("case", BATCHED)
def test_vmap(case):
    dims, call = BATCHED[case]
    sets = [[t.detach() for t in inputs(n)] for n in (5, 5, 5)]
    sets = [[t + 0.1 * i if t.is_floating_point() else t ^ bool(i) for t in s] for i, s in enumerate(sets)]
    given = [torch.stack(t) if d == 0 else t[0] for t, d in zip(zip(*sets), dims)]
    found = vmap(CALLS[call], in_dims=dims)(*given)
    for i in range(3):
        one = CALLS[call](*(t[i] if d == 0 else t for t, d in zip(given, dims)))
        for a, b in zip(found, one, strict=True):
            torch.testing.assert_close(a[i], b)


@pytest.mark.parametrize("call", CALLS)
def test_per_sample_gradients(call):
    """Vmap over grad, the usual use of torch.func."""
    q, k, v, padding, mask = (t.detach() for t in inputs(5, batch=3))

    def loss(q, k, v, padding, mask):
        one = (t[None] for t in (q, k, v, padding))
        return sum(t.square().sum() for t in CALLS[call](*one, mask))

    found = vmap(grad(loss, (0, 1, 2, 4)), in_dims=(0, 0, 0, 0, None))(q, k, v, padding, mask)
    for n in range(3):
        given = [t[n : n + 1] for t in (q, k, v, padding)] + [mask]
        given = [t.clone().requires_grad_(t.is_floating_point()) for t in given]
        expected = gradients(CALLS[call](*given), given)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a[n], b[0] if b.dim() == 4 else b, rtol=1e-4, atol=1e-5)


def torchs(q, k, v, padding, mask) -> Tensor:
    """The call "masked" by torch's operations."""
    s = (q @ k.mT / q.shape[-1] ** 0.5 + mask).masked_fill(padding[:, None, None], -torch.inf)
    return s.softmax(-1) @ v


@pytest.mark.parametrize("index", [0, 1, 2, 4], ids=["query", "key", "value", "mask"])
def test_jvp_and_jacobians(index):
    given = [t.detach().double() if t.is_floating_point() else t for t in inputs(3, batch=1, heads=2, size=2)]
    given[3] = torch.tensor([[False, True, False]])

    def of(function):
        return lambda t: function(*given[:index], t, *given[index + 1 :])

    ours, theirs = of(lambda *args: CALLS["masked"](*args)[0]), of(torchs)
    x, direction = given[index], torch.randn_like(given[index])
    torch.testing.assert_close(jvp(ours, (x,), (direction,)), jvp(theirs, (x,), (direction,)))
    expected = torch.autograd.functional.jacobian(theirs, x)
    torch.testing.assert_close(jacfwd(ours)(x), expected)
    torch.testing.assert_close(jacrev(ours)(x), expected)
