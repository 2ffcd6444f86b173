"""Print the polynomial of csrc/core/cpu/vec_math.h: Q in exp(r) = 1 + r + r^2 Q(r) on |r| <= ln(2) / 2.

Remez exchange in 60-digit arithmetic on the error of Q (r^2 <= 0.12 times smaller in exp); run it to get the
same digits again.

    python tools/minimax.py
"""

from __future__ import annotations

from mpmath import mp, mpf

mp.dps = 60
HALF_LN2 = mp.log(2) / 2


def target(r):
    """(exp(r) - 1 - r) / r^2, continued into 0."""
    if abs(r) < mpf("1e-12"):
        return mpf(1) / 2 + r / 6 + r * r / 24
    return (mp.expm1(r) - r) / (r * r)


def remez(degree: int, rounds: int = 12):
    """Minimax coefficients, lowest first, and its largest error."""
    count = degree + 2
    nodes = [HALF_LN2 * mp.cos(mp.pi * (2 * i + 1) / (2 * count)) for i in range(count)]
    for _ in range(rounds):
        rows = [[x**p for p in range(degree + 1)] + [mpf(-1) ** i] for i, x in enumerate(nodes)]
        *coefficients, _level = mp.lu_solve(mp.matrix(rows), mp.matrix([target(x) for x in nodes]))
        grid = [HALF_LN2 * (mpf(2 * i) / 2000 - 1) for i in range(2001)]

        def error(r, c=coefficients):
            return mp.polyval(c[::-1], r) - target(r)

        values = [error(r) for r in grid]
        nodes, best = [], 0
        for i in range(1, len(grid)):  # the largest error of each run of one sign
            if values[i] * values[best] < 0:
                nodes.append(grid[best])
                best = i
            elif abs(values[i]) > abs(values[best]):
                best = i
        nodes.append(grid[best])
        if len(nodes) != count:
            break
    return coefficients, max(abs(v) for v in values)


if __name__ == "__main__":
    for name, degree, digits in (("float", 4, 10), ("double", 9, 19)):
        coefficients, error = remez(degree)
        print(f"{name}: largest error of Q {mp.nstr(error, 3)}")
        for c in coefficients:
            print("   ", mp.nstr(c, digits))
