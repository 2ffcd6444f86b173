"""AttentionLSTM: both forms, streams, padded and packed sequences, against a loop of PyTorch's operations."""

import copy
import itertools
import pickle

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fusednn
from fusednn.functional import attention_lstm
from fusednn.recurrence import plan
from tests.spatial.cases import SCORES, torch_sequence

OPTIONS = [
    dict(zip(("score", "output", "cell"), values, strict=True))
    for values in itertools.product(SCORES, ("flatten", "sum"), ("lstm", "gru"))
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(o.values()))
FORMS = ("hoisted", "direct")


def build(options: dict, dtype=torch.float64, device="cpu") -> fusednn.AttentionLSTM:
    torch.manual_seed(1)
    module = fusednn.AttentionLSTM(
        3, 4, 3, 5, **options, temperature=0.6, learn_temperature=True, dtype=dtype
    )
    return module.to(device)


def inputs(options: dict, steps: int = 4, dtype=torch.float64, device="cpu") -> list[torch.Tensor]:
    """Frames [B, T, C, H, W], h and, of an LSTM, c."""
    torch.manual_seed(2)
    states = 2 if options.get("cell", "lstm") == "lstm" else 1
    made = [
        torch.randn(3, steps, 3, 4, 3, dtype=dtype),
        *(torch.randn(3, 5, dtype=dtype) for _ in range(states)),
    ]
    return [t.to(device) for t in made]


def as_state(states):
    return tuple(states) if len(states) == 2 else states[0]


