"""Which backend serves a call, and why the others do not.

An :class:`Operation` holds its implementations in the order in which ``auto`` tries them. Each has a
predicate that returns the reasons why it can't serve a call (none: it can), so that the same text explains a
fallback, an error, and :func:`explain`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from . import settings

logger = logging.getLogger("fusednn")

NOTHING = "no fusednn operation was called"

Reasons = list[str]


def no_reasons(*_args: Any) -> Reasons:
    """Nothing speaks against any call."""
    return []


def no_plan(*_args: Any) -> dict[str, Any]:
    """What a backend has to tell that plans nothing."""
    return {}


@dataclass(frozen=True)
class Implementation:
    """One backend's version of an operation.

    ``unsupported`` returns why it can't serve a call; ``unprofitable`` why ``auto`` should leave the call to
    another one, a matter of measurement that a backend asked for by name ignores; ``faster`` why ``auto``
    prefers it to those behind it. ``plan`` returns how it would go about a call that it serves, values by
    name, for :func:`explain`. It serves where a backend of ``stands_for`` is asked for by name and can't.
    """

    backend: str
    run: Callable[..., Any]
    unsupported: Callable[..., Reasons] = no_reasons
    unprofitable: Callable[..., Reasons] = no_reasons
    plan: Callable[..., dict[str, Any]] = no_plan
    faster: Callable[..., Reasons] = no_reasons
    stands_for: tuple[str, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """The backend that one call of an operation takes, its plan, and the reasons against each other one."""

    operation: str
    requested: str
    backend: str | None
    passed_over: dict[str, tuple[str, ...]]
    plan: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """Lay the choice out: a line, one for the plan, and one for each reason against another backend."""
        lines = [f"{self.operation}: {self.backend or 'no backend'} (asked for: {self.requested})"]
        if self.plan:
            lines.append("  plan: " + ", ".join(f"{name} {value}" for name, value in self.plan.items()))
        for name, reasons in self.passed_over.items():
            lines += [f"  not {name}: {reason}" for reason in reasons]
        return "\n".join(lines)


class Explanations(tuple[Explanation, ...]):
    """What :func:`explain` found, one for each call; prints as text, equal ones once with their number."""

    __slots__ = ()

    def __str__(self) -> str:
        """Join the texts of the calls, in the order in which each first came."""
        counted = Counter(map(str, self)).items()
        return "\n".join(f"{count} x {text}" if count > 1 else text for text, count in counted) or NOTHING

    __repr__ = __str__


_recorder: ContextVar[list[Explanation] | None] = ContextVar("fusednn_recorder", default=None)


def explaining() -> bool:
    """Whether :func:`explain` wants to see the operations of this call."""
    return _recorder.get() is not None


def record_composite(operation: str, reasons: Reasons) -> None:
    """Let :func:`explain` know of a layer that calls torch's own layers one by one, and why it must."""
    recorder = _recorder.get()
    if recorder is not None:
        passed_over = {"fused": tuple(reasons)}
        recorder.append(Explanation(operation, settings.backend(), "composite", passed_over))


def record_choice(operation: str, chosen: str, passed_over: dict[str, tuple[str, ...]]) -> None:
    """Let :func:`explain` know which way a layer took that its operations can't tell, and why not another."""
    recorder = _recorder.get()
    if recorder is not None:
        recorder.append(Explanation(operation, settings.backend(), chosen, passed_over))


