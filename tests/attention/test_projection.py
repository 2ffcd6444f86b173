"""The linear maps around attention, and the layer's way past the dispatcher."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusednn
from fusednn.attention.projections import project
from fusednn.testing import assert_close_to_oracle

from .op_cases import op_cases

# Rows around a tile and a block of them, ends of panels, sums of one and of several blocks.
SIZES = [(1, 5, 7), (64, 16, 32), (121, 33, 65), (250, 300, 96), (130, 513, 40), (96, 1, 1)]
NAMES = ("result", "grad of input", "grad of weight", "grad of bias")


def results(product, tensors: list[Tensor | None], grad: Tensor) -> list[Tensor]:
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    out = product(*leaves)
    return [out, *torch.autograd.grad(out, [t for t in leaves if t is not None], grad)]


def tensors_of(rows: int, inputs: int, outputs: int, bias: bool) -> tuple[list[Tensor | None], Tensor]:
    b = torch.randn(outputs) if bias else None
    return [torch.randn(rows, inputs), torch.randn(outputs, inputs), b], torch.randn(rows, outputs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_agrees_with_torch(isa, size, bias):
    tensors, grad = tensors_of(*size, bias)
    ours, theirs = (results(f, tensors, grad) for f in (project, F.linear))
    exact = results(F.linear, [None if t is None else t.double() for t in tensors], grad.double())
    for name, a, b, c in zip(NAMES, ours, theirs, exact):
        assert_close_to_oracle(a, b, c, name)


def test_views_and_transposed_gradients(native):
    """Rows with a stride, a weight that is a part of another, a gradient that lies the other way round."""
    (x, w, b), grad = tensors_of(100, 40, 24, True)
    wide = torch.zeros(100, 90)
    wide[:, 3:43] = x
    packed = torch.cat([torch.ones(5, 40), w])
    views = [wide[:, 3:43], packed[5:], b]
    expected = results(project, [x, w, b], grad)
    for given in (grad, grad.t().contiguous().t(), grad[:1].expand(100, -1)):
        right = (
            expected
            if given is not grad[:1] and given.stride(0)
            else results(project, [x, w, b], given.clone())
        )
        for name, a, e in zip(NAMES, results(project, views, given), right):
            assert a.equal(e), name


def test_a_weight_that_changes(native):
    """Its packing is kept from the second call on, and never used for another weight."""
    (x, w, b), _ = tensors_of(80, 32, 48, True)
    for _ in range(4):
        first = project(x, w, b)
        w.mul_(-1)
        torch.testing.assert_close(project(x, w, b), 2 * b - first)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_do_not_depend_on_threads(native, threads):
    tensors, grad = tensors_of(300, 70, 90, True)
    before = torch.get_num_threads()
    expected = results(project, tensors, grad)
    torch.set_num_threads(threads)
    try:
        found = results(project, tensors, grad)
    finally:
        torch.set_num_threads(before)
    for name, a, e in zip(NAMES, found, expected):
        assert a.equal(e), name


@pytest.mark.parametrize("name", ["projection_forward", "projection_backward"])
def test_opcheck(native, name):
    op = getattr(torch.ops.fusednn, name).default
    for case, args in op_cases(name).items():
        given = (
            args if name.endswith("forward") else [t.detach() if isinstance(t, Tensor) else t for t in args]
        )
        try:
            torch.library.opcheck(op, given, test_utils=("test_schema", "test_faketensor"))
        except Exception as error:
            raise AssertionError(f"{name} {case}") from error


def test_wrong_calls_harm_nothing(native):
    for args in (
        (torch.randn(2, 3), torch.randn(4, 5), None),
        (torch.randn(2, 3), torch.randn(4, 3), torch.randn(3)),
    ):
        with pytest.raises(RuntimeError, match="got shape"):
            native.projection_forward(*args)
    with pytest.raises(RuntimeError, match="grad_output: got shape"):
        native.projection_backward(torch.randn(2, 5), torch.randn(2, 3), torch.randn(4, 3), [True] * 3)


def test_few_rows_are_torchs():
    said = fusednn.explain(project, torch.randn(3, 8), torch.randn(4, 8), None)
    assert said[0].backend == "torch"
    assert "3 rows" in said[0].passed_over["cpu"][0]


@pytest.mark.parametrize("backend", ["cpu", "cuda", "triton", "torch"])
def test_products_that_ours_cannot_make_are_torchs(backend):
    """Whichever backend attention is asked for on."""
    tensors = (torch.randn(80, 8).double(), torch.randn(4, 8).double(), None)
    with fusednn.use_backend(backend):
        (said,) = fusednn.explain(project, *tensors)
        assert said.backend == "torch"
        assert project(*tensors).equal(F.linear(*tensors))


def test_traced_products(native):
    """A graph has our op where our kernel can serve, whatever the number of rows, and torch's elsewhere."""
    for dtype, ours in ((torch.float32, True), (torch.float64, False)):
        graphs = []

        def keep(graph, _inputs, graphs=graphs):
            graphs.append(graph)
            return graph

        torch.compile(project, backend=keep, fullgraph=True)(
            torch.randn(3, 8, dtype=dtype), torch.randn(4, 8, dtype=dtype), None
        )
        assert any("projection_forward" in str(node.target) for node in graphs[0].graph.nodes) == ours


