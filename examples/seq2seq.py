"""Reverse and sort sequences of random symbols: an encoder and a decoder with LuongAttention between them.

The decoder is trained by teacher forcing. It is tested on sequences that are never trained on, where it
decodes greedily, reading its own outputs and no target; the exit code is 1 unless more than 99 % of the
symbols are right.

    python examples/seq2seq.py --task sort --length 3 8 --draw
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fusednn

TASKS = ("reverse", "sort")
PADDING, START, END, FIRST = range(4)  # numbers of the special symbols, and of the first of the others
TARGET = 0.99


class Batch(NamedTuple):
    """Sequences and what the decoder should say: sources [B, S], lengths [B], targets [B, S + 1] with END."""

    source: Tensor
    lengths: Tensor
    target: Tensor


def solve(task: str, source: Tensor, lengths: Tensor) -> Tensor:
    """Return the targets [B, S + 1]: the answer, END and PADDING."""
    places = torch.arange(source.shape[1])
    inside = places < lengths.unsqueeze(1)
    if task == "sort":
        answer = source.masked_fill(~inside, torch.iinfo(source.dtype).max).sort(1).values
    else:
        answer = source.gather(1, (lengths.unsqueeze(1) - 1 - places).clamp(min=0))
    answer = F.pad(answer.masked_fill(~inside, PADDING), (0, 1), value=PADDING)
    return answer.scatter(1, lengths.unsqueeze(1), END)


def is_held_out(source: Tensor) -> Tensor:
    """Tell for each sequence whether it is one of the tenth that is kept for the test."""
    checksum = torch.zeros_like(source[:, 0])
    for symbols in source.flip(1).unbind(1):  # PADDING is 0: it changes nothing
        checksum = (31 * checksum + symbols) % 10_007
    return checksum % 10 == 0


def batches(options: argparse.Namespace, task: str, held_out: bool, seed: int) -> Iterator[Batch]:
    """Yield batches of one task, for ever."""
    generator = torch.Generator().manual_seed(seed)
    shortest, longest = options.length
    while True:
        found = 0
        kept: list[tuple[Tensor, Tensor]] = []
        while found < options.batch:
            lengths = torch.randint(shortest, longest + 1, (2 * options.batch,), generator=generator)
            shape = (2 * options.batch, longest)
            source = torch.randint(FIRST, FIRST + options.symbols, shape, generator=generator)
            source.masked_fill_(torch.arange(longest) >= lengths.unsqueeze(1), PADDING)
            chosen = is_held_out(source) == held_out
            kept.append((source[chosen], lengths[chosen]))
            found += int(chosen.sum())
        source, lengths = (torch.cat(parts)[: options.batch] for parts in zip(*kept, strict=True))
        yield Batch(source, lengths, solve(task, source, lengths))


class Seq2Seq(nn.Module):
    """A bidirectional LSTM, and a decoder that attends to it and is fed the attention vector back."""

    def __init__(self, symbols: int, hidden: int, score: str = "general") -> None:
        super().__init__()
        vocabulary = FIRST + symbols
        self.source_embedding = nn.Embedding(vocabulary, hidden)
        self.target_embedding = nn.Embedding(vocabulary, hidden)
        self.encoder = nn.LSTM(hidden, hidden // 2, batch_first=True, bidirectional=True)
        self.cell = fusednn.LSTMCell(2 * hidden, hidden)
        self.attention = fusednn.LuongAttention(hidden, score=score)
        self.head = nn.Linear(hidden, vocabulary)

    def encode(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Return encoder outputs [B, S, H], where they are padding, and the decoder's state before START."""
        packed = pack_padded_sequence(
            self.source_embedding(source), lengths, batch_first=True, enforce_sorted=False
        )
        outputs, last = self.encoder(packed)
        memory, _ = pad_packed_sequence(outputs, batch_first=True, total_length=source.shape[1])
        padding = torch.arange(source.shape[1]) >= lengths.unsqueeze(1)
        h, c = (torch.cat(tuple(both), 1) for both in last)  # [2, B, H / 2] to [B, H]
        return memory, padding, (h, c, torch.zeros_like(h))

    def step(
        self, symbols: Tensor, state: tuple[Tensor, ...], memory: Tensor, padding: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Read one symbol [B]; return the attention vector, the weights [B, S] and the state."""
        h, c, fed = state
        h, c = self.cell(torch.cat((self.target_embedding(symbols), fed), 1), (h, c))
        fed, weights = self.attention(h, memory, padding)
        return fed, weights, (h, c, fed)

    def forward(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        """Return logits [B, T, V] of each symbol of the target, given those before it."""
        memory, padding, state = self.encode(source, lengths)
        vectors = []
        for symbols in F.pad(target[:, :-1], (1, 0), value=START).unbind(1):
            vector, _, state = self.step(symbols, state, memory, padding)
            vectors.append(vector)
        return self.head(torch.stack(vectors, 1))

    @torch.inference_mode()
    def decode(self, source: Tensor, lengths: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        """Decode greedily from START until each sequence has its END, or for `limit` symbols.

        Returns symbols [B, T], END included and PADDING after it, and weights [B, T, S].
        """
        memory, padding, state = self.encode(source, lengths)
        symbols = torch.full_like(lengths, START)
        ended = torch.zeros_like(lengths, dtype=torch.bool)
        said: list[Tensor] = []
        attended: list[Tensor] = []
        while len(said) < limit and not ended.all():
            vector, weights, state = self.step(symbols, state, memory, padding)
            symbols = self.head(vector).argmax(1).masked_fill(ended, PADDING)
            ended = ended | (symbols == END)
            said.append(symbols)
            attended.append(weights)
        return torch.stack(said, 1), torch.stack(attended, 1)


@dataclass
class Run:
    """A model in training on one task and its record."""

    task: str
    model: Seq2Seq
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def progress(steps: int, name: str) -> Iterator[int]:
    """Count the steps: under tqdm's bar where it is installed, else with a line per tenth."""
    try:
        from tqdm import tqdm
    except ImportError:
        for i in range(steps):
            if i % max(1, steps // 10) == 0:
                print(f"{name}: step {i} of {steps}", flush=True)
            yield i
    else:
        yield from tqdm(range(steps), desc=name, unit="step")


def train(options: argparse.Namespace, task: str) -> Run:
    """Train a model by teacher forcing."""
    torch.manual_seed(options.seed)
    run = Run(task, Seq2Seq(options.symbols, options.hidden, options.score))
    optimizer = torch.optim.Adam(run.model.parameters(), lr=options.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, options.steps, pct_start=0.2)
    examples = batches(options, task, held_out=False, seed=options.seed + 1)
    for _ in progress(options.steps, task):
        batch = next(examples)
        begin = time.perf_counter()
        optimizer.zero_grad()
        logits = run.model(*batch)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.target.flatten(), ignore_index=PADDING)
        loss.backward()
        nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        run.seconds.append(time.perf_counter() - begin)
        run.losses.append(loss.item())
    return run


def accuracy(said: Tensor, target: Tensor) -> tuple[float, float]:
    """Return the shares of the targets' symbols, END among them, and of whole sequences that are right."""
    length = max(said.shape[1], target.shape[1])
    said, target = (F.pad(t, (0, length - t.shape[1]), value=PADDING) for t in (said, target))
    right, counts = said == target, target != PADDING
    return right[counts].double().mean().item(), right.all(1).double().mean().item()


def test(options: argparse.Namespace, run: Run) -> tuple[float, float]:
    """Return accuracy of symbols and of whole sequences that were never trained on."""
    run.model.eval()
    found = []
    examples = batches(options, run.task, held_out=True, seed=options.seed + 10**6)
    for _ in range(options.test_batches):
        source, lengths, target = next(examples)
        said, _ = run.model.decode(source, lengths, limit=2 * source.shape[1])
        found.append(accuracy(said, target))
    symbols, sequences = (statistics.mean(shares) for shares in zip(*found, strict=True))
    return symbols, sequences


def draw(options: argparse.Namespace, run: Run, path: Path) -> None:
    """Draw the attention of one sequence that was never trained on."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    source, lengths, _ = next(batches(options, run.task, held_out=True, seed=options.seed + 10**6))
    longest = int(lengths.argmax())
    source, lengths = source[longest : longest + 1], lengths[longest : longest + 1]
    said, weights = run.model.decode(source, lengths, limit=2 * source.shape[1])
    figure, axis = plt.subplots(figsize=(6, 6), layout="constrained")
    axis.imshow(weights[0, :, : int(lengths)].numpy(), cmap="magma", vmin=0, vmax=1)
    read = [str(int(s) - FIRST) for s in source[0, : int(lengths)]]
    written = ["end" if s == END else str(int(s) - FIRST) for s in said[0]]
    axis.set_xticks(range(len(read)), read)
    axis.set_yticks(range(len(written)), written)
    axis.set(xlabel="source", ylabel="decoded, from the top", title=f"attention weights: {run.task}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=(*TASKS, "both"), default="both")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--symbols", type=int, default=16, help="how many different ones")
    parser.add_argument("--length", type=int, nargs=2, default=(3, 10), metavar=("SHORTEST", "LONGEST"))
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--score", choices=("dot", "general", "concat"), default="general")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--test-batches", type=int, default=16)
    parser.add_argument("--draw", action="store_true", help="the attention of one sequence, by matplotlib")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("out"), help="for --draw")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Train, test, report; return the exit code."""
    options = parse(argv)
    failed = False
    for task in TASKS if options.task == "both" else (options.task,):
        run = train(options, task)
        symbols, sequences = test(options, run)
        milliseconds = 1e3 * statistics.median(run.seconds)
        print(f"{task}: {milliseconds:.1f} ms a training step, loss {run.losses[-1]:.4f} at the end")
        print(f"{task}: {symbols:.2%} of symbols right (target {TARGET:.0%}), {sequences:.2%} of sequences")
        failed |= not symbols > TARGET
        if options.draw:
            path = options.out / f"seq2seq_{task}.png"
            options.out.mkdir(parents=True, exist_ok=True)
            try:
                draw(options, run, path)
            except ImportError as error:
                print(f"no plot: {error}; pip install matplotlib adds it")
            else:
                print(f"wrote {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are too small to share
    sys.exit(main())
