"""Bad input: torch's type of error, a text that names the argument, and never a crash."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fusednn

from .cells import CELLS, GATES, MODULES, STATES, TORCH_MODULES
from .op_cases import OPS, op_cases

every_cell = pytest.mark.parametrize("cell", CELLS)


def _state(cell, *tensors):
    return tensors if cell == "lstm" else tensors[0]


def _hx(cell, *shape, **kwargs):
    return _state(cell, *(torch.zeros(*shape, **kwargs) for _ in STATES[cell]))


X = torch.zeros(3, 6)

# Name, input, hx of the cell, what the text must name. Cells are 6 -> 10.
BAD_INPUTS = {
    "input of rank 0": (torch.zeros(()), None, "input"),
    "input of rank 3": (torch.zeros(2, 3, 6), None, "input"),
    "input too wide": (torch.zeros(3, 7), None, "input"),
    "unbatched input too wide": (torch.zeros(7), None, "input"),
    "hx too wide": (X, lambda c: _hx(c, 3, 11), "hidden0"),
    "hx of another batch": (X, lambda c: _hx(c, 4, 10), "hidden0"),
    "hx of batch 1": (X, lambda c: _hx(c, 1, 10), "hidden0"),
    "hx of rank 3": (X, lambda c: _hx(c, 1, 3, 10), "hx|hidden"),
    "hx of rank 0": (X, lambda c: _state(c, *[torch.zeros(())] * 2), "hx|hidden"),
    "hx of rank 1 beside a batch": (X, lambda c: _hx(c, 10), "hidden0|hx"),
    "hx of rank 2 beside no batch": (torch.zeros(6), lambda c: _hx(c, 1, 10), "hidden0|hx"),
    "integer input": (torch.zeros(3, 6, dtype=torch.long), None, "input"),
    "boolean input": (torch.zeros(3, 6, dtype=torch.bool), None, "input"),
    "complex input": (torch.zeros(3, 6, dtype=torch.complex64), None, "input"),
    "input of another float": (torch.zeros(3, 6, dtype=torch.float64), None, "input|hidden0|weight_ih"),
    "input of half": (torch.zeros(3, 6, dtype=torch.float16), None, "input|hidden0|weight_ih"),
    "hx of another float": (X, lambda c: _hx(c, 3, 10, dtype=torch.float64), "hidden0"),
    "integer hx": (X, lambda c: _hx(c, 3, 10, dtype=torch.long), "hidden0"),
    "input on meta": (torch.zeros(3, 6, device="meta"), None, "weight_ih|device"),
    "hx on meta": (X, lambda c: _hx(c, 3, 10, device="meta"), "hidden0"),
    "input is a string": ("x", None, "input|str"),
    "input is None": (None, None, "input|NoneType"),
    "input is a list": ([[0.0] * 6], None, "input|list"),
    "hx is a string": (X, lambda c: "h", "hx|str"),
    "hx is a number": (X, lambda c: 1.0, "hx|float"),
}

# Where torch goes on, or fails on the way by accident, and fusednn refuses with words: the type it raises.
DIFFERS = {
    "input on meta": RuntimeError,
    "hx on meta": RuntimeError,
}


@every_cell
@pytest.mark.parametrize("name", BAD_INPUTS)
def test_modules_raise_torchs_error(cell, name):
    input, hx, named = BAD_INPUTS[name]
    args = (input,) if hx is None else (input, hx(cell))
    error = DIFFERS.get(name)
    if error is None:
        with pytest.raises(Exception) as theirs:  # noqa: PT011  its type is what is asked
            TORCH_MODULES[cell](6, 10)(*args)
        error = theirs.type
    with pytest.raises(error, match=named):
        MODULES[cell](6, 10)(*args)


@every_cell
@pytest.mark.parametrize(
    "name",
    [
        "input of rank 0",
        "input of rank 3",
        "input too wide",
        "hx too wide",
        "hx of another batch",
        "hx of batch 1",
    ],
)
def test_texts_are_torchs(cell, name):
    input, hx, _ = BAD_INPUTS[name]
    args = (input,) if hx is None else (input, hx(cell))
    texts = []
    for modules in (MODULES, TORCH_MODULES):
        with pytest.raises((RuntimeError, ValueError)) as raised:
            modules[cell](6, 10)(*args)
        texts.append(str(raised.value).splitlines()[0])
    assert texts[0] == texts[1]


H, C = torch.zeros(3, 10), torch.zeros(3, 10)


@pytest.mark.parametrize(
    ("hx", "named"),
    [
        ((H,), "two|hx"),
        ((), "two|hx"),
        ((H, C, C), "two|hx"),
        ((H, "c"), "hx|hidden1|str"),
        ((H, None), "hx|hidden1|NoneType"),
        ((H, torch.zeros(3, 11)), "hidden1"),
        ((H, torch.zeros(4, 10)), "hidden1"),
        (H, "hx"),
        (torch.zeros(2, 3, 10), "hx"),
    ],
    ids=["one", "none", "three", "string", "None", "wide c", "long c", "a tensor", "a stacked tensor"],
)
def test_lstm_states(hx, named):
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        torch.nn.LSTMCell(6, 10)(X, hx)
    with pytest.raises(theirs.type, match=named):
        fusednn.LSTMCell(6, 10)(X, hx)


@every_cell
@pytest.mark.parametrize("name", ["weight_ih", "weight_hh", "bias_ih", "bias_hh"])
@pytest.mark.parametrize("change", ["longer", "wider", "rank", "dtype", "device"])
def test_parameters(cell, name, change):
    module = MODULES[cell](6, 10)
    value = getattr(module, name).detach()
    bad = {
        "longer": lambda: torch.cat((value, value[:1])),
        "wider": lambda: torch.zeros(*value.shape[:-1], value.shape[-1] + 1),
        "rank": lambda: value[None],
        "dtype": lambda: value.double(),
        "device": lambda: value.to("meta"),
    }[change]()
    setattr(module, name, torch.nn.Parameter(bad))
    # A weight_hh of another width is first seen in the state beside it.
    with pytest.raises((RuntimeError, ValueError), match=f"{name}|hidden0|input_size"):
        module(X)


@every_cell
@pytest.mark.parametrize("argument", ["weight_ih", "weight_hh", "bias_ih", "bias_hh"])
def test_functions_name_what_is_no_tensor(cell, argument):
    rows = GATES[cell] * 10
    parameters = {
        "weight_ih": torch.zeros(rows, 6),
        "weight_hh": torch.zeros(rows, 10),
        "bias_ih": torch.zeros(rows),
        "bias_hh": torch.zeros(rows),
    }
    function = fusednn.functional.lstm_cell if cell == "lstm" else fusednn.functional.gru_cell
    with pytest.raises(TypeError, match=argument):
        function(X, _hx(cell, 3, 10), **{**parameters, argument: 3})


# The ops and the bindings are called by compiled graphs, checked when they were traced; whoever calls
# them by hand must meet an error, not a fault.

_shapes = st.lists(st.integers(0, 41), min_size=0, max_size=3).map(tuple)
_dtypes = st.sampled_from(
    [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.long, torch.bool]
)


def _call(function, args) -> None:
    try:
        results = function(*args)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        said = str(error)
    else:
        assert all(isinstance(r, torch.Tensor) for r in results)
        return
    assert said
    assert "INTERNAL ASSERT" not in said


@pytest.mark.parametrize("name", OPS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_fuzzed_calls_never_crash(native, name, data):
    cases = list(op_cases(name).values())
    args = [a.detach() if isinstance(a, torch.Tensor) else a for a in data.draw(st.sampled_from(cases))]
    places = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]
    for place in data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=3)):
        how = data.draw(st.sampled_from(["shape", "one size", "dtype", "None", "meta"]))
        t = args[place]
        if not isinstance(t, torch.Tensor):
            continue
        if how == "shape":
            args[place] = torch.zeros(data.draw(_shapes), dtype=t.dtype)
        elif how == "one size" and t.dim():
            sizes = list(t.shape)
            sizes[data.draw(st.integers(0, t.dim() - 1))] += data.draw(st.sampled_from([-1, 1, 7]))
            args[place] = torch.zeros([max(s, 0) for s in sizes], dtype=t.dtype)
        elif how == "dtype":
            args[place] = t.to(data.draw(_dtypes))
        elif how == "None":
            args[place] = None
        else:
            args[place] = t.to("meta")
    _call(getattr(native, name), args)
    if any(args[place] is None for place in places):
        return  # the ops' schemas take an undefined tensor for None; it fails at the first attribute
    with fusednn.use_backend("cpu"):
        _call(getattr(torch.ops.fusednn, name), args)


@pytest.mark.parametrize("name", OPS)
def test_each_wrong_size_is_refused_by_the_kernels(native, name):
    """No argument can be one longer or shorter in any dimension without being named."""
    for args in op_cases(name).values():
        if "backward" in name and not any(args[-1]):
            continue
        args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        for place, t in enumerate(args):
            if not isinstance(t, torch.Tensor) or t.numel() == 0:
                continue
            for dim in range(t.dim()):
                for delta in (-1, 1):
                    sizes = list(t.shape)
                    sizes[dim] += delta
                    changed = [*args[:place], torch.zeros(sizes, dtype=t.dtype), *args[place + 1 :]]
                    with pytest.raises(RuntimeError, match="got shape"):
                        getattr(native, name)(*changed)
