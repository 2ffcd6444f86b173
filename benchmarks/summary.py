"""What the numbers say: speed-ups, verdicts, geometric means, and the lines printed in a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .ceilings import Ceilings
from .registry import COMPILE, EAGER, FUSEDNN
from .results import CaseResult, PeerResult

BEST_TORCH = "best torch"
CLEAR = 0.05  # a difference below this, or within the spreads, is called unclear


@dataclass(frozen=True)
class Mean:
    """fusednn against one peer over the cases where both have a time."""

    peer: str
    geometric_mean: float
    faster: int
    slower: int
    cases: int


def speedup(case: CaseResult, against: str) -> float | None:
    """Return the peer's median over fusednn's; None unless both have a time."""
    ours = case.median(FUSEDNN)
    theirs = best_torch_median(case) if against == BEST_TORCH else case.median(against)
    return theirs / ours if ours and theirs else None


def best_torch_median(case: CaseResult) -> float | None:
    """Return the shorter of eager's and compile's medians, of those there are."""
    return min((m for m in map(case.median, (EAGER, COMPILE)) if m is not None), default=None)


def compare(ours: PeerResult | None, theirs: PeerResult) -> str:
    """Return ``faster``, ``slower`` or ``unclear`` for fusednn; empty where a time is missing.

    A verdict needs a difference above 5 % and spreads (p20 to p80) that don't touch.
    """
    if ours is None or ours.timing is None or theirs.timing is None:
        return ""
    a, b = ours.timing, theirs.timing
    if a.p80_s < b.p20_s and a.median_s < b.median_s / (1 + CLEAR):
        return "faster"
    if a.p20_s > b.p80_s and a.median_s > b.median_s * (1 + CLEAR):
        return "slower"
    return "unclear"


def means(cases: Iterable[CaseResult]) -> list[Mean]:
    """Return the geometric mean of fusednn's speed-up against each peer, best torch last."""
    cases = list(cases)
    names = list(dict.fromkeys(p.name for case in cases for p in case.peers if p.name != FUSEDNN))
    found = [_mean(cases, name) for name in [*names, BEST_TORCH]]
    return [mean for mean in found if mean is not None]


def _mean(cases: Sequence[CaseResult], against: str) -> Mean | None:
    ratios, verdicts = [], []
    for case in cases:
        ratio = speedup(case, against)
        if ratio is not None:
            ratios.append(ratio)
            verdicts.append(compare(case.peer(FUSEDNN), _opponent(case, against)))
    if not ratios:
        return None
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return Mean(against, mean, verdicts.count("faster"), verdicts.count("slower"), len(ratios))


def _opponent(case: CaseResult, against: str) -> PeerResult:
    if against != BEST_TORCH:
        found = case.peer(against)
    else:
        best = best_torch_median(case)
        found = next(p for p in case.peers if p.name in (EAGER, COMPILE) and case.median(p.name) == best)
    assert found is not None
    return found


def seconds(value: float) -> str:
    """Return a time with three digits and a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}" if value / scale < 999.5 else f"{value / scale:.0f} {unit}"
    return f"{value / 1e-9:.3g} ns"


def shape_text(case: CaseResult) -> str:
    """Return ``B=1 I=8 H=8``."""
    return " ".join(f"{name}={size}" for name, size in case.shape.items())


def case_lines(case: CaseResult, ceilings: Ceilings) -> list[str]:
    """Return a case as lines of text: a heading, then every peer, won or lost, with or without a time."""
    limit = ceilings.limit_s(case.flops, case.bytes)
    lines = [f"{case.name}  [{case.dtype}]  limit {seconds(limit)}"]
    ours = case.peer(FUSEDNN)
    for peer in case.peers:
        name = f"{peer.name} ({peer.note})" if peer.note else peer.name
        if peer.timing is None:
            lines.append(f"  {name:<20} {status_text(peer)}")
            continue
        t = peer.timing
        spread = f"{seconds(t.p20_s)} – {seconds(t.p80_s)}"
        line = f"  {name:<20} {seconds(t.median_s):>9}  {spread:<22} {limit / t.median_s:>5.0%} of limit"
        ratio = speedup(case, peer.name) if peer.name != FUSEDNN else None
        if ratio is not None:
            line += f"  fusednn {ratio:5.2f}x {compare(ours, peer)}"
        if peer.peak_bytes is not None:
            line += f"  peak +{peer.peak_bytes / 2**20:.1f} MiB"
        lines.append(line.rstrip())
    best = speedup(case, BEST_TORCH)
    if best is not None:
        lines.append(f"  fusednn against the best of eager and compile: {best:.2f}x")
    return lines


def status_text(peer: PeerResult) -> str:
    """Return why a peer has no time."""
    word = {"wrong": "WRONG", "failed": "FAILED", "missing": "not run", "skipped": "not run"}[peer.status]
    return f"{word}: {peer.reason}"


def mean_lines(cases: Sequence[CaseResult]) -> list[str]:
    """Return the geometric means per mode as lines of text."""
    lines = []
    for mode in dict.fromkeys(case.mode for case in cases):
        found = means(case for case in cases if case.mode == mode)
        if found:
            lines.append(f"{mode}: fusednn, geometric mean")
        for m in found:
            counts = f"{m.faster} faster, {m.slower} slower, {m.cases - m.faster - m.slower} tied"
            lines.append(f"  against {m.peer:<12} {m.geometric_mean:5.2f}x over {m.cases} cases ({counts})")
    return lines
