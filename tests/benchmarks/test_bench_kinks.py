"""Training cases of the convolutions: no value next to a kink, and gradients whose faults are seen."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.cases.conv import CASES
from benchmarks.kinks import MARGIN, clear_of_kinks
from benchmarks.measure import Judge, answer, run_case
from benchmarks.workload import seeded_generator

CPU = torch.device("cpu")
TRAINING = [case for case in CASES if case.mode == "training"]
(SMALL,) = [case for case in TRAINING if case.name == "separable_conv2d-n1-c512-o512-h14-k3-training"]


def nearest(module: nn.Module, x: torch.Tensor) -> float:
    """Return the least distance from a kink among the values that enter a ReLU6, in float64."""
    module, distances = copy.deepcopy(module).double(), []
    z = x.double()
    for layer in module:
        if isinstance(layer, nn.ReLU6):
            distances.append(torch.minimum(z.abs(), (z - 6).abs()).amin().item())
        z = layer(z)
    return min(distances)


def block(stride: int) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(8, 8, 3, stride, 1, groups=8),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.Conv2d(8, 16, 1),
        nn.BatchNorm2d(16),
        nn.ReLU6(),
    )


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("margin", [1e-4, 3e-4])
def test_no_value_is_left_near_a_kink(stride, margin):
    module, x = block(stride), 3 * torch.randn(4, 8, 17, 17, generator=seeded_generator("x"))
    assert nearest(module, x) < margin, "nothing to clear: no proof"
    state = copy.deepcopy(module.state_dict())
    cleared = clear_of_kinks(module, x, stride, seeded_generator("noise"), margin)
    assert nearest(module, cleared) >= margin
    assert (cleared - x).abs().max() < 0.2
    assert (cleared != x).any(1).float().mean() < 0.2
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert cleared.equal(clear_of_kinks(module, x, stride, seeded_generator("noise"), margin))


@pytest.mark.parametrize("case", TRAINING, ids=lambda case: case.name)
def test_every_training_case_keeps_away(case):
    workload = case.build(case, CPU)
    assert nearest(workload.module, workload.inputs["x"]) >= MARGIN


def test_what_cant_be_cleared_raises():
    module, x = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, groups=2), nn.ReLU6()), torch.randn(1, 2, 5, 5)
    with pytest.raises(ValueError, match=r"x: got torch\.bfloat16"):
        clear_of_kinks(module, x.bfloat16(), 1, seeded_generator("noise"))
    nn.init.zeros_(module[0].weight)
    nn.init.zeros_(module[0].bias)
    with pytest.raises(RuntimeError, match="values are left within 2e-05 of a kink after 20 rounds"):
        clear_of_kinks(module, x, 1, seeded_generator("noise"))


def test_the_gradient_that_starts_a_backward_is_every_peers(monkeypatch):
    seen = []
    backward = torch.autograd.backward

    def spy(outputs, grads):
        seen.extend(zip(outputs, grads, strict=True))
        backward(outputs, grads)

    monkeypatch.setattr(torch.autograd, "backward", spy)
    workload = SMALL.build(SMALL, CPU)
    peers = [workload._build_in(name, "eager") for name in ("NCHW", "NHWC")]
    for peer in peers:
        answer(peer)
        answer(peer)
    assert len(seen) == 4
    assert all(out.stride() == grad.stride() for out, grad in seen)
    assert len({grad.stride() for _, grad in seen}) == 2
    assert all(torch.equal(grad, seen[0][1]) for _, grad in seen)
    assert seen[0][1].std() == pytest.approx(1, abs=0.05)


class NoMean(torch.autograd.Function):
    """A norm's backward that forgets that the mean moves with the values."""

    @staticmethod
    def forward(ctx, z):
        return z.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad + 1e-2 * grad.abs().mean()


def test_a_fault_in_a_norms_backward_is_seen(monkeypatch):
    fusednn = pytest.importorskip("fusednn")

    class Faulty(fusednn.DepthwiseSeparableConv2d):
        def forward(self, input):
            y = F.relu6(self.norm1(self.depthwise(input)))
            z = NoMean.apply(self.pointwise(y))
            return F.relu6(self.norm2(z))

    monkeypatch.setattr(fusednn, "DepthwiseSeparableConv2d", Faulty)
    row = run_case(SMALL, ["fusednn"], CPU, rounds=1, min_sample_s=1e-5).peer("fusednn")
    assert (row.status, row.timing) == ("wrong", None)
    assert "grad depthwise.weight is off by" in row.reason
    assert "grad norm2.weight" not in row.reason, "it comes after the fault"


@pytest.mark.parametrize("kind", ["separable_conv2d", "depthwise_conv2d"])
def test_peers_agree_with_the_oracle(kind):
    pytest.importorskip("fusednn")
    case = min((c for c in TRAINING if c.name.startswith(kind)), key=lambda c: c.bytes)
    workload = case.build(case, CPU)
    judge = Judge(case)
    judge.learn(workload)
    for name in ("eager", "reference", "fusednn"):
        assert judge.verdict(workload.build(name)).standing == "ok", name
