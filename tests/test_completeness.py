"""No op without its proof: a reference, a fake, samples, a gradient and a benchmark for every op."""

import importlib
from pathlib import Path

import pytest
import torch

import fusednn
from fusednn.core.dispatch import Operation
from fusednn.core.op import OPS as declared

from .registry import OPS, backward_of, cases_of, family_of, stem_of, table_of

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks" / "cases"
every_op = pytest.mark.parametrize("name", OPS)


def test_there_are_ops():
    assert len(OPS) >= 4


@every_op
def test_has_a_reference_and_a_row_in_the_dispatch_table(name):
    operation = table_of(name)
    assert isinstance(operation, Operation)
    assert operation.name == name
    backends = [i.backend for i in operation.implementations]
    assert backends[-1] == "reference", "auto ends at the reference, which serves every call"
    reference = importlib.import_module(f"fusednn.{family_of(name)}.reference")
    assert declared[name].reference is getattr(reference, name)


@every_op
def test_has_samples_that_fake_and_reference_agree_on(name):
    cases = cases_of(name)
    assert cases
    for args in cases.values():
        args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        meta = tuple(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args)
        op = getattr(torch.ops.fusednn, name)
        with fusednn.use_backend("reference"):
            real = op(*args)
        real, fake = (x if isinstance(x, tuple) else (x,) for x in (real, op(*meta)))
        for r, f in zip(real, fake, strict=True):
            assert f.is_meta
            assert (f.shape, f.dtype) == (r.shape, r.dtype)


@every_op
def test_has_a_gradient_or_is_one(name):
    if name.endswith("_backward"):
        assert f"{stem_of(name)}_forward" in OPS
        return
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fusednn::{name}", "Autograd")
    assert backward_of(name) in OPS
    tests = importlib.import_module(f"tests.{family_of(name)}.test_gradients")
    assert hasattr(tests, "test_gradcheck")
    assert hasattr(tests, "test_gradgradcheck")
    assert stem_of(name) in tests.CHECKED


@every_op
def test_has_a_benchmark(name):
    if not BENCHMARKS.is_dir():
        pytest.skip("benchmarks/ is not part of this tree")
    text = "\n".join(p.read_text() for p in BENCHMARKS.glob("*.py")).lower()
    assert stem_of(name).removesuffix("_train").replace("_", "") in text.replace("_", "")


def test_every_op_of_torchs_registry_is_declared():
    registered = torch._C._dispatch_get_all_op_names()
    assert sorted(n.removeprefix("fusednn::") for n in registered if n.startswith("fusednn::")) == OPS
