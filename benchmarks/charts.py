"""The two charts of a report, drawn with matplotlib: speed-ups as bars, and the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .ceilings import Ceilings
from .registry import COMPILE, EAGER, FUSEDNN, ONNXRUNTIME, OPENVINO
from .results import CaseResult, Document
from .summary import best_torch, operation, shape_text, speedup, times

# Okabe and Ito's palette: told apart by readers with any colour vision.
PEER_COLOURS = {EAGER: "#0072B2", COMPILE: "#E69F00", ONNXRUNTIME: "#009E73", OPENVINO: "#CC79A7"}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP*X<>ph"


def draw_speedups(document: Document, path: Path) -> list[Path]:
    """Draw fusednn's speed-up against each peer, a panel per mode; bars left of 1 are losses."""
    panels = _by_mode(document)
    opponents = [n for n in PEER_COLOURS if any(speedup(c, n) is not None for c in document.cases)]
    if not opponents:
        return []
    rows = max(len(cases) for cases in panels.values())
    size = (7.0 * len(panels), 1.6 + rows * (0.2 * len(opponents) + 0.18))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (mode, cases) in zip(axes, panels.items()):
        _speedup_panel(axis, mode, cases, opponents)
    handles = [Patch(color=PEER_COLOURS[name], label=f"against {name}") for name in opponents]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8.5, frameon=False)
    figure.suptitle(f"fusednn's speed-up, {_where(document)}  (longer to the right is better)")
    return _save(figure, path)


def _speedup_panel(axis: Axes, mode: str, cases: Sequence[CaseResult], opponents: Sequence[str]) -> None:
    height = 0.84 / len(opponents)
    for k, name in enumerate(opponents):
        shift = (k - (len(opponents) - 1) / 2) * height
        found = [(row + shift, speedup(case, name)) for row, case in enumerate(cases)]
        bars = [(y, ratio) for y, ratio in found if ratio is not None]
        # A bar begins at 1, not at 0: on a log axis a loss is then as long as the win of the same factor.
        axis.barh(
            [y for y, _ in bars],
            [r - 1 for _, r in bars],
            height=height * 0.92,
            left=1,
            color=PEER_COLOURS[name],
        )
        for y, ratio in bars:
            offset, side = ((3, 0), "left") if ratio >= 1 else ((-3, 0), "right")
            axis.annotate(
                times(ratio)[:-1],
                (ratio, y),
                offset,
                textcoords="offset points",
                ha=side,
                va="center",
                fontsize=7.5,
            )
    ratios = [r for case in cases for name in opponents if (r := speedup(case, name)) is not None] + [1.0]
    for row, case in enumerate(cases):
        ours = case.peer(FUSEDNN)
        if ours is not None and ours.timing is None:
            axis.annotate(
                f"no time: fusednn {ours.status}", (1, row), (6, 0), textcoords="offset points", fontsize=8
            )
    axis.set_xscale("log")
    margin = 1.2 * (max(ratios) / min(ratios)) ** 0.15  # room for the numbers at the bars' ends
    axis.set_xlim(min(ratios) / margin, max(ratios) * margin)
    _plain_log_ticks(axis.xaxis, base=2)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_yticks(range(len(cases)), [f"{operation(c)}\n{shape_text(c)}" for c in cases], fontsize=8.5)
    axis.set_ylim(len(cases) - 0.5, -0.5)
    for row in range(1, len(cases)):
        axis.axhline(row - 0.5, color="0.9", linewidth=0.8)
    axis.set_xlabel("peer's time / fusednn's time, log scale")
    axis.set_title(mode)
    axis.spines[["top", "right"]].set_visible(False)


