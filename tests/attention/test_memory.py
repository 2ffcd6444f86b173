"""Averaged weights take memory for [B, L, S], never for [B, H, L, S]: measured."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.places import Place

from . import growth

AVERAGE = growth.BATCH * growth.LENGTH**2 * 4
OF_ALL_HEADS = AVERAGE * growth.HEADS
# The output, three gradients and partial sums of them, of 4 MiB each, and the allocator's rounding.
WORKSPACE = 24 * 2**20


def measured(place: Place, what: str) -> int:
    """Peak growth, on the CPU in a process of its own."""
    if place.device != "cpu":
        return growth.on_device(what)
    if not growth.RESET.exists():
        pytest.skip("peak memory needs /proc/self/clear_refs")
    done = subprocess.run(
        [sys.executable, "-m", "tests.attention.growth", place.backend, what],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.thorough
def test_plain_pytorch_takes_it_for_all_heads():
    """What the kernels save, and that it would be seen."""
    assert measured(Place("reference", "reference"), "forward") > OF_ALL_HEADS


def test_averaged_weights(kernels):
    assert AVERAGE <= measured(kernels, "forward") < 3 * AVERAGE + WORKSPACE < OF_ALL_HEADS / 2


@pytest.mark.parametrize("what", ["backward", "backward of all"])
def test_training_with_averaged_weights(training_kernels, what):
    """With gradients of the output, and of the weights too."""
    assert AVERAGE <= measured(training_kernels, what) < 3 * AVERAGE + WORKSPACE < OF_ALL_HEADS / 2
