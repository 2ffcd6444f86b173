"""What only the kernels of devices have: parts of a sample, partial sums, packs, calls that never wait."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fusednn
from fusednn.core import native as _native
from fusednn.core.op import OPS
from fusednn.functional import spatial_attention, spatial_softmax
from fusednn.recurrence import plan
from tests.recurrence.test_attention_lstm import OPTIONS, as_state, build, flat, step
from tests.registry import cases_of as op_cases

from .cases import DTYPES, OUTPUTS, SCORES, check, fused_step, make, run

every_score = pytest.mark.parametrize("score", SCORES)
every_output = pytest.mark.parametrize("output", OUTPUTS)
formats = pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])


def repeated(work, times: int):
    """`times` copies of a work's one sample, whose weights then get as many times the gradient."""

    def each(name: str, t: Tensor | None) -> Tensor | None:
        if t is None or name not in ("features", "hidden_term"):
            return t
        last = t.dim() == 4 and not t.is_contiguous()
        t = t.expand(times, *t.shape[1:])
        return t.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

    made = work.with_(**{name: each(name, t) for name, t in work.tensors.items()})
    object.__setattr__(made, "grads", tuple(g.expand(times, *g.shape[1:]).contiguous() for g in work.grads))
    if work.mask is not None:
        object.__setattr__(made, "mask", work.mask.expand(times, -1, -1, -1).contiguous())
    return made


@every_score
@every_output
@formats
def test_parts_agree_with_whole_samples(device_place, score, output, last):
    """Alone, a sample of 1300 positions is shared by blocks; in a batch of 260 it is a block's."""
    work = make((1, 3, 50, 26), score, output, 1, True, dtype=torch.float64, last=last)
    work = work.map(lambda t: t.to(device_place.device))
    object.__setattr__(work, "mask", work.mask.to(device_place.device))
    if last:
        work.mask[:, :, :25] = False  # nothing to attend to in the first part
    alone, together = run(fused_step, work), run(fused_step, repeated(work, 260))
    for name, t in together.items():
        if name in ("grad of weight", "grad of v", "grad of temperature"):
            torch.testing.assert_close(
                t / 260, alone[name], rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )
            continue
        assert t[:1].equal(t[-1:]), name
        torch.testing.assert_close(
            t[:1], alone[name], rtol=1e-12, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}"
        )


@every_output
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_in_every_dtype(device_place, output, dtype):
    check(make((2, 9, 41, 37), "positional", output, 2, True, dtype=dtype, device=device_place.device))


def test_parts_with_infinite_scores(device_place):
    """Parts of nothing but -inf; all of them; one +inf, which makes its own sample NaN."""
    logits = torch.randn(4, 1, 40, 40, device=device_place.device)
    logits[0, :, :30], logits[1], logits[2, :, 35, 3] = -torch.inf, -torch.inf, torch.inf
    a, xy = spatial_softmax(logits, temperature=0.5, return_coordinates=True)
    expected = (logits.flatten(2) / 0.5).softmax(-1).view_as(a)
    torch.testing.assert_close(a[[0, 3]], expected[[0, 3]])
    assert a[0, :, :30].eq(0).all()
    assert a[1].eq(0).all()
    assert xy[1].eq(0).all()
    assert a[2].isnan().any()
    assert xy[[0, 3]].isfinite().all()


def test_large_scores_of_one_part(device_place):
    """The largest score of all rules: weights of other parts vanish, and none overflows."""
    logits = torch.randn(1, 1, 40, 40, device=device_place.device)
    logits[..., 39, 39] = 3e38
    a = spatial_softmax(logits, temperature=1e-3)
    assert a[..., 39, 39] == 1
    assert a.sum() == 1


def test_more_samples_than_blocks(device_place):
    """A block adds up the weight gradients of several samples."""
    work = make((4100, 2, 2, 3), output="sum", dtype=torch.float64, device=device_place.device)
    found = run(fused_step, work)
    with fusednn.use_backend("reference"):
        expected = run(fused_step, work)
    for name, t in found.items():
        scale = expected[name].abs().max().clamp(min=1)
        torch.testing.assert_close(t / scale, expected[name] / scale, rtol=0, atol=1e-13, msg=name)