def flat(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else [t for r in result for t in flat(r)]


def step(function, module, tensors, *args, **kwargs) -> list[torch.Tensor]:
    """Results of ``function(frames, state)`` and the gradients of frames, states and parameters."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    results = flat(function(leaves[0], as_state(leaves[1:]), *args, **kwargs))
    loss = sum(
        (r * torch.linspace(-1, 2, r.numel(), dtype=r.dtype).view_as(r).to(r.device)).sum() for r in results
    )
    return [*(r.detach() for r in results), *torch.autograd.grad(loss, [*leaves, *module.parameters()])]


@pytest.fixture(params=FORMS)
def form(request, monkeypatch) -> str:
    """Make ``auto`` one of the forms."""
    monkeypatch.setattr(plan, "resolve", lambda form, *_: request.param if form == "auto" else form)
    return request.param


@every_option
@pytest.mark.parametrize("lengths", [None, [2, 4, 1]], ids=["", "lengths"])
def test_is_a_loop_of_torchs_operations(recurrence_place, form, options, lengths):
    """Results and all gradients, to float64's rounding; each sequence as if it were alone."""
    module, tensors = (
        build(options, device=recurrence_place.device),
        inputs(options, device=recurrence_place.device),
    )
    actual = step(module, module, tensors, lengths=lengths)
    expected = step(lambda x, s: torch_sequence(module, x, s, lengths), module, tensors)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


@every_option
def test_forms_agree(recurrence_place, options, monkeypatch):
    module, tensors = (
        build(options, device=recurrence_place.device),
        inputs(options, device=recurrence_place.device),
    )
    found = []
    for form in FORMS:
        monkeypatch.setattr(plan, "resolve", lambda _, *rest, f=form: f)
        found.append(step(module, module, tensors))
    assert any(not a.equal(b) for a, b in zip(*found, strict=True)), "one form was taken twice"
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


@every_option
def test_streaming(recurrence_place, form, options):
    """Frame by frame, and in two pieces: the numbers and gradients of one call."""
    module, tensors = (
        build(options, device=recurrence_place.device),
        inputs(options, device=recurrence_place.device),
    )

    def frame_by_frame(x, state):
        hidden, maps = [], []
        for f in x.unbind(1):
            h, a, state = module.step(f, state)
            hidden.append(h)
            maps.append(a)
        return torch.stack(hidden, 1), torch.stack(maps, 1), state

    def in_two_pieces(x, state):
        h1, a1, state = module(x[:, :3], state)
        h2, a2, state = module(x[:, 3:], state)
        return torch.cat((h1, h2), 1), torch.cat((a1, a2), 1), state

    whole = step(module, module, tensors)
    for function in (frame_by_frame, in_two_pieces):
        torch.testing.assert_close(step(function, module, tensors), whole, rtol=1e-12, atol=1e-13)


@every_option
def test_ended_sequences(recurrence_place, form, options):
    """From its end on a sequence is 0, its state stays, and nothing of its frames is read."""
    module, tensors = (
        build(options, device=recurrence_place.device),
        inputs(options, device=recurrence_place.device),
    )
    lengths = torch.tensor([4, 2, 1])
    clean = step(module, module, tensors, lengths=lengths)
    ended = torch.arange(4) >= lengths[:, None]
    bad = [tensors[0].clone(), *tensors[1:]]
    bad[0][ended] = torch.nan
    for a, b in zip(step(module, module, bad, lengths=lengths), clean, strict=True):
        assert a.equal(b)
    hidden, maps, *states = clean[: 2 + len(tensors) - 1]
    d_frames = clean[2 + len(tensors) - 1]
    for t in (hidden, maps, d_frames):
        assert t[ended].eq(0).all()
        assert t[~ended].ne(0).any()
    assert states[0][1].equal(hidden[1, 1])
    assert states[0][2].equal(hidden[2, 0])


@pytest.mark.parametrize("options", OPTIONS[:2], ids=lambda o: " ".join(o.values()))
@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_packed_sequences(recurrence_place, options, enforce_sorted):
    module, tensors = (
        build(options, device=recurrence_place.device),
        inputs(options, device=recurrence_place.device),
    )
    lengths = [4, 3, 3] if enforce_sorted else [2, 4, 1]

    def packed(x, state):
        frames = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=enforce_sorted)
        hidden, maps, state = module(frames, state)
        assert isinstance(hidden, PackedSequence)
        assert hidden.batch_sizes.equal(frames.batch_sizes)
        unpacked, ends = pad_packed_sequence(hidden, batch_first=True, total_length=4)
        assert ends.tolist() == lengths
        return unpacked, pad_packed_sequence(maps, batch_first=True, total_length=4)[0], state

    expected = step(module, module, tensors, lengths=lengths)
    torch.testing.assert_close(step(packed, module, tensors), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[7]], ids=lambda o: " ".join(o.values()))
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)]
)
def test_dtypes(recurrence_place, form, options, dtype, tolerance):
    device = recurrence_place.device
    module, tensors = build(options, device=device).to(dtype), inputs(options, device=device)
    tensors = [t.to(dtype) for t in tensors]
    actual = step(module, module, tensors)
    wide = copy.deepcopy(module).double()
    expected = step(wide, wide, [t.double() for t in tensors])
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        assert (a.double() - e).abs().max() <= tolerance * e.abs().max().clamp(min=1)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_memory_formats_and_strides(recurrence_place, cell):
    options = {"cell": cell}
    module, tensors = (
        build(options, device=recurrence_place.device),
        inputs(options, device=recurrence_place.device),
    )
    x = tensors[0]
    expected = step(module, module, tensors)
    frames = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    layouts = {
        "channels last": frames.unflatten(0, x.shape[:2]),
        "steps first": x.transpose(0, 1).contiguous().transpose(0, 1),
        "every other": torch.stack((x, x), -1)[..., 0],
    }
    for name, layout in layouts.items():
        found = step(module, module, [layout, *tensors[1:]])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")
    leaf = frames.detach().requires_grad_()
    module(leaf.unflatten(0, x.shape[:2]))[0].sum().backward()
    assert leaf.grad.is_contiguous(memory_format=torch.channels_last)


def test_default_state_is_zeros(recurrence_place):
    for cell in ("lstm", "gru"):
        module = build({"cell": cell}, device=recurrence_place.device)
        x, *states = inputs({"cell": cell}, device=recurrence_place.device)
        zeros = as_state([torch.zeros_like(s) for s in states])
        torch.testing.assert_close(flat(module(x)), flat(module(x, zeros)))


