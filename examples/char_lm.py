"""A character language model on the Python standard library's sources, with torch's cells and with fusednn's.

Both models start from the same weights and see the same batches, step by step in turn. The losses must agree
to 1e-4 relative at every step, else the exit code is 1.

    python examples/char_lm.py --cell gru --steps 100
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusednn

CELLS = {"lstm": (nn.LSTMCell, fusednn.LSTMCell), "gru": (nn.GRUCell, fusednn.GRUCell)}
TOLERANCE = 1e-4  # relative difference of the losses
MAX_CHARACTERS = 2_000_000
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))


class CharLM(nn.Module):
    """Embedding, one recurrent cell stepped over time, linear: logits of the next character."""

    def __init__(self, cell_class: Callable[[int, int], nn.Module], hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(ALPHABET), hidden)
        self.cell = cell_class(hidden, hidden)
        self.head = nn.Linear(hidden, len(ALPHABET))

    def forward(self, tokens: Tensor, state=None):
        """Return logits [B, T, V] and the state after the last of the tokens [B, T]."""
        hidden = []
        for x in self.embedding(tokens).unbind(1):  # [B, H]
            state = self.cell(x, state)
            hidden.append(state[0] if isinstance(state, tuple) else state)
        return self.head(torch.stack(hidden, 1)), state


def load_text(seed: int) -> Tensor:
    """Return the standard library's sources as one row of token numbers, at most MAX_CHARACTERS."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    random.Random(seed).shuffle(files)
    pieces: list[str] = []
    left = MAX_CHARACTERS
    for file in files:
        pieces.append(file.read_text(encoding="utf-8", errors="ignore")[:left])
        left -= len(pieces[-1])
        if left == 0:
            break
    number = {character: i for i, character in enumerate(ALPHABET)}
    return torch.tensor([number[c] for c in "".join(pieces) if c in number])


def batches(text: Tensor, batch: int, seq: int, seed: int) -> Iterator[Tensor]:
    """Yield windows [B, T + 1] at random places, for ever."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(seq + 1)
    while True:
        starts = torch.randint(len(text) - seq, (batch, 1), generator=generator)
        yield text[starts + offsets]


def loss_of(model: nn.Module, window: Tensor) -> Tensor:
    """Mean cross entropy of each next character, in nats."""
    logits, _ = model(window[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())


@dataclass
class Run:
    """A model in training and its record; ``backend`` is None for torch's own layers."""

    name: str
    model: nn.Module
    backend: str | None = None
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    perplexity: list[float] = field(default_factory=list)  # at the start, at the end

    def __post_init__(self) -> None:
        # Not Adam: dividing by tiny second moments, it makes rounding differences grow exponentially, those
        # between two runs of torch's own layers as well.
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.3, momentum=0.9)

    def layers(self):
        """Choose the backend for the calls inside."""
        return fusednn.use_backend(self.backend) if self.backend else nullcontext()

    def step(self, window: Tensor) -> None:
        """Train on one batch, and note its loss and time."""
        begin = now(window.device)
        self.optimizer.zero_grad()
        with self.layers():
            loss = loss_of(self.model, window)
            loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.seconds.append(now(window.device) - begin)
        self.losses.append(loss.item())

    def evaluate(self, window: Tensor) -> None:
        """Note the perplexity on text that is not trained on."""
        with torch.no_grad(), self.layers():
            self.perplexity.append(math.exp(loss_of(self.model, window)))

    @property
    def median_ms(self) -> float:
        """Median time of a step."""
        return 1e3 * statistics.median(self.seconds)


