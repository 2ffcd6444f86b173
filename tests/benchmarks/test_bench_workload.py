"""The peers of a module: shared weights and inputs, the modes they promise, and faults that are seen."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
from torch import nn

from benchmarks.measure import Judge, answer, run_case
from benchmarks.registry import PEERS, load_cases

CPU = torch.device("cpu")


def cell_case(name: str):
    (case,) = [case for case in load_cases() if case.name == name]
    return case


CASES = [
    cell_case(f"{cell}_cell-b1-i8-h8-{mode}")
    for cell in ("lstm", "gru")
    for mode in ("inference", "training")
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_peers_agree_with_the_oracle(case, fake_fusednn):
    workload = case.build(case, CPU)
    judge = Judge(case)
    judge.learn(workload)
    for name in ("eager", "reference", "fusednn"):
        assert judge.verdict(workload.build(name)).standing == "ok"
    assert set(fake_fusednn.asked) == {"reference"}
    assert workload.build("fusednn").note == "cpu"
    gradients = {name for name in judge.oracle if name.startswith("grad ")}
    parameters = {f"grad {name}" for name, _ in workload.module.named_parameters()}
    states = {"grad h", "grad c"} if case.name.startswith("lstm") else {"grad h"}
    assert gradients == (parameters | states | {"grad x"} if case.mode == "training" else set())


def test_a_rebuilt_workload_has_the_same_weights_and_inputs():
    first, again = (CASES[0].build(CASES[0], CPU) for _ in range(2))
    assert all(torch.equal(first.inputs[k], again.inputs[k]) for k in first.inputs)
    state = again.module.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in first.module.state_dict().items())


def test_inference_records_no_gradient_and_training_starts_from_none(fake_fusednn):
    inference = CASES[0].build(CASES[0], CPU).build("fusednn")
    with inference.context():
        h, _ = inference.call()
    assert not h.requires_grad
    training = CASES[1].build(CASES[1], CPU).build("fusednn")
    once, twice = answer(training), answer(training)
    assert all(torch.equal(once[name], twice[name]) for name in once)


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.01 * grad


def test_a_fault_in_the_backward_alone_is_seen(fake_fusednn, monkeypatch):
    class LSTMCell(nn.LSTMCell):
        def forward(self, x, state=None):
            return super().forward(WrongBackward.apply(x), state)

    monkeypatch.setattr(fake_fusednn, "LSTMCell", LSTMCell)
    inference, training = (
        run_case(case, ["fusednn"], CPU, rounds=1, min_sample_s=1e-5).peer("fusednn") for case in CASES[:2]
    )
    assert inference.status == "ok"
    assert (training.status, training.timing) == ("wrong", None)
    assert training.reason.startswith("grad x is off by")


def test_a_cell_with_its_gates_swapped_is_refused(fake_fusednn, monkeypatch):
    class GRUCell(nn.GRUCell):
        def load_state_dict(self, state):
            r, z, n = state["weight_ih"].chunk(3)
            return super().load_state_dict({**state, "weight_ih": torch.cat([z, r, n])})

    monkeypatch.setattr(fake_fusednn, "GRUCell", GRUCell)
    row = run_case(CASES[2], ["fusednn"], CPU, rounds=1, min_sample_s=1e-5).peer("fusednn")
    assert (row.status, row.timing) == ("wrong", None)


def test_what_is_not_installed_is_named(monkeypatch):
    for package in ("fusednn", "onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, package, None)
    result = run_case(CASES[0], [p for p in PEERS if p != "compile"], CPU, rounds=1, min_sample_s=1e-5)
    reasons = {p.name: p.reason for p in result.peers if p.status == "missing"}
    assert set(reasons) == {"reference", "fusednn", "onnxruntime", "openvino"}
    assert all("is not installed" in reason for reason in reasons.values())


def test_exported_runtimes_decline_training():
    result = run_case(CASES[1], ["onnxruntime", "openvino"], CPU, rounds=1, min_sample_s=1e-5)
    rows = [result.peer("onnxruntime"), result.peer("openvino")]
    assert [(row.status, row.reason) for row in rows] == [("missing", "inference only")] * 2


def test_other_dtypes_pass_through(fake_fusednn):
    case = dataclasses.replace(CASES[1], dtype="float64")
    row = run_case(case, ["fusednn"], CPU, rounds=1, min_sample_s=1e-5).peer("fusednn")
    assert row.status == "ok"
    assert row.budget < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.name)
def test_compile_is_right_and_compiles_once(case, fake_fusednn):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    workload = case.build(case, CPU)
    judge = Judge(case)
    judge.learn(workload)
    peer = workload.build("compile")
    frames = counters["frames"]["ok"]
    assert frames == 1
    assert judge.verdict(peer).standing == "ok"
    assert counters["frames"]["ok"] == frames


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("case", CASES[::2], ids=lambda case: case.name)
def test_exports_are_right(case, name):
    for package in (name, "onnx", "onnxscript"):
        pytest.importorskip(package)
    workload = case.build(case, CPU)
    judge = Judge(case)
    judge.learn(workload)
    assert judge.verdict(workload.build(name)).standing == "ok"
