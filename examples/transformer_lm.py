"""A Transformer language model on the Python standard library's sources, of torch's layers and of fusednn's.

Both models start from the same weights and see the same batches, step by step in turn. The losses must agree
to 1e-3 relative at every step, else the exit code is 1. Text, training and plot are those of char_lm.py.

    python examples/transformer_lm.py --layer encoder --steps 100
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import char_lm
import torch
from torch import Tensor, nn

import fusednn

LAYERS = {
    "attention": (nn.MultiheadAttention, fusednn.MultiheadAttention),
    "encoder": (nn.TransformerEncoderLayer, fusednn.TransformerEncoderLayer),
}
TOLERANCE = 1e-3  # relative difference of the losses


class Block(nn.Module):
    """Causal self-attention and feed-forward, each after a norm and beside a residual path."""

    def __init__(self, attention_class: Callable[..., nn.Module], hidden: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attention = attention_class(hidden, heads, batch_first=True)
        self.feed_forward = nn.Sequential(
            nn.Linear(hidden, 4 * hidden), nn.ReLU(), nn.Linear(4 * hidden, hidden)
        )

    def forward(self, x: Tensor, src_mask: Tensor, is_causal: bool) -> Tensor:
        """Encode x [B, T, E], as a TransformerEncoderLayer does."""
        y = self.norm1(x)
        x = x + self.attention(y, y, y, attn_mask=src_mask, is_causal=is_causal, need_weights=False)[0]
        return x + self.feed_forward(self.norm2(x))


class TransformerLM(nn.Module):
    """Embeddings of characters and places, causal layers, norm, linear: logits of the next character."""

    def __init__(self, layer: Callable[[], nn.Module], layers: int, hidden: int, seq: int) -> None:
        super().__init__()
        self.seq = seq
        self.embedding = nn.Embedding(len(char_lm.ALPHABET), hidden)
        self.places = nn.Embedding(seq, hidden)
        self.layers = nn.ModuleList(layer() for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, len(char_lm.ALPHABET))

    def forward(self, tokens: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return logits [B, T, V] and what to give with the next tokens: those read so far, at most `seq`."""
        if state is not None:
            tokens = torch.cat((state, tokens), 1)
        tokens = tokens[:, -self.seq :]
        length = tokens.shape[1]
        x = self.embedding(tokens) + self.places.weight[:length]
        later = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
        for layer in self.layers:
            x = layer(x, src_mask=later, is_causal=True)
        return self.head(self.norm(x)), tokens


def build(options: argparse.Namespace, layer_class: Callable[..., nn.Module]) -> TransformerLM:
    """Make the model of one of the classes in LAYERS, or one that stands in for it."""

    def layer() -> nn.Module:
        if options.layer == "attention":
            return Block(layer_class, options.hidden, options.heads)
        return layer_class(
            options.hidden, options.heads, 4 * options.hidden, dropout=0.0, batch_first=True, norm_first=True
        )

    return TransformerLM(layer, options.layers, options.hidden, options.seq)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seq", type=int, default=64, help="characters of a window")
    parser.add_argument("--layer", choices=LAYERS, default="attention", help="which of the layers to compare")
    char_lm.common_arguments(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, layers=LAYERS) -> int:
    """Train both, compare, report; return the exit code."""
    options = parse(argv)
    runs = char_lm.twins(options, lambda layer_class: build(options, layer_class), layers[options.layer])
    char_lm.train(options, runs)
    title = f"Transformer: batch {options.batch}, {options.seq} characters, hidden {options.hidden}"
    return char_lm.report(options, runs, f"transformer_lm_{options.layer}", title, TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
