"""Attention's cases: the agreed ones, costs by hand, and what their peers compute."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases import attention
from benchmarks.registry import Case, load_cases
from benchmarks.verify import eager_budgets, verify


def test_the_agreed_cases():
    cases = [c for c in load_cases() if c.family == "attention"]
    modules = {(c.name.partition("-")[0], c.mode, *c.shape.values()) for c in cases if "decode" not in c.name}
    assert modules == {
        (kind, mode, *shape)
        for kind in attention.KINDS
        for mode in ("inference", "training")
        for shape in ((8, 128, 256, 8), (4, 512, 512, 8), (1, 2048, 512, 8))
    }
    (decode,) = (c for c in cases if "decode" in c.name)
    assert decode.shape == {"B": 8, "H": 8, "S": 4096, "D": 64}


@pytest.mark.parametrize(
    ("kind", "mode", "flops", "size"),
    [
        # B=2 L=3 E=4 H=2: 64 weights, 16 biases, x and y 24 each; products 2 x 6 x 4 x 16 and 4 x 2 x 9 x 4.
        (attention.PLAIN, "inference", 768 + 288, 4 * (80 + 48)),
        (attention.WEIGHTS, "inference", 768 + 288, 4 * (80 + 48 + 18)),
        (attention.PADDING, "inference", 768 + 288, 4 * (80 + 48) + 6),
        # Saved 4 x 24 and 12 sums, twice; 80 + 48 read again; 80 + 24 gradients.
        (attention.PLAIN, "training", 3 * (768 + 288), 4 * (128 + 216 + 128 + 104)),
        (attention.PADDING, "training", 3 * (768 + 288), 4 * (128 + 216 + 128 + 104) + 12),
    ],
)
def test_costs_by_hand(kind, mode, flops, size):
    assert attention.module_flops(mode, (2, 3, 4, 2)) == flops
    assert attention.module_bytes(kind, mode, (2, 3, 4, 2)) == size


def test_costs_of_decoding_by_hand():
    assert attention.decode_flops((2, 3, 5, 4)) == 2 * 2 * 2 * 3 * 5 * 4
    assert attention.decode_bytes((2, 3, 5, 4)) == 4 * (2 * 24 + 2 * 120)


@pytest.mark.parametrize(("batch", "length"), [(8, 128), (4, 512), (1, 2048)])
def test_a_quarter_is_padding(batch, length):
    mask = attention.padding_mask(batch, length)
    assert mask.float().mean().item() == pytest.approx(0.25)
    assert len(set(mask.sum(1).tolist())) == batch
    assert not mask[:, 0].any()


def small(kind: str, mode: str) -> Case:
    """A case like those of the table."""
    if kind == attention.DECODE:
        shape = {"B": 2, "H": 2, "S": 9, "D": 4}
        return Case(f"{kind}-{mode}", "attention", mode, shape, "float32", 1, 1, attention.build_decode)
    shape = {"B": 2, "L": 5, "E": 8, "H": 2}
    return Case(f"{kind}-{mode}", "attention", mode, shape, "float32", 1, 1, attention.build_module)


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("kind", [*attention.KINDS, attention.DECODE])
def test_peers_agree(kind, mode):
    """The weights are among what is compared; training adds the gradients of the input and all parameters."""
    case = small(kind, mode)
    workload = case.build(case, torch.device("cpu"))
    oracle = workload.oracle()
    names = {"y", "weights"} if kind == attention.WEIGHTS else {"y"}
    assert {n for n in oracle if not n.startswith("grad ")} == names
    assert (
        len(oracle) - len(names) == {"inference": 0, "training": 3 if kind == attention.DECODE else 5}[mode]
    )

    def outputs(name: str):
        peer = workload.build(name)
        with peer.context():
            return peer.outputs(peer.call())

    budgets = eager_budgets(outputs("eager"), oracle, torch.float32)
    for name in ("reference", "fusednn"):
        verdict = verify(outputs(name), oracle, budgets, torch.float32)
        assert verdict.standing == "ok", f"{name}: {verdict.reason}"
