"""How far one call raises memory above its resting level: temporaries, outputs, gradients.

CUDA: the allocator's peak, in this process. CPU: peak resident set, in a process of its own where nothing but
this peer was built (Linux only: the peak is reset through /proc); resolution is a few hundred KiB.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .registry import Case, Peer, PeerMissing, load_cases

ROOT = Path(__file__).resolve().parent.parent


def peak_bytes(case: Case, peer: Peer, device: torch.device) -> int:
    """Return the growth of one call.

    Raises:
        PeerMissing: this system doesn't tell.
        RuntimeError: the child process failed.

    """
    return _cuda_growth(peer) if device.type == "cuda" else _growth_in_child(case.name, peer.name)


def _cuda_growth(peer: Peer) -> int:
    with peer.context():
        peer.reset()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        rest = torch.cuda.memory_allocated()
        result = peer.call()
        torch.cuda.synchronize()
        del result
    return torch.cuda.max_memory_allocated() - rest


def _growth_in_child(case: str, peer: str) -> int:
    if not Path("/proc/self/clear_refs").exists():
        raise PeerMissing("peak memory needs /proc/self/clear_refs")
    command = [sys.executable, "-m", "benchmarks.memory", case, peer, str(torch.get_num_threads())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise RuntimeError(f"memory of {peer}: {last[0]}")
    return int(json.loads(done.stdout.strip().splitlines()[-1])["growth"])


def _cpu_growth(peer: Peer) -> int:
    with peer.context():
        for _ in range(3):
            peer.call()
        peer.reset()
        gc.collect()
        _trim()
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        rest = _resident("VmRSS")
        result = peer.call()
        peak = _resident("VmHWM")
        del result
    return max(0, peak - rest)


def _trim() -> None:
    """Give freed heap back to the system, or the next call would find it resident already."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def main(argv: Sequence[str] | None = None) -> int:
    """Measure one peer of one case on the CPU and print it as JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.memory", description=main.__doc__)
    parser.add_argument("case")
    parser.add_argument("peer")
    parser.add_argument("threads", type=int)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    case = next(c for c in load_cases() if c.name == args.case)
    peer = case.build(case, torch.device("cpu")).build(args.peer)
    print(json.dumps({"growth": _cpu_growth(peer)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