def draw_roofline(document: Document, path: Path) -> list[Path]:
    """Draw what fusednn (filled) and the best of eager and compile (hollow) reach under the measured roof."""
    panels = {
        key: cases
        for key, cases in _by_mode_and_dtype(document).items()
        if document.ceiling(key[1]) and any(case.median(FUSEDNN) for case in cases)
    }
    if not panels:
        return []
    figure = Figure(figsize=(7.0 * len(panels), 5.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    operations = list(dict.fromkeys(map(operation, document.cases)))
    shapes = list(dict.fromkeys(map(shape_text, document.cases)))
    for axis, ((mode, dtype), cases) in zip(axes, panels.items()):
        ceilings = document.ceiling(dtype)
        assert ceilings is not None
        _roof(axis, ceilings, cases)
        for case in cases:
            colour = COLOURS[operations.index(operation(case)) % len(COLOURS)]
            marker = MARKERS[shapes.index(shape_text(case)) % len(MARKERS)]
            _roofline_point(axis, case, colour, marker)
        axis.set_title(f"{mode}, {dtype}")
    axes[0].set_ylabel("GFLOP/s")
    handles = [
        Line2D([], [], color=COLOURS[i % len(COLOURS)], lw=3, label=n) for i, n in enumerate(operations)
    ]
    handles += [
        Line2D([], [], color="0.35", marker=MARKERS[i % len(MARKERS)], ls="", label=s)
        for i, s in enumerate(shapes)
    ]
    handles += [
        Line2D([], [], color="0.35", marker="o", ls="", label="filled: fusednn"),
        Line2D([], [], color="0.35", marker="o", mfc="white", ls="", label="hollow: best of eager, compile"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8.5, frameon=False)
    figure.suptitle(f"Measured roofline, {_where(document)}")
    return _save(figure, path)


def _roof(axis: Axes, ceilings: Ceilings, cases: Sequence[CaseResult]) -> None:
    intensities = [case.flops / case.bytes for case in cases]
    ridge = ceilings.peak / ceilings.bandwidth
    left, right = min(*intensities, ridge) / 2, max(*intensities, ridge) * 3
    xs = [left, ridge, right]
    axis.plot(
        xs, [min(ceilings.peak, x * ceilings.bandwidth) / 1e9 for x in xs], color="black", linewidth=1.5
    )
    axis.annotate(
        f"{ceilings.peak / 1e9:.0f} GFLOP/s", (right, ceilings.peak / 1e9), (0, 4),
        textcoords="offset points", ha="right", fontsize=8.5,
    )  # fmt: skip
    middle = left * (ridge / left) ** 0.35
    axis.annotate(
        f"{ceilings.bandwidth / 1e9:.1f} GB/s", (middle, middle * ceilings.bandwidth / 1e9), (-4, 6),
        textcoords="offset points", ha="right", fontsize=8.5,
    )  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("flop per byte of least traffic")
    axis.grid(which="major", color="0.92")
    _plain_log_ticks(axis.xaxis)
    _plain_log_ticks(axis.yaxis)
    axis.spines[["top", "right"]].set_visible(False)


def _roofline_point(axis: Axes, case: CaseResult, colour: str, marker: str) -> None:
    x = case.flops / case.bytes
    best = best_torch(case)
    medians = {"white": best.timing.median_s if best and best.timing else None, colour: case.median(FUSEDNN)}
    heights = {face: case.flops / m / 1e9 for face, m in medians.items() if m}
    axis.plot([x] * len(heights), list(heights.values()), color=colour, linewidth=0.8, alpha=0.6)
    for face, y in heights.items():
        axis.plot([x], [y], marker=marker, color=colour, mfc=face, markersize=7, ls="", zorder=3)


def _plain_log_ticks(axis: Axis, base: int = 10) -> None:
    axis.set_major_locator(LogLocator(base))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axis.set_minor_formatter(NullFormatter())


def _by_mode(document: Document) -> dict[str, list[CaseResult]]:
    panels: dict[str, list[CaseResult]] = {}
    for case in document.cases:
        panels.setdefault(case.mode, []).append(case)
    return panels


def _by_mode_and_dtype(document: Document) -> dict[tuple[str, str], list[CaseResult]]:
    panels: dict[tuple[str, str], list[CaseResult]] = {}
    for case in document.cases:
        panels.setdefault((case.mode, case.dtype), []).append(case)
    return panels


def _where(document: Document) -> str:
    machine = document.machine
    name = machine["gpu"]["name"] if machine["gpu"] else f"{machine['cpu']}, {machine['threads']} threads"
    return f"{name}, torch {machine['versions']['torch']}"


def _save(figure: Figure, path: Path) -> list[Path]:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=130)
    return [path]
