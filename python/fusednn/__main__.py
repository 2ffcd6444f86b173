"""``python -m fusednn info``, ``bench`` and ``--version``."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ._version import __version__

USAGE = """usage: python -m fusednn info [--json]     versions, devices, backends, and what is missing
       python -m fusednn bench [options]   the benchmark suite; bench --help lists its options
       python -m fusednn --version
"""


def checkout() -> Path | None:
    """Return the source checkout that this package lies in, or None if it was installed by copy."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "benchmarks" / "run.py").is_file() else None


def info(argv: Sequence[str]) -> int:
    """Print what :mod:`fusednn.info` finds."""
    from . import info as facts

    parser = argparse.ArgumentParser(prog="python -m fusednn info")
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    args = parser.parse_args(argv)
    found = facts.collect()
    print(json.dumps(found, indent=2) if args.json else facts.report(found))
    return 0


def bench(argv: Sequence[str]) -> int:
    """Hand over to the benchmarks of the checkout."""
    root = checkout()
    if root is None:
        print(
            "fusednn bench: the benchmarks are in the source checkout, not in the installed package: "
            "clone the repository and run make bench there",
            file=sys.stderr,
        )
        return 2
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module("benchmarks.run").main(list(argv)) or 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 2 for one that doesn't exist."""
    command, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if command == "--version":
        print(f"fusednn {__version__}")
        return 0
    commands = {"info": info, "bench": bench}
    if command not in commands:
        print(f"got {command!r}, expected info or bench\n{USAGE}", end="", file=sys.stderr)
        return 2
    return commands[command](rest)


if __name__ == "__main__":
    sys.exit(main())