def now(device: torch.device) -> float:
    """Read the clock when the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def progress(steps: int) -> Iterator[int]:
    """Count the steps: under tqdm's bar where it is installed, else with a line per tenth."""
    try:
        from tqdm import tqdm
    except ImportError:
        for i in range(steps):
            if i % max(1, steps // 10) == 0:
                print(f"step {i} of {steps}", flush=True)
            yield i
    else:
        yield from tqdm(range(steps), unit="step")


def generate(run: Run, prompt: str, length: int, seed: int, device: torch.device) -> str:
    """Continue the prompt by sampling."""
    generator = torch.Generator().manual_seed(seed)
    tokens, state, text = torch.tensor([[ALPHABET.index(c) for c in prompt]]), None, prompt
    with torch.inference_mode(), run.layers():
        for _ in range(length):
            logits, state = run.model(tokens.to(device), state)
            chances = (logits[0, -1].cpu() / 0.7).softmax(0)  # temperature
            tokens = torch.multinomial(chances, 1, generator=generator)[None]
            text += ALPHABET[int(tokens.item())]
    return text


def twins(options: argparse.Namespace, build: Callable[[Any], nn.Module], classes) -> tuple[Run, Run]:
    """Return the runs of the model that is built of torch's class and of fusednn's, with the same weights."""
    torch.manual_seed(options.seed)
    torch_class, fused_class = classes
    theirs, ours = build(torch_class), build(fused_class)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    return (
        Run(f"torch.nn.{torch_class.__name__}", theirs.to(options.device)),
        Run(f"fusednn.{fused_class.__name__}", ours.to(options.device), options.backend),
    )


def train(options: argparse.Namespace, runs: tuple[Run, Run]) -> None:
    """Train both models on the same batches."""
    text = load_text(options.seed)
    held_out = len(text) // 20
    windows = batches(text[held_out:], options.batch, options.seq, options.seed)
    test = next(batches(text[:held_out], 8 * options.batch, options.seq, options.seed)).to(options.device)
    for run in runs:
        run.evaluate(test)
    for i in progress(options.steps):
        window = next(windows).to(options.device)
        for run in runs if i % 2 == 0 else reversed(runs):  # neither always goes first
            run.step(window)
    for run in runs:
        run.evaluate(test)


def differences(theirs: Run, ours: Run) -> list[float]:
    """Relative difference of the losses at each step."""
    return [abs(a - b) / abs(a) for a, b in zip(theirs.losses, ours.losses, strict=True)]


def plot(runs: tuple[Run, Run], title: str, path: Path, tolerance: float) -> None:
    """Draw losses, their difference and the time of each step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = ("#5b6770", "#d1495b")
    figure, axes = plt.subplot_mosaic(
        [["loss", "time"], ["difference", "time"]],
        figsize=(11, 5),
        height_ratios=(2, 1),
        layout="constrained",
    )
    for run, colour, width in zip(runs, colours, (4, 1.2)):
        axes["loss"].plot(run.losses, color=colour, linewidth=width, label=run.name)
    axes["loss"].set(ylabel="training loss (nats per character)")
    axes["loss"].sharex(axes["difference"])
    axes["loss"].tick_params(labelbottom=False)
    axes["difference"].semilogy([max(d, 1e-9) for d in differences(*runs)], color=colours[1], linewidth=1)
    axes["difference"].axhline(tolerance, color="black", linewidth=1, linestyle="--")
    axes["difference"].text(0, tolerance * 1.4, "tolerance", va="bottom", fontsize="small")
    axes["difference"].set(xlabel="step", ylabel="relative difference", ylim=(5e-10, 1e-2))
    for run, colour in zip(runs, colours):
        milliseconds = [1e3 * s for s in run.seconds]
        label = f"{run.name}, median {run.median_ms:.1f} ms"
        axes["time"].plot(milliseconds, ".", color=colour, markersize=4, alpha=0.6)
        axes["time"].axhline(run.median_ms, color=colour, linewidth=1.5, label=label)
    most = 3e3 * max(statistics.median(run.seconds) for run in runs)  # a stray step must not flatten the rest
    axes["time"].set(xlabel="step", ylabel="time of a training step (ms)")
    axes["time"].set_ylim(0, min(most, 1.1e3 * max(max(run.seconds) for run in runs)))
    for name in ("loss", "time"):
        axes[name].legend(frameon=False)
    for axis in axes.values():
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write(
    options: argparse.Namespace, runs: tuple[Run, Run], name: str, title: str, tolerance: float
) -> list[Path]:
    """Write the record and, where matplotlib is installed, the plot; return the paths."""
    options.out.mkdir(parents=True, exist_ok=True)
    base = options.out / name
    settings = {k: str(v) if isinstance(v, (Path, torch.device)) else v for k, v in vars(options).items()}
    keep = ("name", "losses", "seconds", "perplexity")
    record = {
        "settings": settings | {"torch": torch.__version__, "threads": torch.get_num_threads()},
        "runs": [{k: getattr(run, k) for k in keep} for run in runs],
    }
    paths = [base.with_suffix(".json")]
    paths[0].write_text(json.dumps(record, indent=1) + "\n")
    where = f"CPU threads: {torch.get_num_threads()}" if options.device.type == "cpu" else str(options.device)
    try:
        plot(runs, f"{title}, {where}", base.with_suffix(".png"), tolerance)
    except ImportError as error:
        print(f"no plot: {error}; pip install matplotlib adds it")
    else:
        paths.append(base.with_suffix(".png"))
    return paths


def report(
    options: argparse.Namespace, runs: tuple[Run, Run], name: str, title: str, tolerance: float
) -> int:
    """Print times and a sample, write the files, compare the losses; return the exit code."""
    theirs, ours = runs
    width = max(len(run.name) for run in runs)
    print(f"\n{'':>{width}}  {'ms per step':>11}  {'perplexity at the start':>23}  {'at the end':>10}")
    for run in runs:
        start, end = run.perplexity
        print(f"{run.name:>{width}}  {run.median_ms:>11.2f}  {start:>23.2f}  {end:>10.2f}")
    print(f"speed-up of a whole training step: {theirs.median_ms / ours.median_ms:.2f}")
    print(f"\n{generate(ours, 'def ', 300, options.seed, options.device)}\n")
    for path in write(options, runs, name, title, tolerance):
        print(f"wrote {path}")
    worst = differences(theirs, ours)
    step = max(range(len(worst)), key=lambda i: math.inf if math.isnan(worst[i]) else worst[i])
    if not worst[step] <= tolerance:
        print(
            f"the losses differ: at step {step} torch.nn has {theirs.losses[step]:.6f}, fusednn "
            f"{ours.losses[step]:.6f}, {worst[step]:.1e} relative, expected at most {tolerance:.0e}",
            file=sys.stderr,
        )
        return 1
    print(f"the losses agree to {worst[step]:.1e} relative (largest at step {step}; bound {tolerance:.0e})")
    return 0


def common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what does not depend on the model."""
    parser.add_argument("--backend", default="auto", help="of fusednn: auto, reference, cpu, cuda, triton")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("out"))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--seq", type=int, default=32, help="characters of a window")
    parser.add_argument("--cell", choices=CELLS, default="lstm")
    common_arguments(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, cells=CELLS) -> int:
    """Train both, compare, report; return the exit code."""
    options = parse(argv)
    runs = twins(options, lambda cell: CharLM(cell, options.hidden), cells[options.cell])
    train(options, runs)
    title = (
        f"{options.cell.upper()} character model: batch {options.batch}, {options.seq} characters, "
        f"hidden {options.hidden}"
    )
    return report(options, runs, f"char_lm_{options.cell}", title, TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
