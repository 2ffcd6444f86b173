"""What compilers have proved already: a result is kept while nothing that went into it has changed.

A proof is named by its inputs: the command, and the version of each tool. It holds while the files that it
was made from, headers included, have the contents that they had. Failures are not kept. The folder is safe to
delete.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "build" / "proofs"


@functools.cache
def version(tool: str) -> str:
    """Return what a tool says of its version."""
    return subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout


@functools.cache
def _digest(path: str) -> str | None:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return None


def prerequisites(makefile: str) -> list[str]:
    """Return the files that a rule of make, as compilers write it, names after its target."""
    _, _, names = makefile.replace("\\\n", " ").partition(": ")
    return [re.sub(r"\\(.)", r"\1", name) for name in re.findall(r"(?:\\.|\S)+", names)]


class Proof:
    """A result that is kept under `inputs`, which must be all that it depends on beside files."""

    def __init__(self, *inputs: str) -> None:
        name = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
        self._path = FOLDER / f"{name}.json"

    def known(self) -> Any:
        """Return the result that was kept; None if there is none or a file has changed."""
        try:
            kept = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return None
        fresh = all(_digest(path) == digest for path, digest in kept["files"].items())
        return kept["result"] if fresh else None

    def keep(self, result: Any, files: Iterable[str] = ()) -> None:
        """Keep a result that was made from `files`."""
        kept = {"result": result, "files": {path: _digest(path) for path in files}}
        FOLDER.mkdir(parents=True, exist_ok=True)
        written = self._path.with_suffix(f".{os.getpid()}")
        written.write_text(json.dumps(kept))
        written.replace(self._path)
