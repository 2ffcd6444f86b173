"""Which form the recurrence takes: whether the cell's input product is hoisted out of it, by bytes moved.

B sequences, T steps, C channels, P positions, J = 4 H rows of ``weight_ih`` (GRU: 3 H), in elements:

    direct, flatten     T (J C P + 2 B C P)      each step reads weight_ih, writes and reads the attended
                                                 features
    direct, sum         T (J C + B C P)          each step reads weight_ih, and the features once more
    hoisted             J C P + 2 B T P J        weight_ih once; G_t[p] = W_ih[:, p] f_t[:, p] written,
    (sum: J C + 2 B T P J)                       and read by the steps

Reading the features for the scores is the same in all.
"""

from __future__ import annotations

from dataclasses import dataclass

FORMS = ("auto", "hoisted", "direct")

LARGEST_PROJECTION = 2**30
"""Bytes that the hoisted products may take."""


@dataclass(frozen=True)
class Plan:
    """The form to take, and the bytes that each would move."""

    form: str
    hoisted_bytes: int
    direct_bytes: int
    projection_bytes: int

    def reasons(self) -> dict[str, tuple[str, ...]]:
        """Say why the other form was passed over."""
        costs = {"hoisted": self.hoisted_bytes, "direct": self.direct_bytes}
        other = "direct" if self.form == "hoisted" else "hoisted"
        text = f"moves {costs[other] / 1e6:.3g} MB, {self.form} {costs[self.form] / 1e6:.3g} MB"
        if other == "hoisted" and self.projection_bytes > LARGEST_PROJECTION:
            text = f"needs {self.projection_bytes} bytes for its products, at most {LARGEST_PROJECTION}"
        return {other: (text,)}


def plan(
    batch: int, steps: int, channels: int, positions: int, rows: int, output: str, itemsize: int
) -> Plan:
    """Compare both forms for `rows` = J rows of ``weight_ih``."""
    inputs = channels * positions if output == "flatten" else channels
    weight, frames = rows * inputs, batch * channels * positions
    projection = batch * steps * positions * rows
    direct = steps * (weight + (2 * frames if output == "flatten" else frames))
    hoisted = weight + 2 * projection
    fits = projection * itemsize <= LARGEST_PROJECTION
    form = "hoisted" if hoisted < direct and fits else "direct"
    return Plan(form, hoisted * itemsize, direct * itemsize, projection * itemsize)


def resolve(form: str, features_shape, rows: int, output: str, itemsize: int) -> str:
    """Return the form that a call takes: the one asked for, or the cheaper."""
    if form != "auto":
        return form
    batch, steps, channels, height, width = features_shape
    return plan(batch, steps, channels, height * width, rows, output, itemsize).form
