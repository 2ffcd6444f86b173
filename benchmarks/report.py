"""Draw results: a markdown table, a bar chart of the speed-ups, a roofline.

python -m benchmarks.report benchmarks/results/local/rnn.json             table and two charts beside it
python -m benchmarks.report FILE.json --readme           the table of benchmarks/README.md, printed
python -m benchmarks.report FILE.json … --overview       the chart of all files for the README, printed
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .registry import EAGER, FUSEDNN, PEERS
from .results import CaseResult, Document
from .summary import (
    BEST_TORCH,
    compare,
    means,
    operation,
    opponent,
    seconds,
    shape_text,
    speedup,
    status_text,
    times,
)


def markdown(document: Document) -> str:
    """Return the whole report as markdown: the tables, the means, why peers have no time, the machine."""
    parts = []
    for mode in dict.fromkeys(case.mode for case in document.cases):
        cases = [case for case in document.cases if case.mode == mode]
        parts += [f"### {mode.capitalize()}", "\n".join(table(cases, document)), "\n".join(mean_table(cases))]
        parts.append("\n".join(memory_table(cases)))
    notes = footnotes(document.cases)
    if notes:
        parts.append("\n".join(notes))
    parts.append(machine_line(document))
    return "\n\n".join(part for part in parts if part) + "\n"


def readme(document: Document) -> str:
    """Return one short table: fusednn's time, and its speed-up against each peer, wins and losses alike."""
    names = [name for name in timed_peers(document.cases) if name != FUSEDNN]
    heads = ["case", "fusednn", *[f"vs {name}" for name in names]]
    lines = [_row(heads), _row(["---", *["---:"] * (len(heads) - 1)])]
    for case in document.cases:
        cells = [f"{operation(case)} {case.mode}, {shape_text(case)}", _time_cell(case, FUSEDNN)]
        lines.append(_row(cells + [_ratio_cell(case, name) for name in names]))
    for mode in dict.fromkeys(case.mode for case in document.cases):
        by_peer = {m.peer: m for m in means(c for c in document.cases if c.mode == mode)}
        cells = [times(by_peer[n].geometric_mean) if n in by_peer else "–" for n in names]
        lines.append(_row([f"**geometric mean, {mode}**", "", *cells]))
    return "\n".join([*lines, "", *footnotes(document.cases), "", machine_line(document)]) + "\n"


def overview(documents: Sequence[Document]) -> str:
    """Return a chart in plain text: a bar for each family and mode, fusednn against the best of torch."""
    lines = []
    for document in documents:
        for mode in dict.fromkeys(case.mode for case in document.cases):
            cases = [case for case in document.cases if case.mode == mode]
            mean = next((m for m in means(cases) if m.peer == BEST_TORCH), None)
            if mean is not None:
                label = f"{cases[0].family:<11} {mode:<10}"
                bar = "█" * round(10 * mean.geometric_mean)
                lines.append(
                    f"{label} {bar} {times(mean.geometric_mean)}  {mean.faster} of {mean.cases} faster"
                )
                lines[-1] += f", {mean.slower} slower" if mean.slower else ""
    return "\n".join([f"{'best of torch':<22} {'█' * 10} 1x", *lines]) + "\n"


def table(cases: Sequence[CaseResult], document: Document) -> list[str]:
    """Return a markdown table with every peer's median, the machine's limit and fusednn's share of it."""
    names = timed_peers(cases)
    heads = ["case", *names, "limit", "fusednn of limit", "vs eager", f"vs {BEST_TORCH}"]
    lines = [_row(heads), _row(["---", *["---:"] * (len(heads) - 1)])]
    for case in cases:
        ceilings = document.ceiling(case.dtype)
        limit = ceilings.limit_s(case.flops, case.bytes) if ceilings else None
        ours = case.median(FUSEDNN)
        cells = [f"{operation(case)} {shape_text(case)}", *[_time_cell(case, name) for name in names]]
        cells += [seconds(limit) if limit else "–", f"{limit / ours:.0%}" if limit and ours else "–"]
        cells += [_ratio_cell(case, EAGER), _ratio_cell(case, BEST_TORCH)]
        lines.append(_row(cells))
    return lines


def mean_table(cases: Sequence[CaseResult]) -> list[str]:
    """Return a markdown table of the geometric means, with the count of wins and losses."""
    found = means(cases)
    if not found:
        return []
    lines = [_row(["fusednn against", "geometric mean", "faster", "slower", "unclear"]), _row(["---"] * 5)]
    for m in found:
        unclear = m.cases - m.faster - m.slower
        lines.append(_row([m.peer, times(m.geometric_mean), str(m.faster), str(m.slower), str(unclear)]))
    return lines


