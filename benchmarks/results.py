"""The JSON document of a run.

{schema, machine, settings, ceilings: [{bandwidth, peak, dtype}],
 cases: [{name, …, peers: [{name, status, …, timing}]}]}

Times are seconds a call, bandwidth bytes/s, peak flop/s. Speed-ups are computed from it, never stored.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .ceilings import Ceilings
from .registry import Case, Mode
from .timing import Timing

SCHEMA = 1

# ok: verified and timed. wrong, inexact: refused by the check (see verify.py), no time. failed: raised.
# missing: can't take part here. skipped: left out by an option.
Status = Literal["ok", "wrong", "inexact", "failed", "missing", "skipped"]


@dataclass
class PeerResult:
    """One peer of one case; `timing` is there exactly where `status` is ok."""

    name: str
    status: Status
    reason: str = ""
    error: float | None = None
    budget: float | None = None
    timing: Timing | None = None
    peak_bytes: int | None = None
    note: str = ""

    def __post_init__(self) -> None:
        """Refuse a time without a passed check, and the reverse."""
        if (self.status == "ok") != (self.timing is not None):
            raise ValueError(f"{self.name}: status {self.status!r} with timing {self.timing}")


@dataclass
class CaseResult:
    """One case and what came of each of its peers."""

    name: str
    family: str
    mode: Mode
    shape: dict[str, int]
    dtype: str
    flops: int
    bytes: int
    peers: list[PeerResult] = field(default_factory=list)

    @classmethod
    def of(cls, case: Case, peers: list[PeerResult]) -> CaseResult:
        """Take a case's description over."""
        return cls(
            case.name, case.family, case.mode, dict(case.shape), case.dtype, case.flops, case.bytes, peers
        )

    def peer(self, name: str) -> PeerResult | None:
        """Return the row of a peer, if there is one."""
        return next((peer for peer in self.peers if peer.name == name), None)

    def median(self, name: str) -> float | None:
        """Return a peer's median seconds; None where it has no time."""
        peer = self.peer(name)
        return peer.timing.median_s if peer and peer.timing else None


@dataclass
class Document:
    """A whole run."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    ceilings: list[Ceilings]
    cases: list[CaseResult]

    def ceiling(self, dtype: str) -> Ceilings | None:
        """Return the ceilings measured for a dtype."""
        return next((c for c in self.ceilings if c.dtype == dtype), None)

    def of_family(self, family: str) -> Document:
        """Return the document with one family's cases alone."""
        return dataclasses.replace(self, cases=[case for case in self.cases if case.family == family])

    def to_json(self) -> str:
        """Return the document as text."""
        body = {"schema": SCHEMA, **dataclasses.asdict(self)}
        return json.dumps(body, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Document:
        """Read a document.

        Raises:
            ValueError: it is of another schema.
            TypeError: a field is missing or unknown.

        """
        body = json.loads(text)
        schema = body.pop("schema", None)
        if schema != SCHEMA:
            raise ValueError(f"schema: got {schema}, expected {SCHEMA}; run the benchmarks again")
        body["ceilings"] = [Ceilings(**c) for c in body["ceilings"]]
        body["cases"] = [_case(c) for c in body["cases"]]
        return cls(**body)

    def write(self, path: Path) -> None:
        """Write the document, making folders as needed."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json(), encoding="utf-8")


def _case(body: dict[str, Any]) -> CaseResult:
    return CaseResult(**{**body, "peers": [_peer(p) for p in body["peers"]]})


def _peer(body: dict[str, Any]) -> PeerResult:
    return PeerResult(**{**body, "timing": Timing(**body["timing"]) if body["timing"] else None})
