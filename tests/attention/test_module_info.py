"""torch's own samples of its test suite, on fusednn's layers."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import fusednn
from fusednn.testing import error_budget

from .module_cases import DEVICES

PAIRS = {
    nn.MultiheadAttention: fusednn.MultiheadAttention,
    nn.TransformerEncoderLayer: fusednn.TransformerEncoderLayer,
    nn.TransformerEncoder: nn.TransformerEncoder,  # of fusednn's layers
}


def _infos():
    common = pytest.importorskip("torch.testing._internal.common_modules")
    return [
        pytest.param(info, id=info.module_cls.__name__)
        for info in common.module_db
        if info.module_cls in PAIRS
    ]


def _swapped(arguments):
    """Give nn.TransformerEncoder a layer of fusednn's."""
    args = [
        fusednn.TransformerEncoderLayer.__new__(fusednn.TransformerEncoderLayer)
        if isinstance(a, nn.TransformerEncoderLayer)
        else a
        for a in arguments.args
    ]
    for new, old in zip(args, arguments.args):
        if new is not old:
            new.__dict__ = copy.deepcopy(old).__dict__
            fusednn.replace_layers(new)
    return args


def _results(module, sample):
    """Return outputs and gradients by name."""
    dtype = next(module.parameters()).dtype
    args, kwargs = tree_map(
        lambda t: t.detach().to(dtype).requires_grad_() if _floating(t) else t,
        (sample.forward_input.args, sample.forward_input.kwargs),
    )
    out = module(*args, **kwargs)
    out = dict(enumerate(out if isinstance(out, tuple) else (out,)))
    sum(t.square().sum() for t in out.values()).backward()
    leaves = dict(enumerate(t for t in tree_leaves((args, kwargs)) if _floating(t)))
    gradients = {**leaves, **dict(module.named_parameters())}
    return {f"output {n}": t.detach() for n, t in out.items()} | {
        f"gradient of {n}": t.grad for n, t in gradients.items()
    }


def _floating(t) -> bool:
    return isinstance(t, torch.Tensor) and t.is_floating_point()


def _nothing_to_attend_to(sample) -> bool:
    """Whether the masks leave a row without keys."""
    kwargs = sample.forward_input.kwargs
    masks = [kwargs.get(name) for name in ("attn_mask", "key_padding_mask")]
    masks += [kwargs.get(name) for name in ("mask", "src_mask", "src_key_padding_mask")]
    hidden = [m for m in masks if m is not None]
    return bool(hidden) and any(bool(m.all(-1).any()) for m in hidden)


def test_there_are_samples():
    assert {p.values[0].module_cls for p in _infos()} == set(PAIRS)


@pytest.mark.costly
@pytest.mark.in_turn
@pytest.mark.parametrize("info", _infos())
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_samples(info, device, dtype, training):
    """Outputs, weights, gradients of inputs and parameters, and torch's reference functions.

    In float32 the error of each result, of a few numbers here, may be as large as the budget in the mean over
    samples and seeds.
    """
    spent: dict[str, list[float]] = {}
    for seed in range(8 if dtype == torch.float32 else 1):
        torch.manual_seed(seed)
        samples = info.module_inputs_func(info, device, dtype, requires_grad=True, training=training)
        assert len(samples) > 10
        if info.module_cls is torch.nn.TransformerEncoder:
            samples = samples[::4]  # torch makes them of the layer's, all of which are run
        for sample in samples:
            _check(info, sample, device, dtype, training, spent)
    for name, shares in spent.items():
        assert sum(shares) / len(shares) <= 1, name


def _check(info, sample, device, dtype, training, spent: dict[str, list[float]]) -> None:
    """Compare one sample's results; add the share of its budget that each spent, by name, in float32."""
    assert not _nothing_to_attend_to(sample), "agreement with torch ends there"
    arguments = sample.constructor_input
    theirs = info.module_cls(*arguments.args, **arguments.kwargs).to(device, dtype).train(training)
    ours = PAIRS[info.module_cls](*_swapped(arguments), **arguments.kwargs).to(device, dtype)
    ours.train(training)
    assert any(isinstance(m, fusednn.MultiheadAttention) for m in ours.modules())
    ours.load_state_dict(theirs.state_dict())
    oracle = copy.deepcopy(theirs).double()
    what = f"{sample.desc} {arguments.kwargs} {sample.forward_input.kwargs}"
    actual, expected, exact = (_results(m, sample) for m in (ours, theirs, oracle))
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert (tensor.shape, tensor.dtype) == (expected[name].shape, expected[name].dtype)
        if dtype == torch.float64:
            torch.testing.assert_close(
                tensor, expected[name], msg=lambda text, n=f"{what} {name}": f"{n}: {text}"
            )
        else:
            error = (tensor.double() - exact[name]).abs().max().item()
            spent.setdefault(name, []).append(error / error_budget(expected[name], exact[name]))
    if sample.reference_fn is not None:
        args, kwargs = copy.deepcopy((sample.forward_input.args, sample.forward_input.kwargs))
        expected = sample.reference_fn(ours, *args, **kwargs)
        torch.testing.assert_close(ours(*args, **kwargs), expected)


@pytest.mark.parametrize("info", _infos())
def test_samples_of_bad_input(info):
    """Torch has none of these layers yet; test_module_rules.py has ours."""
    if info.module_error_inputs_func is None:
        return
    samples = info.module_error_inputs_func(info, "cpu", torch.float32, requires_grad=False, training=False)
    for sample in samples:
        arguments, forward = (
            sample.module_error_input.constructor_input,
            sample.module_error_input.forward_input,
        )
        module = PAIRS[info.module_cls](*_swapped(arguments), **arguments.kwargs)
        with pytest.raises(sample.error_type, match=sample.error_regex):
            module(*forward.args, **forward.kwargs)
