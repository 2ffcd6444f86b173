"""Steer along a rendered road by attention: DrivingNet learns a road's curvature from camera frames.

The road is drawn from a seed: curvature, lane markings, shadows, distractors off the road. The network trains
on short drives and is tested on others; the exit code is 1 unless its R² there exceeds the target. For the
first steps the same network of torch.nn layers, its time loop written out, trains beside it, for the times.

    python examples/driving.py --steps 300 --encoder separable
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusednn.models import DrivingNet

HORIZON = 0.3  # share of the image above the road


def curvatures(drives: int, steps: int, generator: torch.Generator) -> Tensor:
    """Draw smooth curvatures [B, T] in [-1, 1]."""
    start = 2 * torch.rand(drives, 1, generator=generator) - 1
    speed = 0.3 * (torch.rand(drives, 1, generator=generator) - 0.5)
    wave = speed * torch.arange(steps) + 0.1 * torch.randn(drives, steps, generator=generator).cumsum(1) / 3
    return torch.sin(torch.pi / 2 * (start + wave))


def render(curvature: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Draw the frames [B, T, 3, height, width] of drives with curvatures [B, T]."""
    drives, steps = curvature.shape
    height, width = size
    y = torch.linspace(0, 1, height).view(1, 1, height, 1)
    x = torch.linspace(0, 1, width).view(1, 1, 1, width)

    def per_drive(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(drives, 1, 1, 1, generator=generator)

    near = ((y - HORIZON) / (1 - HORIZON)).clamp(min=0)  # 0 at the horizon, 1 at the car
    centre = 0.5 + per_drive(-0.05, 0.05) + 0.4 * curvature[..., None, None] * (1 - near) ** 2
    half_width = 0.04 + 0.26 * near
    across = (x - centre) / half_width  # -1 and 1 at the road's edges
    below = y > HORIZON
    road = (across.abs() < 1) & below
    travelled = torch.arange(steps).view(1, steps, 1, 1) * 0.35 + per_drive(0, 1)
    dashes = (across.abs() < 0.06) & (torch.frac(3 / (near + 0.3) + travelled) < 0.5) & below
    edges = ((across.abs() - 0.9).abs() < 0.07) & below

    colours = torch.tensor([[0.5, 0.7, 0.95], [0.25, 0.5, 0.2], [0.35, 0.35, 0.38], [0.95, 0.95, 0.85]])
    kind = below.long() + road.long()
    kind = torch.where(dashes | edges, 3, kind)  # [B, T, H, W]
    frames = colours[kind].permute(0, 1, 4, 2, 3).contiguous()
    frames *= 1 + 0.15 * torch.randn(drives, 1, 1, height, width, generator=generator)
    for drive, frame in enumerate(frames):
        _shadows(frame, generator)
        _distractors(frame, road[drive], generator)
    frames *= per_drive(0.7, 1.2).unsqueeze(-1)  # light
    return (frames + 0.03 * torch.randn(frames.shape, generator=generator) - 0.45) / 0.25


def _shadows(drive: Tensor, generator: torch.Generator) -> None:
    """Darken slanted bands, which come nearer with each frame."""
    steps, _, height, width = drive.shape
    y, x = torch.arange(height).view(-1, 1), torch.arange(width).view(1, -1)
    for place, slant in torch.rand(2, 2, generator=generator).tolist():
        for t in range(steps):
            top = (HORIZON + (place + 0.08 * t) % 1 * (1 - HORIZON)) * height + (slant - 0.5) * x
            drive[t] *= torch.where((y >= top) & (y < top + height / 12), 0.55, 1.0)


def _distractors(drive: Tensor, road: Tensor, generator: torch.Generator) -> None:
    """Put coloured boxes, some as bright as markings, on the grass and in the sky."""
    _, _, height, width = drive.shape
    for _ in range(5):
        top, left, tall, wide, *colour = torch.rand(7, generator=generator).tolist()
        rows = slice(int(top * height * 0.9), int((top * 0.9 + 0.03 + 0.1 * tall) * height) + 1)
        columns = slice(int(left * width * 0.9), int((left * 0.9 + 0.05 + 0.15 * wide) * width) + 1)
        box = drive[:, :, rows, columns]
        free = ~road[:, None, rows, columns]
        box.copy_(torch.where(free, torch.tensor(colour).view(1, 3, 1, 1), box))


def drives(options: argparse.Namespace, count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield frames [B, T, 3, H, W] and true controls [B, T, 1], for ever."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        curvature = curvatures(count, options.seq, generator)
        yield render(curvature, tuple(options.image_size), generator), curvature.unsqueeze(2)


class TorchDrivingNet(DrivingNet):
    """The same network by torch.nn's layers, attend and recur written out as a loop over time."""

    def forward(self, frames: Tensor, state=None, return_attention: bool = False):
        """Return control, state and, if asked for, maps, as DrivingNet does."""
        attention: Any = self.attention_lstm.attention
        cell = self.attention_lstm.cell
        zeros = frames.new_zeros(frames.shape[0], cell.hidden_size)
        h, c = (zeros, zeros) if state is None else state
        controls, maps = [], []
        for f in self.encoder(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).unbind(1):
            scores = F.conv2d(f, attention.score.weight).flatten(1) + attention.hidden(h)
            a = scores.softmax(1).view_as(f[:, :1])
            attended = (f * a).flatten(1)
            controls.append(self.control(torch.cat((attended, h), 1)))
            weights = (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
            h, c = torch.lstm_cell(attended, (h, c), *weights)
            maps.append(a)
        result = torch.stack(controls, 1), (h, c)
        return (*result, torch.stack(maps, 1)) if return_attention else result


@dataclass
class Run:
    """A network in training and its record."""

    name: str
    net: DrivingNet
    learning_rate: float
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=self.learning_rate)

    def step(self, frames: Tensor, truth: Tensor) -> None:
        """Train on one batch of drives, and note its loss and time."""
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        control, _ = self.net(frames)
        loss = F.mse_loss(control, truth)
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - begin)

    def save(self, path: Path) -> None:
        """Write network, optimizer and record."""
        state = {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "losses": self.losses,
        }
        torch.save(state, path)

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote."""
        state = torch.load(path, weights_only=True)
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses = list(state["losses"])


def progress(first: int, last: int, run: Run) -> Iterator[int]:
    """Count the steps: under tqdm's bar where it is installed, else with a line per tenth."""
    steps = range(first, last)
    try:
        from tqdm import tqdm
    except ImportError:
        for i in steps:
            if (i - first) % max(1, len(steps) // 10) == 0:
                print(f"step {i} of {last}", flush=True)
            yield i
    else:
        with tqdm(steps, initial=first, total=last, unit="step") as bar:
            for i in bar:
                yield i
                bar.set_postfix(loss=f"{run.losses[-1]:.4f}")


def train(options: argparse.Namespace) -> tuple[Run, Run]:
    """Train DrivingNet, and for the first steps its twin of torch.nn's layers, from the same weights."""
    torch.manual_seed(options.seed)
    size = {"image_size": options.image_size, "encoder": options.encoder}
    ours = Run("fusednn", DrivingNet(options.hidden, **size), options.lr)
    if options.resume:
        ours.load(options.resume)
    theirs = Run("torch.nn", TorchDrivingNet(options.hidden, **size), options.lr)
    theirs.net.load_state_dict(copy.deepcopy(ours.net.state_dict()))
    first = len(ours.losses)
    batches = drives(options, options.batch, options.seed + 1 + first)
    for i in progress(first, first + options.steps, ours):
        frames, truth = next(batches)
        pair = (theirs, ours) if i - first < options.compare else (ours,)
        for run in pair if i % 2 == 0 else reversed(pair):  # neither always goes first
            run.step(frames, truth)
    return theirs, ours


def test(net: DrivingNet, options: argparse.Namespace) -> tuple[float, tuple[Tensor, ...]]:
    """Return R² on drives never seen, and frames, maps, control and truth of one batch."""
    net.eval()
    batches = drives(options, options.batch, options.seed + 10**6)
    seen = []
    with torch.inference_mode():
        for _ in range(options.test_batches):
            frames, truth = next(batches)
            control, _, maps = net(frames, return_attention=True)
            seen.append((control, truth))
    net.train()
    control_all, truth_all = (torch.cat(t) for t in zip(*seen, strict=True))
    residual = (control_all - truth_all).square().sum()
    r2 = 1 - residual / (truth_all - truth_all.mean()).square().sum()
    return r2.item(), (frames, maps, control, truth)


def medians(runs: tuple[Run, Run], compared: int) -> list[float]:
    """Median milliseconds of the steps that both took."""
    return [1e3 * statistics.median(run.seconds[:compared]) for run in runs]


def plot(runs: tuple[Run, Run], compared: int, r2: float, sample: tuple[Tensor, ...], path: Path) -> None:
    """Draw frames under their attention maps, the control over time, and the times."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    frames, maps, control, truth = sample
    steps = min(5, frames.shape[1])
    mosaic: Any = [
        [*(f"frame{i}" for i in range(steps)), "control", "control"],
        [*(f"map{i}" for i in range(steps)), "loss", "time"],
    ]
    figure, axes = plt.subplot_mosaic(mosaic, figsize=(13, 6), layout="constrained")
    over = F.interpolate(maps[0], size=frames.shape[-2:], mode="bilinear")
    for i in range(steps):
        t = i * (frames.shape[1] - 1) // max(1, steps - 1)
        picture = (frames[0, t] * 0.25 + 0.45).clamp(0, 1).permute(1, 2, 0)
        for name, alpha in ((f"frame{i}", 0.0), (f"map{i}", 0.55)):
            axes[name].imshow(picture)
            axes[name].imshow(over[t, 0], cmap="inferno", alpha=alpha)
            axes[name].set_axis_off()
        axes[f"frame{i}"].set_title(f"frame {t}", fontsize="small")
        axes[f"map{i}"].set_title("attention", fontsize="small")
    colours = ("#5b6770", "#d1495b")
    axes["control"].plot(truth[:4].flatten(), color=colours[0], linewidth=3, label="true")
    axes["control"].plot(control[:4].flatten(), color=colours[1], linewidth=1.5, label="predicted")
    axes["control"].set(xlabel="step, four drives in a row", ylabel="control", title=f"test R² {r2:.3f}")
    axes["control"].legend(frameon=False)
    axes["loss"].semilogy(runs[1].losses, color=colours[1], linewidth=1)
    axes["loss"].set(xlabel="step", ylabel="training loss")
    times = medians(runs, compared)
    bars = axes["time"].bar([run.name for run in runs], times, color=colours)
    axes["time"].bar_label(bars, fmt="%.0f")
    axes["time"].set(ylabel="training step (ms, median)")
    for name in ("control", "loss", "time"):
        axes[name].grid(alpha=0.25)
        axes[name].spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4, help="drives of a batch")
    parser.add_argument("--seq", type=int, default=8, help="frames of a drive")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--encoder", choices=("plain", "separable"), default="plain")
    parser.add_argument("--image-size", type=int, nargs=2, default=(160, 80), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--compare", type=int, default=20, help="steps that torch.nn's version takes, too")
    parser.add_argument("--test-batches", type=int, default=16)
    parser.add_argument("--target", type=float, default=0.9, help="R² below which the exit code is 1")
    parser.add_argument("--resume", type=Path, help="a checkpoint to go on from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("out"))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Train, test, report; return the exit code."""
    options = parse(argv)
    theirs, ours = runs = train(options)
    compared = len(theirs.seconds)
    r2, sample = test(ours.net, options)
    options.out.mkdir(parents=True, exist_ok=True)
    checkpoint = options.out / "driving.pt"
    ours.save(checkpoint)
    print(f"wrote {checkpoint}; --resume goes on from it")
    if compared:
        for run, milliseconds in zip(runs, medians(runs, compared), strict=True):
            print(f"{run.name:>8}: {milliseconds:.1f} ms a training step, median of {compared}")
    try:
        plot(runs, compared, r2, sample, options.out / "driving.png") if compared else None
    except ImportError as error:
        print(f"no plot: {error}; pip install matplotlib adds it")
    else:
        print(f"wrote {options.out / 'driving.png'}" if compared else "no plot: --compare 0")
    print(f"test R² {r2:.3f}, target {options.target}")
    return 0 if r2 > options.target else 1


if __name__ == "__main__":
    sys.exit(main())
