"""fusednn's cells where torch's were: copies, files, parametrisations, torch's own samples."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils._pytree import tree_leaves

import fusednn

from .cells import CELLS, MODULES, TORCH_MODULES

every_cell = pytest.mark.parametrize("cell", CELLS)


def pair_of_modules(cell: str, input_size: int = 6, hidden: int = 10, **kwargs):
    """Return fusednn's module and torch's with the same parameters."""
    ours, theirs = (
        MODULES[cell](input_size, hidden, **kwargs),
        TORCH_MODULES[cell](input_size, hidden, **kwargs),
    )
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def train_once(module: nn.Module, input: torch.Tensor):
    """Return outputs and parameter gradients of a step."""
    module.zero_grad()
    out = module(input)
    out = out if isinstance(out, tuple) else (out,)
    sum(o.square().sum() for o in out).backward()
    return [o.detach() for o in out], [p.grad for p in module.parameters()]


def assert_same(ours: nn.Module, theirs: nn.Module, batch: int = 9) -> None:
    """Check that two modules give the same results and gradients, three times over."""
    input = torch.randn(batch, ours.input_size)
    for _ in range(3):
        torch.testing.assert_close(train_once(ours, input), train_once(theirs, input))


@every_cell
def test_is_torchs_class(cell):
    """isinstance, constructor, repr, parameter order and initial values are torch's."""
    for kwargs in ({}, {"bias": False}, {"dtype": torch.float64}, {"device": "meta"}):
        torch.manual_seed(1)
        ours = MODULES[cell](3, 5, **kwargs)
        torch.manual_seed(1)
        theirs = TORCH_MODULES[cell](3, 5, **kwargs)
        assert isinstance(ours, TORCH_MODULES[cell])
        assert repr(ours) == repr(theirs)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
            assert a.is_meta or a.equal(b)


@every_cell
def test_state_dict_both_ways(cell):
    for source, target in ((MODULES, TORCH_MODULES), (TORCH_MODULES, MODULES)):
        a, b = source[cell](6, 10), target[cell](6, 10)
        assert b.load_state_dict(a.state_dict()) == ([], [])
        assert_same(a, b)
        with pytest.raises(RuntimeError, match="size mismatch for weight_ih"):
            target[cell](7, 10).load_state_dict(a.state_dict())


@every_cell
@pytest.mark.parametrize("way", ["copy", "deepcopy", "pickle", "torch.save"])
def test_copies_and_files(cell, way):
    ours, theirs = pair_of_modules(cell)
    assert_same(ours, theirs)
    if way == "torch.save":
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    else:
        copied = {
            "copy": copy.copy,
            "deepcopy": copy.deepcopy,
            "pickle": lambda m: pickle.loads(pickle.dumps(m)),
        }[way](ours)
    assert type(copied) is MODULES[cell]
    assert_same(copied, theirs)
    if way != "copy":
        with torch.no_grad():
            copied.weight_hh.add_(1)
        assert_same(ours, theirs)


@every_cell
def test_to_another_dtype_and_back(cell):
    ours, theirs = pair_of_modules(cell)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        ours, theirs = ours.to(dtype), theirs.to(dtype)
        x = torch.randn(9, 6, dtype=dtype)
        actual, expected = ours(x), theirs(x)
        tolerance = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(actual, expected, **tolerance)


@every_cell
def test_materialised_from_meta(cell):
    theirs = TORCH_MODULES[cell](6, 10)
    ours = MODULES[cell](6, 10, device="meta").to_empty(device="cpu")
    ours.load_state_dict(theirs.state_dict())
    assert_same(ours, theirs)
    ours = MODULES[cell](6, 10, device="meta")
    ours.load_state_dict(theirs.state_dict(), assign=True)
    assert_same(ours, theirs)


def _steps_agree(ours: nn.Module, theirs: nn.Module) -> None:
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (ours, theirs)]
    for _ in range(4):
        assert_same(ours, theirs)
        for optimizer in optimizers:
            optimizer.step()


