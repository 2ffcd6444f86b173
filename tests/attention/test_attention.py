"""Results and gradients against PyTorch's operations: masks, options, lengths, sizes, layouts, dtypes."""

from typing import Any

import pytest
import torch

from .cases import DTYPES, check, fused_step, make, run
from .conftest import trains

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

MASKS = [
    f"{kind} {sizes}"
    for kind in ("bool", "float")
    for sizes in (
        "bhls", "bhls transposed", "bhls strided", "b1ls", "b1ls expanded", "1hls", "11ls", "11ls expanded",
        "b11s", "1h1s", "bhl1", "111s expanded", "1111",
    )
]  # fmt: skip

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "weights": {"weights": "mean"},
    "weights of heads": {"weights": "heads"},
    "causal": {"window": (-1, 0)},
    "causal weights": {"window": (-1, 0), "weights": "mean"},
    "causal from the bottom": {"window": (-1, 0), "offset": 4},
    "causal above the keys": {"window": (-1, 0), "offset": -3, "weights": "heads"},
    "window": {"window": (2, 3)},
    "window to the left": {"window": (3, 0), "offset": 4, "weights": "mean"},
    "window to the right": {"window": (-1, 2)},
    "window of one": {"window": (0, 0), "offset": 1},
    "window beyond the keys": {"window": (2, 2), "offset": 20, "weights": "mean"},
    "softcap": {"softcap": 1.5},
    "softcap weights": {"softcap": 0.7, "weights": "heads", "window": (-1, 0)},
    "alibi": {"alibi": True},
    "alibi causal": {"alibi": True, "window": (-1, 0), "offset": 4, "weights": "mean"},
    "grouped": {"groups": 2},
    "one key head": {"groups": 1, "weights": "mean"},
    "grouped masked": {"heads": 6, "groups": 2, "mask": "float 1h1s", "weights": "heads"},
    "bool padding": {"key_mask": "bool"},
    "float padding": {"key_mask": "float", "weights": "mean"},
    "bool padding and weights": {"key_mask": "bool", "weights": "mean", "window": (-1, 0)},
    "bool both": {"key_mask": "bool", "mask": "bool 11ls", "weights": "mean"},
    "float both": {"key_mask": "float", "mask": "float b1ls"},
    "bool on float": {"key_mask": "bool", "mask": "float bhls", "weights": "heads"},
    "float on bool": {"key_mask": "float", "mask": "bool bhls", "window": (4, 0), "offset": 2},
    "extra": {"extra": 1},
    "two extra": {"extra": 2, "weights": "mean", "groups": 2},
    "extra padding": {"extra": 1, "weights": "heads", "key_mask": "bool", "window": (-1, 0)},
    "extra of everything else": {"extra": 2, "mask": "float 1hls", "alibi": True, "softcap": 2.0},
    "dropout": {"dropout": 0.4},
    "dropout weights": {"dropout": 0.2, "weights": "mean", "extra": 1, "mask": "float b1ls"},
    "dropout grouped": {"dropout": 0.2, "weights": "heads", "groups": 2, "key_mask": "bool"},
    "values of another size": {"value_size": 20, "weights": "mean"},
    "one value": {"value_size": 1, "size": 16},
    "everything": {
        "heads": 6, "groups": 3, "mask": "float b1ls", "key_mask": "float", "extra": 1, "alibi": True,
        "window": (5, 3), "offset": 2, "softcap": 3.0, "dropout": 0.2, "weights": "mean", "value_size": 12,
    },
}  # fmt: skip


@pytest.mark.in_turn("case")
@every_dtype
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_torch(place, case, dtype):
    check(make(**CASES[case], dtype=dtype, device=place.device), backward=trains(place))


@pytest.mark.in_turn("case")
@every_dtype
@pytest.mark.parametrize("case", MASKS)
def test_masks(place, case, dtype):
    """Of every shape that broadcasts: what is broadcast, strided or transposed is read where it is."""
    check(make(mask=case, weights="mean", dtype=dtype, device=place.device), backward=trains(place))


# Around the tiles that kernels take: 16, 64, 96, 128, 512.
LENGTHS = [
    (0, 5),
    (5, 0),
    (0, 0),
    (1, 1),
    (1, 65),
    (2, 513),
    (15, 17),
    (16, 16),
    (17, 63),
    (63, 64),
    (64, 97),
    (65, 15),
    (95, 96),
    (97, 129),
    (129, 31),
    (130, 1),
]
LENGTH_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"window": (-1, 0)},
    "causal from the bottom": {"window": (-1, 0), "offset": "end"},
    "padded weights": {"key_mask": "bool", "weights": "mean"},
    "window": {"window": (20, 7), "extra": 1, "weights": "mean"},
    "mask": {"mask": "float b1ls"},
}


@pytest.mark.in_turn("case")
@pytest.mark.parametrize("options", LENGTH_OPTIONS)
@pytest.mark.parametrize("case", LENGTHS, ids=lambda case: f"{case[0]}x{case[1]}")
def test_lengths(place, case, options):
    rows, columns = case
    given = dict(LENGTH_OPTIONS[options])
    if given.get("offset") == "end":
        given["offset"] = columns - rows
    sizes = {"batch": 1, "heads": 2, "rows": rows, "columns": columns}
    check(make(**sizes, **given, device=place.device), backward=trains(place))