def test_one_position_and_no_sequences(recurrence_place):
    module = fusednn.AttentionLSTM(1, 1, 1, 2).to(recurrence_place.device)
    hidden, maps, (h, c) = module(torch.randn(2, 3, 1, 1, 1, device=recurrence_place.device))
    assert maps.eq(1).all()
    assert h.equal(hidden[:, -1])
    assert c.ne(0).any()
    hidden, maps, _ = module(torch.randn(0, 3, 1, 1, 1, device=recurrence_place.device))
    assert hidden.shape == (0, 3, 2)
    assert maps.shape == (0, 3, 1, 1, 1)


def test_state_dict_and_copies():
    module = build(OPTIONS[0])
    names = "log_temperature score.weight hidden.weight hidden.bias"
    expected = [f"attention.{n}" for n in names.split()]
    expected += [f"cell.{n}" for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    assert list(module.state_dict()) == expected
    tensors = inputs(OPTIONS[0])
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(flat(copied(tensors[0])), flat(module(tensors[0])))


def test_without_biases(recurrence_place):
    module, (x, h, c) = build({}), inputs({})
    attention, cell = module.attention, module.cell
    weights = (attention.score.weight.flatten(1), attention.hidden.weight, cell.weight_ih, cell.weight_hh)
    found = [attention_lstm(x, (h, c), *weights, temperature=0.6, form=form) for form in FORMS]
    torch.testing.assert_close(flat(found[0]), flat(found[1]))
    zeros = [torch.zeros_like(b) for b in (attention.hidden.bias, cell.bias_ih, cell.bias_hh)]
    biased = attention_lstm(x, (h, c), *weights, *zeros, temperature=0.6)
    torch.testing.assert_close(flat(found[0]), flat(biased))


def test_plan_counts_bytes():
    """The flagship's sequence hoists, one frame of it does not, nor does what wouldn't fit."""
    sequence = plan.plan(4, 20, 64, 200, 512, "flatten", 4)
    weight = 512 * 64 * 200
    assert sequence.form == "hoisted"
    assert sequence.hoisted_bytes == 4 * (weight + 2 * 4 * 20 * 200 * 512)
    assert sequence.direct_bytes == 4 * 20 * (weight + 2 * 4 * 64 * 200)
    assert plan.plan(4, 1, 64, 200, 512, "flatten", 4).form == "direct"
    assert plan.plan(4, 20, 64, 200, 512, "sum", 4).form == "direct"
    assert plan.plan(64, 20, 64, 200, 512, "flatten", 4).form == "direct"
    huge = plan.plan(16, 500, 64, 200, 512, "flatten", 4)
    assert huge.form == "direct"
    assert "at most" in huge.reasons()["hoisted"][0]
    assert plan.resolve("hoisted", (1, 1, 1, 1, 1), 4, "sum", 4) == "hoisted"


def test_explain_shows_the_plan():
    with torch.no_grad():
        module = fusednn.AttentionLSTM(16, 5, 4, 4)
        for steps, form, other in ((6, "hoisted", "direct"), (1, "direct", "hoisted")):
            shown = fusednn.explain(module, torch.randn(1, steps, 16, 5, 4))
            assert shown[0].operation == "attention_lstm form"
            assert shown[0].backend == form
            assert "MB" in shown[0].passed_over[other][0]
            assert shown[1].operation == "attention_lstm_forward"
    assert "hoisted" in str(shown)


def test_what_is_kept_is_small(recurrence_place):
    """Maps, states and gates, not the attended frames or the hoisted products."""
    module = fusednn.AttentionLSTM(8, 6, 5, 4).to(recurrence_place.device)
    x = torch.randn(2, 7, 8, 6, 5, device=recurrence_place.device, requires_grad=True)
    kept = {}

    def pack(t):
        kept[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    own = x.numel() + sum(p.numel() for p in module.parameters())
    frames, steps, size, positions = 2, 7, 4, 30
    extra = frames * steps * (positions + 6 * size) + 2 * frames * size
    assert sum(kept.values()) <= own + extra
