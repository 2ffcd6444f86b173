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
    ours, theirs = case.peer(FUSEDNN), opponent(case, against)
    if ours is None or theirs is None or ours.timing is None or theirs.timing is None:
        return None
    return theirs.timing.median_s / ours.timing.median_s


def best_torch(case: CaseResult) -> PeerResult | None:
    """Return the faster of eager and compile, of those that have a time."""
    timed = [(p.timing.median_s, p) for p in case.peers if p.timing and p.name in (EAGER, COMPILE)]
    return min(timed, key=lambda pair: pair[0])[1] if timed else None


def opponent(case: CaseResult, against: str) -> PeerResult | None:
    """Return the row that `against` names: a peer, or ``best torch``."""
    return best_torch(case) if against == BEST_TORCH else case.peer(against)


def compare(ours: PeerResult | None, theirs: PeerResult | None) -> str:
    """Return ``faster``, ``slower`` or ``unclear`` for fusednn; empty where a time is missing.

    A verdict needs a difference above 5 % and spreads (p20 to p80) that don't touch.
    """
    if ours is None or theirs is None or ours.timing is None or theirs.timing is None:
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
            verdicts.append(compare(case.peer(FUSEDNN), opponent(case, against)))
    if not ratios:
        return None
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return Mean(against, mean, verdicts.count("faster"), verdicts.count("slower"), len(ratios))


def seconds(value: float) -> str:
    """Return a time with three digits and a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}" if value / scale < 999.5 else f"{value / scale:.0f} {unit}"
    return f"{value / 1e-9:.3g} ns"


def times(ratio: float) -> str:
    """Return a speed-up with two decimals, or two digits where it is tiny."""
    return f"{ratio:.2f}x" if ratio >= 0.095 else f"{ratio:.2g}x"


def in_words(ratio: float, verdict: str) -> str:
    """Say how fusednn does, given its speed-up and what :func:`compare` makes of it."""
    if verdict == "slower":
        return f"fusednn takes {times(1 / ratio)} as long"
    return f"fusednn is {times(ratio)} as fast{' (unclear)' if verdict == 'unclear' else ''}"


def operation(case: CaseResult) -> str:
    """Return the operation that the case's name begins with."""
    return case.name.split("-")[0]


def shape_text(case: CaseResult) -> str:
    """Return ``B=1 I=8 H=8``."""
    return " ".join(f"{name}={size}" for name, size in case.shape.items())


def case_lines(case: CaseResult, ceilings: Ceilings) -> list[str]:
    """Return a case as lines of text: a heading, then every peer, won or lost, with or without a time."""
    limit = ceilings.limit_s(case.flops, case.bytes)
    lines = [f"{case.name}  [{case.dtype}]  limit {seconds(limit)}"]
    lines += [_time_line(case, peer, limit) for peer in case.peers if peer.timing is not None]
    without: dict[str, list[str]] = {}
    for peer in case.peers:
        if peer.timing is None:
            without.setdefault(status_text(peer), []).append(peer.name)
    lines += [f"  {', '.join(names)}: {text}" for text, names in without.items()]
    best = speedup(case, BEST_TORCH)
    if best is not None:
        lines.append(f"  fusednn against the best of eager and compile: {times(best)}")
    return lines


def _time_line(case: CaseResult, peer: PeerResult, limit: float) -> str:
    t = peer.timing
    assert t is not None
    name = f"{peer.name} ({peer.note})" if peer.note else peer.name
    spread = f"{seconds(t.p20_s)} – {seconds(t.p80_s)}"
    line = f"  {name:<20} {seconds(t.median_s):>9}  {spread:<22} {limit / t.median_s:>5.0%} of limit"
    ratio = speedup(case, peer.name) if peer.name != FUSEDNN else None
    if ratio is not None:
        line += f"  {in_words(ratio, compare(case.peer(FUSEDNN), peer))}"
    if peer.peak_bytes is not None:
        line += f"  peak +{peer.peak_bytes / 2**20:.1f} MiB"
    return f"{line}  {peer.reason}".rstrip()


def status_text(peer: PeerResult) -> str:
    """Return why a peer has no time."""
    word = {"wrong": "WRONG", "inexact": "INEXACT", "failed": "FAILED"}.get(peer.status, "not run")
    return f"{word}, {peer.reason}"


def mean_lines(cases: Sequence[CaseResult]) -> list[str]:
    """Return the geometric means per mode as lines of text."""
    lines = []
    for mode in dict.fromkeys(case.mode for case in cases):
        found = means(case for case in cases if case.mode == mode)
        if found:
            lines.append(f"{mode}: fusednn's speed-up, geometric mean")
        for m in found:
            counts = f"{m.faster} faster, {m.slower} slower, {m.cases - m.faster - m.slower} unclear"
            lines.append(
                f"  against {m.peer:<12} {times(m.geometric_mean):>6} over {m.cases} cases ({counts})"
            )
    return lines
