"""What `explain` says of the convolutions: the numbers of the CPU's planner."""

import pytest
import torch

import fusednn
from fusednn.core import native as _native

pytestmark = pytest.mark.skipif(_native.extension is None, reason="no extension")


def explained(size: int, batch: int = 1, backend: str = "cpu"):
    block = fusednn.DepthwiseSeparableConv2d(64, 96, 3, padding=1).eval()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.no_grad(), fusednn.use_backend(backend):
            (found,) = fusednn.explain(block, torch.randn(batch, 64, size, size))
    finally:
        torch.set_num_threads(threads)
    return found


@pytest.mark.parametrize(("size", "path"), [(3, "two kernels"), (56, "fused")])
def test_the_planners_numbers(size, path):
    found = explained(size)
    assert found.plan["path"] == path
    assert f"  plan: path {path}, threads 2, " in str(found)
    pixels = 4 * size * size
    assert found.plan["bytes_fused"] == (64 + 96) * pixels
    assert found.plan["bytes_unfused"] == (64 + 96 + 2 * 64) * pixels
    assert found.plan["tasks"] > 0
    assert found.plan["workspace_bytes"] > 0


def test_no_plan_where_there_is_nothing_to_plan():
    assert explained(3, batch=0).plan == {}
    assert explained(3, backend="reference").plan == {}


def test_auto_leaves_to_torch_what_it_does_faster():
    last = torch.randn(2, 8, 9, 9).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(8, 1, 3, 3)

    def chosen(x, w, **options):
        return fusednn.explain(fusednn.functional.depthwise_conv2d, x, w, **options)[0]

    assert "channels-last" in chosen(last, weight).passed_over["cpu"][0]
    assert chosen(last, weight).backend == "torch"
    assert chosen(last, weight, activation="relu").backend == "cpu"
    assert chosen(last.contiguous(), weight).backend == "cpu"
    assert chosen(last.double(), weight.double()).backend == "cpu"
    assert chosen(last, torch.randn(8, 1, 7, 7), padding=3).backend == "cpu"
    assert chosen(torch.randn(2, 1, 9, 9), weight).backend == "torch"