def layers(**options) -> tuple[nn.MultiheadAttention, fusednn.MultiheadAttention]:
    theirs = nn.MultiheadAttention(32, 4, **options)
    ours = fusednn.MultiheadAttention(32, 4, **options)
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.2)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("weights", ["none", "mean", "heads"])
@pytest.mark.parametrize("rows", [9, 80])
@pytest.mark.parametrize(
    "options", [{}, {"batch_first": True}, {"bias": False, "batch_first": True}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_shortcut_is_the_general_way(native, monkeypatch, weights, rows, options, dtype):
    """In results and every gradient, with padding and without, of the first order and the second."""
    from fusednn.attention import shortcut

    _, layer = layers(dtype=dtype, **options)
    x = torch.randn(*((2, rows) if layer.batch_first else (rows, 2)), 32, dtype=dtype, requires_grad=True)
    padding = torch.arange(rows) >= torch.tensor([rows - 2, rows])[:, None]
    kind = {"need_weights": weights != "none", "average_attn_weights": weights == "mean"}
    taken = []
    attend = shortcut.attend
    monkeypatch.setattr(shortcut, "attend", lambda *args: taken.append(attend(*args)) or taken[-1])

    def run(mask: Tensor | None) -> list[Tensor]:
        found = layer(x, x, x, key_padding_mask=mask, **kind)
        outputs = [t for t in found if t is not None]
        leaves = [x, *layer.parameters()]
        loss = sum(t.square().sum() for t in outputs)
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        again = (t for t in layer(x, x, x, key_padding_mask=mask, **kind) if t is not None)
        unrecorded = torch.autograd.grad(sum(t.square().sum() for t in again), leaves)
        return [*outputs, *first, *second, *unrecorded]

    for mask in (None, padding, torch.randn(2, rows, dtype=dtype)):
        taken.clear()
        shorter = run(mask)
        assert taken
        assert all(t is not None for t in taken)
        with monkeypatch.context() as m:
            m.setattr(shortcut, "applies", lambda *_: False)
            general = run(mask)
        for a, e in zip(shorter, general, strict=True):
            scale = e.abs().max().clamp(min=1)
            torch.testing.assert_close(
                a / scale, e / scale, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12
            )


def test_what_the_shortcut_leaves_alone(native):
    """It never refuses: other inputs, layers and listeners take the general way, with its errors."""
    from fusednn.attention import shortcut

    _, layer = layers(batch_first=True)
    x = torch.randn(2, 5, 32)
    assert shortcut.attend(layer, x, None, "none") is not None
    assert not shortcut.applies(x, x, x.clone())
    assert shortcut.attend(layer, torch.randn(2, 5, 31), None, "none") is None
    assert shortcut.attend(layer, x, torch.zeros(2, 4, dtype=torch.bool), "none") is None
    assert shortcut.attend(layers(add_zero_attn=True)[1], x, None, "none") is None
    assert shortcut.attend(layers(dropout=0.5)[1], x, None, "none") is None
    with torch.autocast("cpu"):
        assert shortcut.attend(layer, x, None, "none") is None
    with fusednn.use_backend("reference"):
        assert not shortcut.applies(x, x, x)
    with pytest.raises(AssertionError, match="key_padding_mask"):
        layer(x, x, x, key_padding_mask=torch.zeros(2, 4, dtype=torch.bool))
