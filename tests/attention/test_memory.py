"""Averaged weights take memory for [B, L, S], never for [B, H, L, S]: measured."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import growth
from .conftest import trains

AVERAGE = growth.BATCH * growth.LENGTH**2 * 4
OF_ALL_HEADS = AVERAGE * growth.HEADS
# The output, three gradients and partial sums of them, of 4 MiB each, and the allocator's rounding.
WORKSPACE = 24 * 2**20


def measured(backend: str, what: str) -> int:
    """Peak growth in a process of its own."""
    if not growth.RESET.exists():
        pytest.skip("peak memory needs /proc/self/clear_refs")
    done = subprocess.run(
        [sys.executable, "-m", "tests.attention.growth", backend, what],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("what", ["forward", "backward", "backward of all"])
def test_averaged_weights(fast_place, what):
    """With gradients of the output, and of the weights too."""
    if what != "forward" and not trains(fast_place):
        pytest.skip(f"{fast_place.name} has no backward")
    found = growth.on_device(what) if fast_place.device != "cpu" else measured(fast_place.backend, what)
    assert found >= AVERAGE, "the weights themselves"
    if fast_place.backend == "reference":  # plain PyTorch: what the others save, and that it would be seen
        assert found > OF_ALL_HEADS
    else:
        assert found < 3 * AVERAGE + WORKSPACE
        assert found < OF_ALL_HEADS / 2
