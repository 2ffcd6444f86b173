"""replace_layers and restore_layers: what is swapped, what is kept, what is said."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fusednn
from fusednn.replace import REPLACEMENTS

PAIRS = list(REPLACEMENTS.items())
ARGUMENTS = {
    nn.LSTMCell: (3, 3),
    nn.GRUCell: (3, 3),
    nn.Conv2d: (4, 8, 3, 2, 1, 1, 4, False, "reflect"),
    nn.MultiheadAttention: (8, 2, 0.1, False, True, True, 5),
    nn.TransformerEncoderLayer: (8, 2, 12, 0.1, "gelu"),
}


class Decoder(nn.Module):
    """Two cells of either kind in nested containers, one of them under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTMCell(5, 7)
        self.rest = nn.ModuleList([nn.GRUCell(7, 7), nn.Sequential(nn.Linear(7, 7), nn.GRUCell(7, 3))])
        self.named = nn.ModuleDict({"again": self.rest[0], "own": nn.GRUCell(3, 3, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, c = self.first(x)
        h, _ = self.first(x, (h, c))
        h = self.named["again"](self.rest[0](h))
        return self.named["own"](self.rest[1](h))


@pytest.fixture
def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder()


def classes(model: nn.Module) -> set[type]:
    return {type(m) for m in model.modules() if isinstance(m, nn.RNNCellBase)}


def reason(report: fusednn.replace.Report, name: str) -> str:
    (entry,) = (e for e in report.entries if name in e.names)
    assert not entry.changed
    assert entry.reason
    return entry.reason


@pytest.mark.parametrize(("torch_class", "fused_class"), PAIRS)
def test_every_row_keeps_constructor_and_state(torch_class, fused_class):
    assert issubclass(fused_class, torch_class)
    theirs, ours = (c(*ARGUMENTS[torch_class]) for c in (torch_class, fused_class))
    assert vars(ours).keys() == vars(theirs).keys()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    assert getattr(fusednn, fused_class.__name__) is fused_class


def test_replaces_everywhere_in_place(model):
    x = torch.randn(4, 5)
    expected = model(x)
    modules = dict(model.named_modules(remove_duplicate=False))
    report = fusednn.replace_layers(model)

    assert classes(model) == {fusednn.LSTMCell, fusednn.GRUCell}
    assert dict(model.named_modules(remove_duplicate=False)) == modules  # the same objects
    torch.testing.assert_close(model(x), expected)
    assert [e.names for e in report.entries] == [
        ("first",),
        ("rest.0", "named.again"),
        ("rest.1.1",),
        ("named.own",),
    ]
    assert report.changed == report.entries


def test_fused_kernels_really_run(model):
    x = torch.randn(4, 5)
    assert len(fusednn.explain(model, x)) == 0
    fusednn.replace_layers(model)
    called = [e.operation for e in fusednn.explain(model, x)]
    assert called == ["lstm_cell_forward"] * 2 + ["gru_cell_forward"] * 4
    fusednn.restore_layers(model)
    assert len(fusednn.explain(model, x)) == 0


def test_state_is_untouched(model):
    model.first.register_buffer("extra", torch.ones(2), persistent=False)
    model.rest[0].weight_hh.requires_grad_(False)
    model.named["own"].eval()
    parameters, training = list(model.parameters()), [m.training for m in model.modules()]
    state = model.state_dict()
    for change in (fusednn.replace_layers, fusednn.restore_layers):
        change(model)
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        assert [m.training for m in model.modules()] == training
        assert list(model.state_dict()) == list(state)
        assert all(t.data_ptr() == state[k].data_ptr() for k, t in model.state_dict().items())
        assert not model.rest[0].weight_hh.requires_grad
        assert model.first.extra is dict(model.named_buffers())["first.extra"]
    Decoder().load_state_dict(state)


def test_restore_gives_back_what_was_replaced_and_no_more(model):
    model.rest[1][1] = fusednn.GRUCell(7, 3)
    fusednn.replace_layers(model)
    report = fusednn.restore_layers(model)
    assert "built as such" in reason(report, "rest.1.1")
    assert {e.now for e in report.changed} == {nn.LSTMCell, nn.GRUCell}
    assert type(model.rest[1][1]) is fusednn.GRUCell
    assert type(model.first) is nn.LSTMCell
    assert "_fusednn_replaces" not in vars(model.first)
    assert fusednn.restore_layers(model).changed == ()


def test_second_call_changes_nothing(model):
    fusednn.replace_layers(model)
    before = {name: dict(vars(m)) for name, m in model.named_modules()}
    report = fusednn.replace_layers(model)
    assert report.changed == ()
    assert reason(report, "first") == "already fusednn.LSTMCell"
    assert {name: dict(vars(m)) for name, m in model.named_modules()} == before
    assert len(fusednn.restore_layers(model).changed) == 4


@pytest.mark.parametrize(("torch_class", "fused_class"), PAIRS)
def test_the_model_itself(torch_class, fused_class):
    cell = torch_class(*ARGUMENTS[torch_class])
    report = fusednn.replace_layers(cell)
    assert type(cell) is fused_class
    assert "(the model itself)" in str(report)
    fusednn.restore_layers(cell)
    assert type(cell) is torch_class


def test_only_depthwise_convolutions_are_replaced():
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(1, 3, 3)
    )
    x = torch.randn(2, 8, 9, 9)
    expected = model[0](x)
    report = fusednn.replace_layers(model)
    assert [type(m) for m in model] == [
        fusednn.DepthwiseConv2d,
        nn.Conv2d,
        nn.Conv2d,
        fusednn.DepthwiseConv2d,
    ]
    assert reason(report, "1") == "not depthwise: got groups=1, expected groups = in_channels"
    assert reason(report, "2") == "not depthwise: got groups=4, expected groups = in_channels"
    torch.testing.assert_close(model[0](x), expected)
    assert [e.operation for e in fusednn.explain(model[0], x)] == ["depthwise_conv2d_forward"]
    fusednn.restore_layers(model)
    assert {type(m) for m in model} == {nn.Conv2d}


def test_attention_inside_torchs_transformer():
    model = nn.Transformer(8, 2, 2, 1, 12, dropout=0.0, batch_first=True).eval()
    source, target = torch.randn(2, 5, 8), torch.randn(2, 4, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = model(source, target, src_key_padding_mask=padding, memory_key_padding_mask=padding)
    state = list(model.state_dict())
    report = fusednn.replace_layers(model)
    assert {e.names[0] for e in report.changed} == {
        "encoder.layers.0",
        "encoder.layers.0.self_attn",
        "encoder.layers.1",
        "encoder.layers.1.self_attn",
        "decoder.layers.0.self_attn",
        "decoder.layers.0.multihead_attn",
    }
    assert type(model.decoder.layers[0]) is nn.TransformerDecoderLayer
    assert (
        type(model.encoder.layers[0].self_attn.out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear
    )
    assert list(model.state_dict()) == state
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            arguments = (source, target)
            masks = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}
            torch.testing.assert_close(model(*arguments, **masks), expected)
            called = [e.operation for e in fusednn.explain(model, *arguments, **masks)]
            assert called.count("attention_forward") == 4
    fusednn.restore_layers(model)
    assert type(model.encoder.layers[0].self_attn) is nn.MultiheadAttention
    torch.testing.assert_close(model(source, target, **masks), expected)


def test_an_encoder_layer_without_its_attention():
    """Either may be swapped alone."""
    for chosen in ("", "self_attn"):
        torch.manual_seed(0)
        layer, x = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), torch.randn(2, 5, 8)
        expected = layer(x)
        report = fusednn.replace_layers(layer, include=lambda name, _, chosen=chosen: name == chosen)
        assert [e.names[0] for e in report.changed] == [chosen]
        torch.testing.assert_close(layer(x), expected)
        with torch.no_grad():
            torch.testing.assert_close(layer.eval()(x), expected)


def test_references_outside_the_module_tree_follow(model):
    held = [model.first]
    bound = model.first.forward
    fusednn.replace_layers(model)
    assert type(held[0]) is fusednn.LSTMCell
    assert bound.__self__ is model.first


def test_tied_weights_stay_tied():
    model = nn.ModuleList([nn.GRUCell(4, 4), nn.GRUCell(4, 4)])
    model[1].weight_hh = model[0].weight_hh
    fusednn.replace_layers(model)
    assert model[0].weight_hh is model[1].weight_hh
    with torch.no_grad():
        model[0].weight_hh.zero_()
    assert not model[1].weight_hh.any()


@pytest.mark.parametrize(
    ("include", "exclude", "changed"),
    [
        ("first", (), {"first"}),
        ("rest.*", (), {"rest.0", "rest.1.1"}),
        ("named.again", (), {"rest.0"}),
        (nn.LSTMCell, (), {"first"}),
        (None, nn.GRUCell, {"first"}),
        (None, ["first", "named.again"], {"rest.1.1", "named.own"}),
        (lambda name, module: module.hidden_size == 3, (), {"rest.1.1", "named.own"}),
        (["rest.*", nn.LSTMCell], "rest.1.*", {"first", "rest.0"}),
        ([], (), set()),
    ],
)
def test_filters(model, include, exclude, changed):
    report = fusednn.replace_layers(model, include=include, exclude=exclude)
    assert {e.names[0] for e in report.changed} == changed
    assert all(e.reason for e in report.unchanged)
    assert len(report.entries) == 4
    modules = dict(model.named_modules())
    assert {n for n, m in modules.items() if type(m) in REPLACEMENTS.values()} == changed


def test_reasons_name_the_filter(model):
    report = fusednn.replace_layers(model, include=["first", "rest.0"], exclude="rest.?")
    assert reason(report, "rest.0") == "excluded by 'rest.?'"
    assert reason(report, "named.own") == "not in include"


def test_a_filter_that_matches_nothing_is_reported(model):
    report = fusednn.replace_layers(model, include=["first", "decodr.*"], exclude=nn.RNN)
    assert report.unused == ("include 'decodr.*'", "exclude torch.nn.RNN")
    assert "include 'decodr.*' matched no candidate" in str(report)


@pytest.mark.parametrize("bad", [3, [3], int, [None]])
def test_bad_filters_raise_before_anything_is_swapped(model, bad):
    for argument in ("include", "exclude"):
        with pytest.raises(TypeError, match=argument):
            fusednn.replace_layers(model, **{argument: bad})
    assert classes(model) == {nn.LSTMCell, nn.GRUCell}


def test_a_predicate_that_raises_leaves_the_model_whole(model):
    def broken(name, module):
        if name == "named.own":
            raise KeyError(name)
        return True

    with pytest.raises(KeyError):
        fusednn.replace_layers(model, include=broken)
    assert classes(model) == {nn.LSTMCell, nn.GRUCell}


@pytest.mark.parametrize("change", [fusednn.replace_layers, fusednn.restore_layers])
def test_no_module(change):
    with pytest.raises(TypeError, match="got dict, expected"):
        change({})


def test_subclasses_and_overridden_forwards_stay():
    class Noisy(nn.LSTMCell):
        def forward(self, input, hx=None):
            return super().forward(input + 1, hx)

    model = nn.ModuleList([Noisy(2, 2), nn.GRUCell(2, 2), nn.GRUCell(2, 2)])
    model[1].forward = lambda input, hx=None: input
    report = fusednn.replace_layers(model)
    assert "subclass of torch.nn.LSTMCell" in reason(report, "0")
    assert "assigned on the instance" in reason(report, "1")
    assert [type(m) for m in model] == [Noisy, nn.GRUCell, fusednn.GRUCell]


def test_a_forward_assigned_after_replacing_stops_the_restore():
    cell = nn.GRUCell(2, 2)
    fusednn.replace_layers(cell)
    cell.forward = lambda input, hx=None: input
    assert "assigned on the instance" in reason(fusednn.restore_layers(cell), "")
    del cell.forward
    assert fusednn.restore_layers(cell).changed


def test_hooks_still_run():
    cell, seen = nn.GRUCell(3, 3), []
    cell.register_forward_pre_hook(lambda m, args: seen.append("before"))
    cell.register_forward_hook(lambda m, args, out: seen.append(type(m)))
    cell.register_full_backward_hook(lambda m, grads, _: seen.append("backward"))
    fusednn.replace_layers(cell)
    cell(torch.randn(2, 3, requires_grad=True)).sum().backward()
    assert seen == ["before", fusednn.GRUCell, "backward"]


@pytest.mark.parametrize("normalise", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_layers(normalise):
    torch.manual_seed(0)
    cell = normalise(nn.LSTMCell(4, 4), "weight_hh").eval()
    twin = copy.deepcopy(cell)
    x = torch.randn(3, 4)
    keys = list(cell.state_dict())
    report = fusednn.replace_layers(cell)
    assert (report.entries[0].was, report.entries[0].now) == (nn.LSTMCell, fusednn.LSTMCell)
    assert isinstance(cell, fusednn.LSTMCell)
    assert not isinstance(twin, fusednn.LSTMCell)
    assert list(cell.state_dict()) == keys
    torch.testing.assert_close(cell(x), twin(x))
    sum(cell(x)).sum().backward()
    sum(twin(x)).sum().backward()
    for ours, theirs in zip(cell.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert isinstance(copy.deepcopy(cell), fusednn.LSTMCell)
    fusednn.restore_layers(cell)
    assert not isinstance(cell, fusednn.LSTMCell)
    torch.testing.assert_close(cell(x), twin(x))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_norm_by_hook():
    cell, x = nn.utils.weight_norm(nn.LSTMCell(4, 4), "weight_hh"), torch.randn(3, 4)
    expected = cell(x)
    fusednn.replace_layers(cell)
    torch.testing.assert_close(cell(x), expected)
    with torch.no_grad():
        cell.weight_hh_g.mul_(2)
        cell.weight_ih.mul_(2)
    ours = cell(x, expected)
    fusednn.restore_layers(cell)
    torch.testing.assert_close(ours, cell(x, expected))


def test_parametrization_put_on_or_off_between_replace_and_restore():
    cell = parametrizations.weight_norm(nn.LSTMCell(4, 4), "weight_hh")
    fusednn.replace_layers(cell)
    parametrize.remove_parametrizations(cell, "weight_hh")
    assert type(cell) is fusednn.LSTMCell
    parametrizations.weight_norm(cell, "weight_ih")
    fusednn.restore_layers(cell)
    parametrize.remove_parametrizations(cell, "weight_ih")
    assert type(cell) is nn.LSTMCell


def test_an_optimizer_made_before_still_trains(model):
    reference = copy.deepcopy(model)
    x = torch.randn(4, 5)

    def train(m: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = m(x).square().sum()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    expected = train(reference, torch.optim.Adam(reference.parameters(), lr=0.02))
    fusednn.replace_layers(model)
    assert train(model, optimizer) == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < expected[0]


def test_deepcopy_and_pickle(model):
    x = torch.randn(4, 5)
    fusednn.replace_layers(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert classes(twin) == {fusednn.LSTMCell, fusednn.GRUCell}
        torch.testing.assert_close(twin(x), model(x))
        assert twin.rest[0] is twin.named["again"]
        assert len(fusednn.restore_layers(twin).changed) == 4
        assert classes(twin) == {nn.LSTMCell, nn.GRUCell}
    assert classes(model) == {fusednn.LSTMCell, fusednn.GRUCell}


def test_inside_a_compiled_model(model):
    x = torch.randn(4, 5)
    compiled = torch.compile(model, backend="eager")
    expected = compiled(x)
    fusednn.replace_layers(compiled)
    assert type(model.first) is fusednn.LSTMCell
    torch.testing.assert_close(compiled(x), expected)
    with fusednn.use_backend("reference"):
        torch.testing.assert_close(compiled(x), expected)


def test_a_layer_compiled_by_itself_takes_the_new_forward():
    cell, x = nn.GRUCell(3, 3), torch.randn(2, 3)
    cell.compile(backend="eager")
    expected = cell(x)
    fusednn.replace_layers(cell)
    assert len(fusednn.explain(cell, x)) > 0
    torch.testing.assert_close(cell(x), expected)


def test_text():
    model = nn.ModuleDict({"a": nn.LSTMCell(2, 2), "b": nn.GRUCell(2, 2)})
    assert str(fusednn.replace_layers(model, exclude="b")) == (
        "1 of 2 candidates changed\n"
        "  a: torch.nn.LSTMCell -> fusednn.LSTMCell\n"
        "  b: torch.nn.GRUCell stays: excluded by 'b'"
    )


def test_equal_lines_are_grouped():
    layers = [nn.Conv2d(width, width, 3, groups=width) for width in (2, 4, 8)]
    pointwise = [nn.Conv2d(width, 2 * width, 1) for width in (2, 4, 8, 16)]
    report = fusednn.replace_layers(nn.Sequential(*layers, nn.LSTMCell(2, 2), *pointwise))
    assert repr(report) == (
        "4 of 8 candidates changed\n"
        "  3 x torch.nn.Conv2d -> fusednn.DepthwiseConv2d: 0 … 2\n"
        "  3: torch.nn.LSTMCell -> fusednn.LSTMCell\n"
        "  4 x torch.nn.Conv2d stays: not depthwise: got groups=1, expected groups = in_channels: 4 … 7"
    )
    assert repr(report.entries[3]) == "3: torch.nn.LSTMCell -> fusednn.LSTMCell"
    assert [e.names for e in report.changed] == [("0",), ("1",), ("2",), ("3",)]
