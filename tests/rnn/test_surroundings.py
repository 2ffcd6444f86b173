"""What a program may do around a cell: each holds for torch's own cells, so it must for these."""

import os
import time

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import fusednn

from .cells import CELLS, MODULES, TORCH_MODULES

every_cell = pytest.mark.parametrize("cell", CELLS)
# The eager shortcut and the op have an autograd formula each.
both_ways = pytest.mark.parametrize("backend", ["auto", "reference"])


def tuple_of(result) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.fixture
def modules(cell) -> tuple[nn.Module, nn.Module]:
    """Return our module and torch's with the same parameters."""
    ours, theirs = MODULES[cell](6, 10), TORCH_MODULES[cell](6, 10)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def assert_agree(modules, f) -> None:
    """Check that `f` gives the same for both modules, from the same random numbers."""
    found = []
    for module in modules:
        torch.manual_seed(5)
        found.append(f(module))
    torch.testing.assert_close(*found)


class Tagged(torch.Tensor):
    """A subclass that keeps to torch's default: results are of its type."""


class Recorder(torch.overrides.TorchFunctionMode):
    """Writes down the functions called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(getattr(function, "__name__", ""))
        return function(*args, **(kwargs or {}))


@every_cell
def test_subclasses_are_kept(cell, modules):
    input = torch.randn(3, 6).as_subclass(Tagged)
    for module in modules:
        outputs = tuple_of(module(input))
        assert [type(out) for out in outputs] == [Tagged] * len(outputs)
    assert_agree(modules, lambda m: tuple(out.as_subclass(torch.Tensor) for out in tuple_of(m(input))))


@every_cell
def test_function_modes_see_the_cell(cell, modules):
    for module in modules:
        with Recorder() as recorder:
            module(torch.randn(3, 6))
        assert f"{cell}_cell" in recorder.seen


@every_cell
@both_ways
def test_mapped_cotangents(cell, modules, backend):
    def batched(module):
        input = torch.randn(3, 6, requires_grad=True)
        outputs = tuple_of(module(input))
        cotangents = [torch.randn(4, *out.shape) for out in outputs]
        leaves = [input, *module.parameters()]
        return torch.autograd.grad(outputs, leaves, cotangents, is_grads_batched=True)

    def jacobian(module):
        function = lambda x: tuple_of(module(x))[0]  # noqa: E731
        return torch.autograd.functional.jacobian(function, torch.randn(3, 6), vectorize=True)

    with fusednn.use_backend(backend):
        assert_agree(modules, batched)
        assert_agree(modules, jacobian)


@every_cell
@both_ways
def test_cotangents_with_tangents(cell, modules, backend):
    """Forward over reverse, begun after the forward."""

    def tangent(module):
        input = torch.randn(3, 6, requires_grad=True)
        out = tuple_of(module(input))[0]
        with forward_ad.dual_level():
            cotangent = forward_ad.make_dual(torch.ones_like(out), torch.randn_like(out))
            (grad,) = torch.autograd.grad(out, input, cotangent)
            return forward_ad.unpack_dual(grad).tangent

    with fusednn.use_backend(backend):
        assert_agree(modules, tangent)


@every_cell
def test_sparse_input(cell, modules):
    def step(module):
        outputs = tuple_of(module(torch.randn(3, 6).relu().to_sparse()))
        sum(out.sum() for out in outputs).backward()
        return [*outputs, module.weight_hh.grad, module.bias_ih.grad]

    assert_agree(modules, step)


@every_cell
@both_ways
def test_results_may_be_written_to(cell, modules, backend):
    """As where an episode ends and the state is masked in place."""

    def step(module):
        input = torch.randn(3, 6, requires_grad=True)
        outputs = tuple_of(module(input))
        for out in outputs:
            out.mul_(torch.tensor([[1.0], [0.0], [2.0]]))
        sum(out.square().sum() for out in outputs).backward()
        return [*outputs, input.grad, module.weight_ih.grad]

    with fusednn.use_backend(backend):
        assert_agree(modules, step)


@every_cell
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(cell, modules, reentrant):
    def steps(module):
        input, state = torch.randn(3, 6, requires_grad=True), None
        for _ in range(3):
            state = torch.utils.checkpoint.checkpoint(module, input, state, use_reentrant=reentrant)
        tuple_of(state)[0].sum().backward()
        return [input.grad, *(p.grad.clone() for p in module.parameters())]

    assert_agree(modules, steps)


@every_cell
def test_an_error_in_a_hook_on_saved_tensors_is_raised_once(cell, modules):
    for module in modules:
        calls = []

        def pack(t, calls=calls):
            calls.append(t)
            raise TypeError("from the hook")

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
            pytest.raises(TypeError, match="from the hook"),
        ):
            module(torch.randn(3, 6))
        assert len(calls) == 1


@every_cell
@pytest.mark.parametrize("batched", [True, False])
def test_symbolic_trace(cell, modules, batched):
    """torch.fx keeps torch's cells whole; ours are one node."""
    shape = (3, 6) if batched else (6,)
    for module in modules:
        traced = torch.fx.symbolic_trace(nn.Sequential(nn.Identity(), module))
        input = torch.randn(shape)
        torch.testing.assert_close(traced(input), module(input))
        assert len(traced.graph.nodes) < 10


@every_cell
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace(cell, modules):
    ours, _ = modules
    traced = torch.jit.trace(ours, (torch.randn(3, 6),))
    assert_agree((traced, ours), lambda m: m(torch.randn(5, 6)))


@every_cell
def test_flops_are_counted(cell, modules):
    """Those of the products, as for torch's cells, whichever gradients are asked for."""
    for frozen in ((), ("weight_ih",), ("weight_ih", "weight_hh")):
        for needs_input in (True, False):
            counted = []
            for module in modules:
                for name, parameter in module.named_parameters():
                    parameter.requires_grad_(name not in frozen)
                with FlopCounterMode(display=False) as counter:
                    input = torch.randn(3, 6, requires_grad=needs_input)
                    sum(out.sum() for out in tuple_of(module(input))).backward()
                counted.append(counter.get_total_flops())
            assert counted[0] == counted[1] > 0


def exit_code_of_a_fork(work, seconds: float = 30.0) -> int | None:
    """Run `work` in a forked child; None if it does not end."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if work() else 2
        finally:
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return None


@every_cell
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_is_not_left_waiting_for_threads(cell, native):
    """OpenMP's threads don't survive a fork; torch's own cell of this size runs on one."""
    module, input = MODULES[cell](64, 64), torch.randn(4, 64)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            expected = module(input)

            def work():
                torch.testing.assert_close(module(input), expected, rtol=0, atol=0)
                return True

            assert exit_code_of_a_fork(work) == 0
    finally:
        torch.set_num_threads(before)


@every_cell
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_shared_weights_that_another_process_changes(cell, native):
    """Hogwild: the version counter of another process counts nothing here."""
    module, input = MODULES[cell](24, 20).share_memory(), torch.randn(16, 24)
    with torch.no_grad():
        for _ in range(3):
            module(input)

        def work():
            for name in ("weight_ih", "weight_hh"):
                getattr(module, name)[41, 3] = 50
            return True

        assert exit_code_of_a_fork(work) == 0
        assert module.weight_ih[41, 3] == 50
        actual = module(input)
        with fusednn.use_backend("reference"):
            torch.testing.assert_close(actual, module(input))
