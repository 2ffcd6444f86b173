"""The error of the CPU kernels' exp, tanh and sigmoid, swept for each instruction set, in ulp."""

import pytest
import torch

FUNCTIONS = ("exp", "tanh", "sigmoid")

# As csrc/core/cpu/vec_math.h states them.
BOUNDS = {"exp": 1.5, "tanh": 3.0, "sigmoid": 3.0}

every_function = pytest.mark.parametrize("function", FUNCTIONS)


def ulp_error(actual: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return |actual - exact| in units in the last place of `exact`, a wider tensor, rounded to `dtype`."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(exact.abs().clamp_min(info.tiny))
    digits = {torch.float32: 23, torch.float64: 52}[dtype]
    return torch.ldexp((actual.to(exact.dtype) - exact).abs(), digits + 1 - exponent)


def worst(native, function: str, x: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Return the largest error in ulp and where it is; overflow must fall where rounding puts it."""
    got = native.vector_math_for_tests(function, x)
    rounded = exact.to(x.dtype)
    odd = ~rounded.isfinite() | ~got.isfinite()
    torch.testing.assert_close(got[odd], rounded[odd], rtol=0, atol=0, equal_nan=True)
    error = ulp_error(got, exact, x.dtype).masked_fill(odd, 0)
    index = error.argmax()
    return error[index].item(), x[index].item()


def exact_by_float64(function: str, x: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    if function == "sigmoid":  # torch's own loses the small values
        e = (-wide.abs()).exp()
        return torch.where(wide < 0, e, torch.ones_like(e)) / (1 + e)
    return getattr(torch, function)(wide)


def check_float32(native, function: str, x: torch.Tensor, what: str) -> None:
    error, where = worst(native, function, x, exact_by_float64(function, x))
    assert error <= BOUNDS[function], (
        f"{function} of {what}: {error:.2f} ulp at {where!r}, bound {BOUNDS[function]}"
    )


@every_function
@pytest.mark.usefixtures("isa")
def test_float32_over_all_exponents(native, function):
    """Every 509th bit pattern: all signs and exponents, subnormals, NaN; prime, so no bit stays put."""
    bits = torch.arange(-(2**31), 2**31, 509, dtype=torch.int64).to(torch.int32)
    check_float32(native, function, bits.view(torch.float32), "all bit patterns")


@every_function
@pytest.mark.usefixtures("isa")
def test_float32_where_it_varies(native, function):
    """A dense sweep of the range in which the result is neither saturated nor x itself."""
    low, high = (-104.0, 89.0) if function == "exp" else (-20.0, 20.0)
    check_float32(native, function, torch.linspace(low, high, 4_000_000), f"[{low}, {high}]")
    small = torch.logspace(-6, 0, 500_000)
    check_float32(native, function, torch.cat((small, -small)), "small values")


def special_values(dtype: torch.dtype) -> torch.Tensor:
    info = torch.finfo(dtype)
    positive = [0.0, info.smallest_normal, info.eps, info.max, 1.0, torch.inf]
    positive += [5e-324 if dtype == torch.float64 else 1.4e-45, info.smallest_normal / 2]
    edges = (88.72283, 88.72284, 87.33654, 103.27892, 103.97208, 104.0, 709.782712893384, 709.7827128933841)
    edges += (
        708.3964185322641,
        744.4400719213812,
        745.1332191019412,
        745.2,
        746.0,
        1e3,
        9.01,
        10.0,
        19.06,
        20.0,
    )
    return torch.tensor([s * v for v in (*positive, *edges) for s in (1, -1)] + [torch.nan], dtype=dtype)


@every_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.usefixtures("isa")
def test_special_values(native, function, dtype):
    x = special_values(dtype)
    got = native.vector_math_for_tests(function, x)
    assert got[x.isnan()].isnan().all()
    assert not got[~x.isnan()].isnan().any()
    limits = {"exp": (0.0, torch.inf, 1.0), "tanh": (-1.0, 1.0, 0.0), "sigmoid": (0.0, 1.0, 0.5)}[function]
    points = torch.tensor([-torch.inf, torch.inf, 0.0], dtype=dtype)
    assert native.vector_math_for_tests(function, points).tolist() == list(limits)
    if function == "tanh":
        zeros = native.vector_math_for_tests(function, torch.tensor([0.0, -0.0], dtype=dtype))
        assert zeros.signbit().tolist() == [False, True]
    else:
        assert not got[~x.isnan()].signbit().any()
    if dtype == torch.float32:
        check_float32(native, function, x, "special values")
    assert (got[~x.isnan()].abs() <= (1 if function != "exp" else torch.inf)).all()


def exact_by_mpmath(function: str, values: list[float]) -> list:
    mpmath = pytest.importorskip("mpmath")
    f = {"exp": mpmath.exp, "tanh": mpmath.tanh, "sigmoid": lambda v: 1 / (1 + mpmath.exp(-v))}[function]
    with mpmath.workdps(80):
        return [f(mpmath.mpf(v)) for v in values]


@every_function
@pytest.mark.usefixtures("isa")
def test_float64(native, function):
    """Random values of every magnitude and the edges, against 80 digits."""
    mpmath = pytest.importorskip("mpmath")
    generator = torch.Generator().manual_seed(3)
    high = 750.0 if function != "tanh" else 22.0
    magnitudes = torch.logspace(-320, 308, 1000, dtype=torch.float64)
    uniform = (torch.rand(6000, generator=generator, dtype=torch.float64) * 2 - 1) * high
    unit = (torch.rand(6000, generator=generator, dtype=torch.float64) * 2 - 1) * 2
    specials = special_values(torch.float64)
    x = torch.cat((magnitudes, -magnitudes, uniform, unit, specials[specials.isfinite()]))
    got = native.vector_math_for_tests(function, x)
    largest, where = 0.0, 0.0
    with mpmath.workdps(80):
        for value, result, exact in zip(x.tolist(), got.tolist(), exact_by_mpmath(function, x.tolist())):
            rounded = float(exact)
            if rounded in (float("inf"), 0.0) or result == float("inf"):
                assert result == rounded or abs(mpmath.mpf(result) - exact) <= 2 * 5e-324, (function, value)
                continue
            exponent = max(mpmath.frexp(exact)[1], -1021)
            error = float(abs(mpmath.mpf(result) - exact) * mpmath.mpf(2) ** (53 - exponent))
            if error > largest:
                largest, where = error, value
    assert largest <= BOUNDS[function], (
        f"{function}: {largest:.2f} ulp at {where!r}, bound {BOUNDS[function]}"
    )


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values_do_not_depend_on_their_place(native, dtype):
    """Tails and lanes: any element alone gives the bits that it has in a long row."""
    x = torch.linspace(-12, 12, 67, dtype=dtype)
    for function in FUNCTIONS:
        whole = native.vector_math_for_tests(function, x)
        for start in range(67):
            for stop in (start + 1, min(start + 7, 67), 67):
                assert native.vector_math_for_tests(function, x[start:stop]).equal(whole[start:stop])


def test_bad_arguments(native):
    with pytest.raises(ValueError, match="function: got cosh, expected exp, tanh or sigmoid"):
        native.vector_math_for_tests("cosh", torch.zeros(1))
    with pytest.raises(RuntimeError, match="x: got Half"):
        native.vector_math_for_tests("exp", torch.zeros(1).half())
    assert native.vector_math_for_tests("exp", torch.empty(0)).shape == (0,)
