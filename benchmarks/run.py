"""Verify every peer of every case, then time those that are right, in turns.

    python -m benchmarks.run                        all cases; results go to benchmarks/results/local/
    python -m benchmarks.run --list                 names, shapes, flops and bytes
    python -m benchmarks.run --quick                the small suite: every family, both modes
    python -m benchmarks.run --quick --no-compile   a first look

Exit code: 0; 1 if a peer gave a wrong answer, or if eager, reference or fusednn failed, or was inexact; 2 for
bad options; 130 after Ctrl-C, which keeps the cases that are measured: they are printed and written as usual.
(An exported runtime that rounds worse than its budget loses its time, but fails nothing.)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .ceilings import Ceilings, measure_ceilings
from .machine import describe_machine, machine_slug, without_paths
from .measure import run_case
from .progress import Progress
from .registry import COMPILE, EAGER, FUSEDNN, PEERS, REFERENCE, Case, load_cases, select_cases
from .results import CaseResult, Document
from .summary import case_lines, mean_lines

RESULTS = Path(__file__).resolve().parent / "results"
MIN_SAMPLE_S = 5e-3
ROUNDS, QUICK_ROUNDS = 25, 8
INTERRUPTED = 130  # as a shell has it for a program that SIGINT ended
OURS = (EAGER, REFERENCE, FUSEDNN)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks; see the module's text for the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        peers = _chosen_peers(args.peers, args.no_compile)
    except ValueError as error:
        parser.error(str(error))
    cases = select_cases(
        load_cases(), family=args.family, substring=args.case, mode=args.mode, quick=args.quick
    )
    if not cases:
        parser.error("no case matches; --list shows them all")
    if args.list:
        print("\n".join(_listing(cases)))
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device}: {without_paths(str(error))}")
    return run(cases, peers, device, args)


def run(cases: Sequence[Case], peers: Sequence[str], device: torch.device, args: argparse.Namespace) -> int:
    """Measure the cases, print them, write the JSON files; returns the exit code."""
    settings = {
        "rounds": args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS),
        "min_sample_s": args.min_sample_ms * 1e-3,
        "peers": list(peers),
        "quick": args.quick,
        "interrupted": False,
    }
    document = Document(describe_machine(device), settings, [], [])
    print("\n".join(_heading(document.machine)), flush=True)
    try:
        _measure(document, cases, device, args.memory)
    except KeyboardInterrupt:
        settings["interrupted"] = True
        print(f"\ninterrupted: {len(document.cases)} of {len(cases)} cases are measured")
    if document.cases:
        results = document.cases
        lines = [*mean_lines(results), *_ceiling_lines(document.ceilings), *_refused_lines(results)]
        print("\n".join([*lines, *(f"wrote {path}" for path in write(document, args.json))]))
    return INTERRUPTED if settings["interrupted"] else exit_code(document.cases)


def _measure(document: Document, cases: Sequence[Case], device: torch.device, memory: bool | None) -> None:
    """Add ceilings and cases to the document, each as soon as it is measured."""
    document.ceilings += [measure_ceilings(device, dtype) for dtype in dict.fromkeys(c.dtype for c in cases)]
    progress = Progress(len(cases))
    for case in cases:
        progress.start(case.name)
        result = run_case(
            case,
            document.settings["peers"],
            device,
            rounds=document.settings["rounds"],
            min_sample_s=document.settings["min_sample_s"],
            memory=memory or (memory is None and case.family == "conv" and case.mode == "training"),
        )
        document.cases.append(result)
        ceilings = document.ceiling(case.dtype)
        assert ceilings is not None
        progress.finish([*case_lines(result, ceilings), ""])
    # Again at the end: a machine that was busy at one end shows its true ceilings at the other.
    document.ceilings[:] = [c.best(measure_ceilings(device, c.dtype)) for c in document.ceilings]


def write(document: Document, target: str | None) -> list[Path]:
    """Write the document to a file, or a file per family to the folder that `target` stands for.

    None: ``benchmarks/results/local``; an empty string: the machine's folder, to be committed.
    """
    if target:
        paths = {Path(target): document}
    else:
        folder = RESULTS / ("local" if target is None else machine_slug(document.machine))
        families = dict.fromkeys(case.family for case in document.cases)
        paths = {folder / f"{family}.json": document.of_family(family) for family in families}
    for path, part in paths.items():
        part.write(path)
    return list(paths)


def exit_code(results: Sequence[CaseResult]) -> int:
    """Return 1 for a wrong answer of anyone, and for less of those that must be right everywhere."""
    peers = [peer for case in results for peer in case.peers]
    return int(
        any(p.status == "wrong" or (p.name in OURS and p.status in ("inexact", "failed")) for p in peers)
    )


def _chosen_peers(text: str, no_compile: bool) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()] or list(PEERS)
    unknown = sorted(set(names) - set(PEERS))
    if unknown:
        raise ValueError(f"--peers: got {', '.join(unknown)}, expected some of {', '.join(PEERS)}")
    return [name for name in names if not (no_compile and name == COMPILE)]


def _listing(cases: Sequence[Case]) -> list[str]:
    lines = [f"{'case':<44} {'dtype':<9} {'Mflop':>10} {'MB':>9}  flop/byte"]
    for c in cases:
        quick = "  quick" if c.quick else ""
        mflop, mb, ratio = c.flops / 1e6, c.bytes / 1e6, c.flops / c.bytes
        lines.append(f"{c.name:<44} {c.dtype:<9} {mflop:>10.3f} {mb:>9.3f}  {ratio:>9.2f}{quick}")
    return lines


def _heading(machine: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items() if v)
    where = machine["gpu"]["name"] if machine["gpu"] else machine["cpu"]
    lines = [
        f"{where}, {machine['cores']} cores, {machine['threads']} threads, {' '.join(machine['isa'])}",
        f"python {machine['python']}, {versions}, commit {machine['commit']}",
    ]
    if machine["load_average"][0] > 0.5 * (machine["cores"] or 1):
        lines.append(f"load average {machine['load_average'][0]}: the machine is busy, expect wide spreads")
    return [*lines, ""]


def _ceiling_lines(ceilings: Sequence[Ceilings]) -> list[str]:
    return [
        f"measured ceilings, {c.dtype}: {c.peak / 1e9:.0f} GFLOP/s, {c.bandwidth / 1e9:.1f} GB/s"
        for c in ceilings
    ]


def _at_least_one(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected a number from 1 on")
    return int(text)


def _refused_lines(results: Sequence[CaseResult]) -> list[str]:
    refused = [
        f"{p.status.upper()}: {p.name} in {case.name}, {p.reason}"
        for case in results
        for p in case.peers
        if p.status in ("wrong", "inexact", "failed")
    ]
    return ["", "not timed:", *refused] if refused else []


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fusednn bench", description=__doc__.split("\n")[0])
    parser.add_argument("--family", default="", help="only this family, e.g. rnn")
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose name contains this")
    parser.add_argument("--mode", default="", choices=("inference", "training"))
    parser.add_argument("--peers", default="", metavar="A,B", help=f"of {', '.join(PEERS)}; default: all")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it is slow)")
    parser.add_argument("--quick", action="store_true", help="the small suite: few cases, few rounds")
    parser.add_argument("--rounds", type=_at_least_one, help=f"default {ROUNDS}, with --quick {QUICK_ROUNDS}")
    parser.add_argument("--min-sample-ms", type=float, default=MIN_SAMPLE_S * 1e3, help="default %(default)g")
    parser.add_argument(
        "--memory",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="peak memory too (CPU: a process per peer); default: for training steps of convolutions",
    )
    parser.add_argument("--device", default="", choices=("cpu", "cuda"), help="default: cuda if available")
    parser.add_argument("--threads", type=_at_least_one, help="default: torch's own number")
    parser.add_argument(
        "--json",
        nargs="?",
        const="",
        metavar="PATH",
        help="write here; without PATH: benchmarks/results/<machine>/, to be committed",
    )
    parser.add_argument("--list", "--dry-run", action="store_true", help="list the cases and run nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
