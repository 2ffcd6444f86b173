"""What the Triton kernels do beyond a tile: many tiles of a sample, and offsets beyond 2^31 elements."""

import functools

import pytest
import torch

import fusednn
from fusednn.core.op import OPS
from tests.places import ALL, INTERPRETED, running_on

from .cases import check, fused_step, make, run
from .test_softmax import composed, fused, results

pytestmark = pytest.mark.interpreter
INTERPRETER = next(place for place in ALL if place.name == "triton-interpreted")


@pytest.fixture
def kernels():
    """Return the module of the call's plan; all calls are Triton's."""
    assert INTERPRETED
    with running_on(INTERPRETER):
        from fusednn.triton_kernels.spatial import call as spatial_call

        yield spatial_call


@pytest.fixture
def small_tiles(kernels, monkeypatch):
    """Let a program take 16 positions at a time, 4 channels, and 16 rows of a product."""
    monkeypatch.setattr(kernels, "MOST_POSITIONS", 16)
    monkeypatch.setattr(kernels, "TILE", 64)
    monkeypatch.setattr(kernels, "_PRODUCTS", {2: (16, 4), 4: (16, 4), 8: (16, 4)})


SHAPE = (2, 17, 6, 3)  # two tiles of positions, five of channels, two of channels in products
CASES = {
    "scale": {"output": "scale", "masked": True},
    "scale last": {"output": "scale", "last": True, "glimpses": 2},
    "sum": {"output": "sum", "masked": True, "glimpses": 3, "last": True},
    "coordinates": {"output": "coordinates", "dtype": torch.float64, "masked": True},
    "additive": {"score": "additive", "output": "flatten", "masked": True, "last": True},
    "additive double": {"score": "additive", "output": "sum", "dtype": torch.float64, "glimpses": 2},
    "additive half": {"score": "additive", "output": "scale", "dtype": torch.float16},
}


@pytest.mark.parametrize("case", CASES)
def test_many_tiles(small_tiles, case):
    check(make(SHAPE, **CASES[case]))


def test_a_tile_of_nothing_to_see(small_tiles):
    """Masked tiles, tiles of -inf, and NaN in one tile, which makes all of its map NaN and no other."""
    work = make((3, 3, 8, 6), output="sum", temperature=0.5)
    mask = torch.ones(3, 1, 8, 6, dtype=torch.bool)
    mask.flatten(1)[0, :16], mask.flatten(1)[1] = False, False
    object.__setattr__(work, "mask", mask)
    term = work.tensors["hidden_term"]
    term[0, 0, 16:32], term[0, 0, :16], term[2, 0, 20] = -torch.inf, torch.nan, torch.nan
    found = run(fused_step, work)
    with fusednn.use_backend("reference"):
        expected = run(fused_step, work)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
    assert found["map"][1].eq(0).all()
    assert found["map"][2].isnan().all()
    assert found["map"][:2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_softmax_of_many_tiles(small_tiles, dtype):
    logits = torch.randn(2, 2, 7, 6, dtype=dtype)
    mask = torch.rand(2, 2, 7, 6) > 0.3
    grads = (torch.randn_like(logits), torch.randn(2, 2, 2, dtype=dtype))
    t = torch.tensor(0.6, dtype=dtype)
    actual, expected = (results(step, logits, mask, t, grads) for step in (fused, composed))
    torch.testing.assert_close(actual, expected)


def test_results_do_not_depend_on_the_batch(kernels):
    work = make((3, 9, 5, 4), "additive", "sum", 2, True)
    found = run(fused_step, work)
    tensors = {k: t[1:2] if k in ("features", "hidden_term") else t for k, t in work.tensors.items()}
    alone = make((3, 9, 5, 4), "additive", "sum", 2, True).with_(**tensors)
    object.__setattr__(alone, "mask", work.mask[1:2])
    object.__setattr__(alone, "grads", tuple(g[1:2] for g in work.grads))
    again = run(fused_step, alone)
    for name in ("attended", "map", "grad of features", "grad of hidden_term"):
        assert again[name].equal(found[name][1:2]), name


def test_offsets_beyond_2_31(kernels, tmp_path):
    """Strides of a sparse file, whose pages exist where they were written."""
    from fusednn.triton_kernels.spatial.arguments import Attended, Features
    from fusednn.triton_kernels.spatial.forward import attention_forward_kernel

    n, c, p = 2, 3, 4
    strides = (1 << 32, 1 << 30, 1 << 20)
    size = sum((count - 1) * s for count, s in zip((n, c, p), strides, strict=True)) + 1
    files = functools.partial(torch.from_file, shared=True, size=size, dtype=torch.float16)
    f, out = (files(str(tmp_path / name)).as_strided((n, c, p), strides) for name in "fo")
    f.copy_(torch.randn(n, c, p))
    weight, map = torch.randn(1, c).half(), torch.empty(n, 1, p).half()
    features = torch.zeros(n, c, 2, 2).half()
    call = kernels.Attention.of(
        OPS["spatial_attention_forward"].Call(features, weight, None, None, None, None, 1.0, "scale")
    )
    inputs = call.inputs._replace(features=Features(f, *strides))
    attended = Attended(out, strides[0], 0, *strides[1:])
    attention_forward_kernel[(n,)](
        inputs, attended, map, None, call.numbers(1), **call.compiled_for(call.tile)
    )
    a = (weight.double() @ f.double()).softmax(-1)
    torch.testing.assert_close(map.double(), a, rtol=0, atol=1e-3)
    torch.testing.assert_close(out.double(), f.double() * a, rtol=0, atol=5e-3)