@every_output
@formats
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned_storage(device_place, output, last, dtype):
    """Where packs would fit but for the address, single elements give the same bits."""
    work = make((2, 8, 4, 6), output=output, masked=True, dtype=dtype, last=last, device=device_place.device)

    def moved(t: Tensor) -> Tensor:
        storage = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
        return storage[1:].as_strided(t.shape, t.stride(), 1).copy_(t)

    found = run(fused_step, work.map(lambda t: moved(t) if t.dim() else t))
    for name, t in run(fused_step, work).items():
        assert t.equal(found[name]), name


@pytest.mark.parametrize(
    "last", [pytest.param(False, marks=pytest.mark.thorough), True], ids=["NCHW", "NHWC"]
)
def test_offsets_beyond_2_to_the_31(device_place, last):
    """All positions but a few are masked, and their features never read: memory that nobody has touched.

    Sums over positions take long in the emulator, NCHW: there the map is what is looked at.
    """
    channels, height, width = (8192, 600, 450) if last else (4096, 800, 660)
    count, positions = channels * height * width, height * width
    assert count > 1 << 31
    if device_place.device == "cpu":
        storage = torch.from_numpy(np.zeros(count, np.float16))  # pages exist where they were written
    else:
        storage = torch.zeros(count, dtype=torch.float16, device=device_place.device)
    size = (1, height, width, channels) if last else (1, channels, height, width)
    features = storage.view(size).permute(0, 3, 1, 2) if last else storage.view(size)
    places = [3, positions - 2, positions - 1]
    mask = torch.zeros(1, positions, dtype=torch.bool, device=storage.device)
    mask[:, places] = True
    f = torch.randn(channels, len(places)).half().to(storage.device)
    for i, p in enumerate(places):
        features[0, :, p // width, p % width] = f[:, i]
    weight = torch.randn(1, channels).half().to(storage.device) / channels**0.5
    args = (features, weight, None, None, mask, None, 0.5, "sum" if last else "coordinates")
    out, map = torch.ops.fusednn.spatial_attention_forward(*args)
    small = ((weight.double() @ f.double()) / 0.5).softmax(-1)
    torch.testing.assert_close(map.flatten()[places].double(), small[0], rtol=2e-3, atol=1e-5)
    assert map.count_nonzero() <= len(places)
    if not last:
        return
    torch.testing.assert_close(out[0].double(), (small @ f.double().t())[0], rtol=4e-3, atol=4e-3)
    grad = torch.randn(out.shape).half().to(storage.device)
    wanted = (False, True, False, False, False)
    found = torch.ops.fusednn.spatial_attention_backward(grad, None, *args, map, wanted)[1]
    d_map = grad[0].double() @ f.double()
    d_s = small[0] * (d_map - (d_map * small[0]).sum()) / 0.5
    expected = d_s @ f.double().t()
    torch.testing.assert_close(
        found[0].double(), expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item()
    )


def test_no_positions_lie_beyond_an_int(device_place):
    """What the kernels count in an int is refused, not wrapped."""
    features = torch.zeros(1, 1, 1, 1, device=device_place.device).expand(1, 1, 2**15, 2**15)
    with pytest.raises(RuntimeError, match=r"positions: got|fewer than 2\^29 positions"):
        spatial_attention(features, torch.zeros(1, 1, device=device_place.device))


# Channels, height, width and hidden units, of which one is beyond a block's threads or their packs.
SIZES = [(3, 45, 47, 2), (3, 2, 2, 600), (2100, 2, 2, 2), (5, 1, 1, 1), (4, 23, 23, 8)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(o.values()))
@pytest.mark.parametrize("form", ["hoisted", "direct"])
def test_recurrence_of_any_size(device_recurrence, sizes, options, form, monkeypatch):
    """More columns than threads hold at a time, fewer than a pack: as the reference."""
    monkeypatch.setattr(plan, "resolve", lambda _, *rest: form)
    channels, height, width, hidden = sizes
    torch.manual_seed(4)
    device = device_recurrence.device
    module = fusednn.AttentionLSTM(
        channels,
        height,
        width,
        hidden,
        **options,
        temperature=0.7,
        learn_temperature=True,
        dtype=torch.float64,
    ).to(device)
    tensors = [torch.randn(2, 2, channels, height, width, dtype=torch.float64, device=device)]
    for _ in range(2 if options["cell"] == "lstm" else 1):
        tensors.append(torch.randn(2, hidden, dtype=torch.float64, device=device))
    found = step(module, module, tensors, lengths=[2, 1])
    with fusednn.use_backend("reference"):
        expected = step(module, module, tensors, lengths=[2, 1])
    for i, (a, e) in enumerate(zip(found, expected, strict=True)):
        scale = e.abs().max().clamp(min=1)
        torch.testing.assert_close(a / scale, e / scale, rtol=0, atol=1e-12, msg=lambda m, i=i: f"{i}: {m}")


@pytest.mark.parametrize("form", ["hoisted", "direct"])
def test_recurrence_repeats_in_every_bit(device_recurrence, form, monkeypatch):
    monkeypatch.setattr(plan, "resolve", lambda _, *rest: form)
    for options in OPTIONS:
        module = build(options, torch.float32, device_recurrence.device)
        states = 2 if options["cell"] == "lstm" else 1
        tensors = [torch.randn(3, 4, 3, 4, 3), *(torch.randn(3, 5) for _ in range(states))]
        tensors = [t.to(device_recurrence.device) for t in tensors]
        first = step(module, module, tensors)
        assert all(a.equal(b) for a, b in zip(step(module, module, tensors), first, strict=True))


def test_recurrence_beyond_the_kernels(device_recurrence):
    """A state that shared memory does not hold: refused by name, the reference's by `auto`; so are others."""
    device = device_recurrence.device
    module = fusednn.AttentionLSTM(2, 2, 2, 3000, output="sum").to(device)
    x = torch.randn(1, 1, 2, 2, 2, device=device)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="bytes of shared memory, expected at most"):
            module(x)
        with fusednn.use_backend("reference"):
            expected = flat(module(x))
        with fusednn.use_backend("auto"):
            torch.testing.assert_close(flat(module(x)), expected)
            told = fusednn.explain(module, x)[-1]
    assert any("shared memory" in reason for reason in told.passed_over["cuda"])


