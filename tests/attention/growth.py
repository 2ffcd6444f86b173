"""How far one call of attention that returns averaged weights raises the peak of memory: prints bytes.

    python -m tests.attention.growth <backend> <forward | backward | backward of all>

Resident memory, in a process of its own where nothing else is made (Linux: the peak is reset through /proc).
"""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import fusednn
from fusednn.functional import scaled_dot_product_attention

BATCH, HEADS, LENGTH, SIZE = 1, 16, 2048, 32
RESET = Path("/proc/self/clear_refs")


def make_call(what: str, length: int, device: str) -> Callable[[], object]:
    """Return the call; its inputs and the gradients of its results are there before it."""
    trains = what != "forward"
    q, k, v = (torch.randn(BATCH, HEADS, length, SIZE, device=device) for _ in range(3))
    leaves = [t.requires_grad_(trains) for t in (q, k, v)]
    padding = torch.arange(length, device=device).expand(BATCH, length) >= length - 7
    grads = [torch.randn_like(q), torch.randn(BATCH, length, length, device=device)]

    def call() -> object:
        results = scaled_dot_product_attention(q, k, v, key_padding_mask=padding, return_weights="mean")
        if not trains:
            return results
        n = 2 if what == "backward of all" else 1
        return results, torch.autograd.grad(results[:n], leaves, grads[:n])

    return call


def resident(key: str) -> int:
    """Bytes of a line of the process's status."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def on_device(what: str) -> int:
    """Growth of the allocator's peak."""
    make_call(what, 64, "cuda")()
    call = make_call(what, LENGTH, "cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    rest = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - rest


def main() -> None:
    """Measure on the CPU."""
    backend, what = sys.argv[1:]
    with fusednn.use_backend(backend):
        make_call(what, 64, "cpu")()
        call = make_call(what, LENGTH, "cpu")
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        RESET.write_text("5")
        rest = resident("VmRSS")
        call()
        print(resident("VmHWM") - rest)


if __name__ == "__main__":
    main()