class Operation:
    """A named operation and its implementations, best first."""

    def __init__(self, name: str, implementations: Sequence[Implementation]) -> None:
        self.name = name
        self.implementations = tuple(implementations)
        self._rows = {i.backend: i for i in self.implementations}
        self._stand_ins = {name: i for i in self.implementations for name in i.stands_for}
        self._said: set[tuple[str, ...]] = set()

    def __call__(self, *args: Any) -> Any:
        """Run the call on the backend that :meth:`choose` picks."""
        self.record(*args)
        return self.choose(*args).run(*args)

    def record(self, *args: Any) -> None:
        """Let :func:`explain` know of a call."""
        recorder = _recorder.get()
        if recorder is not None:
            recorder.append(self.explain(*args))

    def choose(self, *args: Any) -> Implementation:
        """Return the implementation for this call.

        Raises:
            RuntimeError: the backend asked for by name can't serve the call; the text has every reason.
        """
        requested = settings.backend()
        if requested != "auto":
            named = self._chosen(requested, args)
            if named is None:
                raise RuntimeError(_refusal(self.name, requested, self._reasons_against(requested, args)))
            return named
        chosen, passed_over, by_choice = self._first(args)
        if chosen is None:
            raise RuntimeError(_refusal(self.name, requested, passed_over))
        if passed_over and chosen.backend in ("torch", "reference") and not by_choice:
            self._say_once(passed_over)
        return chosen

    def takes(self, backend: str, *args: Any) -> bool:
        """Whether this backend serves the call; raises nothing where none does."""
        chosen = self._chosen(settings.backend(), args)
        return chosen is not None and chosen.backend == backend

    def explain(self, *args: Any) -> Explanation:
        """Return the choice for this call and the reasons against every other backend; runs nothing."""
        requested = settings.backend()
        chosen = self._chosen(requested, args)
        passed_over: dict[str, tuple[str, ...]] = {}
        for backend in self._backends() if requested != "auto" else self._auto_order():
            if chosen is not None and backend == chosen.backend:
                continue
            reasons = self._reasons_against(backend, args)
            if requested != "auto":
                reasons = reasons or [f"{requested} was asked for"]
            elif not reasons:
                first = [] if chosen is None else chosen.faster(*args) or [f"{chosen.backend} comes first"]
                reasons = self._rows[backend].unprofitable(*args) or first
            passed_over[backend] = tuple(reasons)
        if chosen is None:
            return Explanation(self.name, requested, None, passed_over)
        return Explanation(self.name, requested, chosen.backend, passed_over, chosen.plan(*args))

    def _chosen(self, requested: str, args: tuple[Any, ...]) -> Implementation | None:
        if requested == "auto":
            return self._first(args)[0]
        rows = (self._rows.get(requested), self._stand_ins.get(requested))
        return next((row for row in rows if row is not None and not row.unsupported(*args)), None)

    def _first(self, args: tuple[Any, ...]) -> tuple[Implementation | None, list[str], bool]:
        """The row that `auto` takes, what it passes over, and whether some of that by choice.

        The reference is no fallback then: it was measured to be faster.
        """
        passed_over: list[str] = []
        by_choice = False
        for implementation in self.implementations:
            reasons = implementation.unsupported(*args)
            if not reasons:
                reasons = implementation.unprofitable(*args)
                by_choice = by_choice or bool(reasons)
            if not reasons:
                return implementation, passed_over, by_choice
            passed_over += [f"{implementation.backend}: {reason}" for reason in reasons]
        return None, passed_over, by_choice

    def _auto_order(self) -> Iterable[str]:
        own = [i.backend for i in self.implementations]
        return own + [b for b in self._backends() if b not in own]

    def _backends(self) -> list[str]:
        """Those to explain: torch's own op only where the operation has it in its table."""
        return [b for b in settings.BACKENDS[1:] if b != "torch" or b in self._rows]

    def _reasons_against(self, backend: str, args: tuple[Any, ...]) -> Reasons:
        if backend not in self._rows:
            return [f"{self.name} has no {backend} implementation"]
        return self._rows[backend].unsupported(*args)

    def _say_once(self, passed_over: list[str]) -> None:
        key = tuple(passed_over)
        if key not in self._said:
            self._said.add(key)
            logger.warning(
                "%s: falls back to the reference, correct but slower (said once): %s",
                self.name,
                "; ".join(passed_over),
            )


def _refusal(operation: str, requested: str, reasons: Iterable[str]) -> str:
    listed = "\n".join(f"  - {reason}" for reason in reasons)
    return (
        f"{operation}: backend {requested!r} can't serve this call:\n{listed}\n"
        "Ask for 'auto' to let fusednn choose, or 'reference' for plain PyTorch."
    )


def explain(module_or_function: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Explanations:
    """Say which backend each fusednn operation of a call takes, and why not the others.

    Args:
        module_or_function: a module or function that uses fusednn's layers, at any depth.
        *inputs: its positional arguments.
        **kwargs: its keyword arguments.

    Returns:
        A tuple of :class:`Explanation`, one for each operation called, in order; ``print`` shows it as text.

    The call is made once, as it stands (gradients are recorded if they would be). An error it raises, such
    as a backend asked for by name that can't serve, is part of the explanation if an operation raised it.
    """
    found: list[Explanation] = []
    token = _recorder.set(found)
    try:
        module_or_function(*inputs, **kwargs)
    except RuntimeError:
        if not found or found[-1].backend is not None:
            raise
    finally:
        _recorder.reset(token)
    return Explanations(found)