def test_auto_leaves_wide_states_to_torch(device_recurrence):
    """A block would read more weights in a step than one multiprocessor should, by prediction."""
    device = device_recurrence.device
    with torch.no_grad(), fusednn.use_backend("auto"):
        for hidden, leaves in ((64, False), (600, True)):
            module = fusednn.AttentionLSTM(2, 2, 2, hidden).to(device)
            told = fusednn.explain(module, torch.randn(1, 1, 2, 2, 2, device=device))[-1]
            reasons = told.passed_over.get("cuda", ())
            assert any("MiB of weights" in reason for reason in reasons) == leaves


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        assert not name.startswith(("_local_scalar_dense", "nonzero", "equal.")), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["attention_lstm_forward", "attention_lstm_backward"])
@pytest.mark.parametrize("kernels", [False, True], ids=["reference", "kernels"])
def test_nothing_waits_for_the_device(device_recurrence, name, kernels):
    """Lengths and a learned temperature stay where they are, so that a graph can capture the call."""
    function = OPS[name].reference
    if kernels:
        function = getattr(_native.cuda_modules[device_recurrence.device], name)
    for case, args in op_cases(name).items():
        args = [a.detach().to(device_recurrence.device) if isinstance(a, Tensor) else a for a in args]
        with NoWaiting(), torch.no_grad():
            function(*args)
        assert case


@pytest.mark.parametrize("options", OPTIONS[:2], ids=lambda o: " ".join(o.values()))
def test_capture_in_a_graph(device_recurrence, options):
    if device_recurrence.device != "cuda":
        pytest.skip("graphs are the device's")
    module = build(options, torch.float32, "cuda")
    x, state = torch.randn(3, 4, 3, 4, 3, device="cuda"), [torch.randn(3, 5, device="cuda") for _ in range(2)]
    lengths = torch.tensor([2, 4, 1], device="cuda")
    with torch.no_grad():
        expected = flat(module(x, as_state(state), lengths=lengths))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = flat(module(x, as_state(state), lengths=lengths))
        graph.replay()
    torch.testing.assert_close(found, expected)