def memory_table(cases: Sequence[CaseResult]) -> list[str]:
    """Return a markdown table of how far a call raises memory, where that was measured."""
    measured = [case for case in cases if any(peer.peak_bytes is not None for peer in case.peers)]
    if not measured:
        return []
    names = timed_peers(measured)
    lines = [_row(["peak memory of a call, MiB", *names]), _row(["---", *["---:"] * len(names)])]
    for case in measured:
        found = [peer.peak_bytes if (peer := case.peer(name)) else None for name in names]
        cells = ["–" if size is None else f"{size / 2**20:.1f}" for size in found]
        lines.append(_row([f"{operation(case)} {shape_text(case)}", *cells]))
    return lines


def footnotes(cases: Sequence[CaseResult]) -> list[str]:
    """Return a line for each reason why peers have no time."""
    reasons: dict[str, list[str]] = {}
    for case in cases:
        for peer in case.peers:
            if peer.timing is None:
                reasons.setdefault(f"{peer.name}: {status_text(peer)}", []).append(case.name)
    return [f"- {text} ({len(names)} of {len(cases)} cases)" for text, names in reasons.items()]


def machine_line(document: Document) -> str:
    """Return what the numbers were taken on, as a sentence."""
    m = document.machine
    where = m["gpu"]["name"] if m["gpu"] else f"{m['cpu']} ({m['cores']} cores)"
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items() if version)
    ceilings = ", ".join(
        f"{c.peak / 1e9:.0f} GFLOP/s {c.dtype} and {c.bandwidth / 1e9:.1f} GB/s" for c in document.ceilings
    )
    start = "Interrupted before all cases ran. " if document.settings.get("interrupted") else ""
    return (
        f"{start}Median of {document.settings['rounds']} interleaved rounds on {where}, {m['threads']} "
        f"threads, load {m['load_average'][0]} at the start; measured ceilings {ceilings}; "
        f"python {m['python']}, {versions}, commit {m['commit']}, {m['date']}. An asterisk marks a "
        "difference that is below 5 % or within the spreads (p20 to p80)."
    )


def timed_peers(cases: Sequence[CaseResult]) -> list[str]:
    """Return the peers with at least one time, in the usual order."""
    return [name for name in PEERS if any(case.median(name) is not None for case in cases)]


def _time_cell(case: CaseResult, name: str) -> str:
    peer = case.peer(name)
    if peer is None or peer.timing is None:
        return {"wrong": "WRONG", "inexact": "inexact", "failed": "failed"}.get(
            peer.status if peer else "", "–"
        )
    return seconds(peer.timing.median_s)


def _ratio_cell(case: CaseResult, against: str) -> str:
    ratio = speedup(case, against)
    if ratio is None:
        peer = case.peer(against)
        return "WRONG" if peer and peer.status == "wrong" else "–"
    unclear = compare(case.peer(FUSEDNN), opponent(case, against)) == "unclear"
    return f"{times(ratio)}{'*' if unclear else ''}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report beside each file, or print a part of it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=main.__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--out", type=Path, help="folder for the report; default: beside each file")
    parser.add_argument("--readme", action="store_true", help="print one short table and write nothing")
    parser.add_argument("--overview", action="store_true", help="print one chart and write nothing")
    args = parser.parse_args(argv)
    documents = [Document.from_json(path.read_text(encoding="utf-8")) for path in args.files]
    if args.overview:
        print(overview(documents))
        return 0
    for path, document in zip(args.files, documents):
        if args.readme:
            print(readme(document))
            continue
        for written in _write_report(document, args.out or path.parent, path.stem):
            print(f"wrote {written}")
    return 0


def _write_report(document: Document, folder: Path, stem: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / f"{stem}.md"
    text.write_text(markdown(document), encoding="utf-8")
    try:
        from .charts import draw_roofline, draw_speedups
    except ModuleNotFoundError as error:
        print(f"no charts: {error.name} is not installed (pip install 'fusednn[bench]')", file=sys.stderr)
        return [text]
    speedups, roofline = folder / f"{stem}-speedup.png", folder / f"{stem}-roofline.png"
    return [text, *draw_speedups(document, speedups), *draw_roofline(document, roofline)]


if __name__ == "__main__":
    sys.exit(main())
