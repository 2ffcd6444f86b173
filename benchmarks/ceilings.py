"""The most that this machine did for us: a large copy and a large matrix product, taken in the same run.

The roofline limit of a case is max(flops / peak, bytes / bandwidth). Tensors that stay in a cache can beat
the byte term, so a share above 100 % is possible and no error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .timing import clock_for


@dataclass(frozen=True)
class Ceilings:
    """Measured ceilings of one device for one dtype."""

    bandwidth: float  # bytes/s, read plus written
    peak: float  # flop/s
    dtype: str

    def limit_s(self, flops: int, traffic: int) -> float:
        """Return the seconds that the work takes at least."""
        return max(flops / self.peak, traffic / self.bandwidth)

    def best(self, other: Ceilings) -> Ceilings:
        """Return the higher of each ceiling."""
        bandwidth, peak = max(self.bandwidth, other.bandwidth), max(self.peak, other.peak)
        return Ceilings(bandwidth, peak, self.dtype)


def measure_ceilings(device: torch.device, dtype: str = "float32", repeats: int = 8) -> Ceilings:
    """Measure a copy far larger than any cache, and a square product; the best of `repeats` each."""
    gpu = device.type == "cuda"
    clock = clock_for(device)
    elements = (1 << 30 if gpu else 1 << 28) // torch.float32.itemsize
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    copy_s = min(clock(1, lambda: target.copy_(source)) for _ in range(1 + repeats))
    side = 8192 if gpu else 2048
    left = torch.randn(side, side, device=device).to(getattr(torch, dtype))
    right = torch.randn(side, side, device=device).to(left.dtype)
    product = torch.empty_like(left)
    matmul_s = min(clock(1, lambda: torch.mm(left, right, out=product)) for _ in range(1 + repeats))
    return Ceilings(2 * elements * source.itemsize / copy_s, 2 * side**3 / matmul_s, dtype)