SIZES = [(1, 1), (8, 8), (40, 40), (64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (64, 24), (8, 130)]


@pytest.mark.in_turn("case")
@every_dtype
@pytest.mark.parametrize("case", SIZES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_head_sizes(place, case, dtype):
    sizes = {"rows": 17, "columns": 35, "size": case[0], "value_size": case[1]}
    options = {"batch": 1, "heads": 2, "key_mask": "bool", "weights": "mean", "dtype": dtype}
    check(make(**sizes, **options, device=place.device), backward=trains(place))


def every_other(t: torch.Tensor) -> torch.Tensor:
    """Values two apart in the last dimension."""
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan, dtype=t.dtype, device=t.device)
    wide[..., ::2] = t
    return wide[..., ::2]


def offset(t: torch.Tensor) -> torch.Tensor:
    """Contiguous, one element past an aligned address."""
    flat = torch.full((t.numel() + 1,), torch.nan, dtype=t.dtype, device=t.device)
    flat[1:] = t.flatten()
    return flat[1:].view(t.shape)


def reversed_order(t: torch.Tensor) -> torch.Tensor:
    """Dimensions in reverse order in memory."""
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


def part_of_rows(t: torch.Tensor) -> torch.Tensor:
    """Behind each row something that is not the tensor's, as in a projection that is cut into three."""
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 3), torch.nan, dtype=t.dtype, device=t.device)
    wide[..., : t.shape[-1]] = t
    return wide[..., : t.shape[-1]]


LAYOUTS = {f.__name__: f for f in (torch.clone, every_other, offset, reversed_order, part_of_rows)}


@pytest.mark.in_turn("case")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LAYOUTS)
def test_layouts(place, case, dtype):
    """Of all tensors and of the results' gradients, at once and one by one."""
    options = {"mask": "float bhls", "key_mask": "float", "extra": 1, "groups": 2, "weights": "mean"}
    work = make(**options, dtype=dtype, device=place.device)
    layout, backward = LAYOUTS[case], trains(place)
    check(work.map(layout), backward=backward)
    if not place.slow:
        for name, t in work.tensors.items():
            check(work.with_(**{name: layout(t)}), f"{name}: ", backward)
        for name, g in work.grads.items():
            check(work.where(grads={**work.grads, name: layout(g)}), f"gradient of {name}: ", backward)


EXPANDED = {
    "key": lambda t: t[:1].expand(t.shape),
    "value": lambda t: t[:, :1].expand(t.shape),
    "query": lambda t: t[:, :, :1].expand(t.shape),
    "extra_key": lambda t: t[..., :1].expand(t.shape),
    "key_mask": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.natively
@pytest.mark.parametrize("case", EXPANDED)
def test_expanded(place, case):
    """Elements that share memory: as copies of them give, gradients of all included."""
    options = {"key_mask": "float", "extra": 2, "weights": "mean"}
    work = make(**options, device=place.device)
    expanded = EXPANDED[case](work.tensors[case])
    wanted = None if trains(place) else ()
    found = run(fused_step, work.with_(**{case: expanded}), wanted)
    copied = run(fused_step, work.with_(**{case: expanded.clone()}), wanted)
    for name, t in copied.items():
        torch.testing.assert_close(found[name], t, msg=lambda m, n=name: f"{n}: {m}")
    check(work.with_(**{case: expanded}), backward=trains(place))


def test_expanded_gradients(training_place):
    """The gradient of a sum is one number, expanded."""
    work = make(weights="mean", key_mask="bool", device=training_place.device)
    check(work.where(grads={name: g.flatten()[:1].expand(g.shape) for name, g in work.grads.items()}))


GIVEN = [("output",), ("lse",), ("weights",), ("output", "lse"), ("output", "weights"), ("lse", "weights")]


@pytest.mark.in_turn("case")
@pytest.mark.parametrize("kind", ["mean", "heads"])
@pytest.mark.parametrize("case", GIVEN, ids="-".join)
def test_gradients_of_some_results(training_place, case, kind):
    """Each result alone and in pairs: what has no gradient adds nothing."""
    options = {"mask": "float b1ls", "dropout": 0.2, "extra": 1}
    work = make(weights=kind, **options, device=training_place.device)
    check(work.where(grads={name: work.grads[name] for name in case}))


@pytest.mark.parametrize("case", ["query", "key", "value", "mask", "key_mask", "extra_key", "extra_value"])
def test_gradients_of_some_tensors(training_place, case):
    """One is wanted, or all but one: as when all are."""
    options = {"mask": "float 1h1s", "key_mask": "float", "extra": 1, "weights": "mean"}
    work = make(**options, device=training_place.device)
    every = run(fused_step, work)
    others = [name for name in work.tensors if name != case]
    for wanted in ([case],) if training_place.slow else ([case], others):
        found = run(fused_step, work, wanted)
        assert {n for n in found if n.startswith("grad")} == {f"grad of {n}" for n in wanted}
        for name, t in found.items():
            torch.testing.assert_close(t, every[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", [1, 3, 5], ids=lambda heads: f"{heads} heads")
def test_output_lies_as_torchs_does(place, case):
    """[B, L, H, V] in memory, so that heads merge without a copy; whatever the layout of the queries."""
    for layout in LAYOUTS.values():
        work = make(heads=case, weights="heads", device=place.device).map(layout)
        found = run(fused_step, work, ())
        assert found["output"].transpose(1, 2).is_contiguous()
        assert found["lse"].is_contiguous()
        assert found["weights"].is_contiguous()
        q, k, v = (
            work.tensors[name].transpose(1, 2).contiguous().transpose(1, 2)
            for name in ("query", "key", "value")
        )
        theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        assert theirs.transpose(1, 2).is_contiguous()