@every_cell
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weight_norm(cell):
    for apply in (nn.utils.weight_norm, parametrizations.weight_norm):
        ours, theirs = pair_of_modules(cell)
        _steps_agree(apply(ours, "weight_hh"), apply(theirs, "weight_hh"))


class _Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


@every_cell
def test_parametrize(cell):
    ours, theirs = pair_of_modules(cell)
    for module in (ours, theirs):
        parametrize.register_parametrization(module, "weight_ih", _Halved())
    _steps_agree(ours, theirs)
    input = torch.randn(9, 6)
    with parametrize.cached(), torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(ours(input), theirs(input))
    for module in (ours, theirs):
        parametrize.remove_parametrizations(module, "weight_ih")
    assert type(ours) is MODULES[cell]
    _steps_agree(ours, theirs)


@every_cell
def test_tied_weights(cell):
    """Two cells on one weight, and one cell whose two weights are the same tensor."""
    pairs = [pair_of_modules(cell, 10, 10) for _ in range(2)]
    for which in (0, 1):
        pairs[1][which].weight_hh = pairs[0][which].weight_hh
        pairs[0][which].weight_ih = pairs[0][which].weight_hh
    optimizers = [torch.optim.SGD([*a.parameters(), b.weight_ih], lr=0.1) for a, b in zip(*pairs)]
    for _ in range(4):
        for ours, theirs in pairs:
            assert_same(ours, theirs)
        for optimizer in optimizers:
            optimizer.step()


@every_cell
def test_hooks_run(cell):
    ours, _ = pair_of_modules(cell)
    seen = []
    ours.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    ours.register_forward_hook(lambda m, args, out: seen.append("post"))
    ours(torch.randn(2, 6))
    assert seen == ["pre", "post"]


def _module_info_samples():
    common = pytest.importorskip("torch.testing._internal.common_modules")
    return [
        pytest.param(info, ours, id=ours.__name__)
        for info in common.module_db
        for ours in (fusednn.LSTMCell, fusednn.GRUCell)
        if info.module_cls is ours.__mro__[1]
    ]


@pytest.mark.parametrize(("info", "ours"), _module_info_samples())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_torchs_module_info_samples(place, info, ours, dtype, training):
    """Torch's own samples for its own test suite: outputs, gradients and reference functions agree."""
    device = place.device
    samples = info.module_inputs_func(info, device, dtype, requires_grad=True, training=training)
    assert samples
    for sample in samples:
        arguments = sample.constructor_input
        made = []
        for cls in (ours, info.module_cls):
            torch.manual_seed(7)
            module = cls(*arguments.args, **arguments.kwargs).to(device, dtype).train(training)
            args, kwargs = copy.deepcopy((sample.forward_input.args, sample.forward_input.kwargs))
            out = module(*args, **kwargs)
            out = out if isinstance(out, tuple) else (out,)
            leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            sum(o.square().sum() for o in out).backward()
            made.append(([*out], [t.grad for t in leaves], [p.grad for p in module.parameters()]))
        torch.testing.assert_close(made[0], made[1])
        if sample.reference_fn is not None:
            args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
            torch.manual_seed(7)
            module = ours(*arguments.args, **arguments.kwargs).to(device, dtype).train(training)
            expected = sample.reference_fn(module, *args, **kwargs)
            torch.testing.assert_close(module(*args, **kwargs), expected)


@pytest.mark.parametrize(("info", "ours"), _module_info_samples())
def test_torchs_module_info_errors(info, ours):
    """Torch's own samples of bad input: the same type of error, by the same text."""
    if info.module_error_inputs_func is None:
        pytest.fail(f"{info.name} has no samples of bad input in this torch")
    samples = info.module_error_inputs_func(info, "cpu", torch.float32, requires_grad=False, training=False)
    assert samples
    for sample in samples:
        arguments = sample.module_error_input.constructor_input
        forward = sample.module_error_input.forward_input
        module = ours(*arguments.args, **arguments.kwargs)
        with pytest.raises(sample.error_type, match=sample.error_regex):
            module(*forward.args, **forward.kwargs)
