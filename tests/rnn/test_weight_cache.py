"""Packed weights are those of the weights given: every way to change a weight, against the reference."""

import gc

import pytest
import torch
from torch import nn

import fusednn
from fusednn.testing import instruction_set, instruction_sets

from .cells import CELLS, MODULES, PARAMETERS, fused_step, oracle_step, workload

BATCH = 16  # large enough to pack

pytestmark = pytest.mark.usefixtures("native")
every_cell = pytest.mark.parametrize("cell", CELLS)


def assert_current(module: nn.Module, batch: int = BATCH) -> None:
    """Check a module against the reference on its weights of this moment."""
    input = torch.randn(batch, module.input_size, dtype=module.weight_ih.dtype)
    with fusednn.use_backend("reference"):
        expected = module(input)
    # A stale weight is far off; exactness is the matrix's business.
    tolerance = 0.02 if input.dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(module(input), expected, rtol=tolerance, atol=tolerance)


def warm(module: nn.Module) -> nn.Module:
    """Call until the weights are packed."""
    for _ in range(3):
        assert_current(module)
    return module


@pytest.fixture
def module(cell, native):
    made = warm(MODULES[cell](24, 20))
    assert native.packed_weights() >= 1, "nothing was packed: these tests would prove nothing"
    return made


def edit_everywhere(weight):
    weight.data.mul_(-1)


def edit_one_row(weight):
    weight.data[7] = 0.5


def edit_through_numpy(weight):
    weight.detach().numpy()[:] *= 3


def copy_under_no_grad(weight):
    with torch.no_grad():
        weight.copy_(torch.randn_like(weight))


def index_put_under_no_grad(weight):
    with torch.no_grad():
        weight[3, 3] = 9


def swap_data(weight):
    weight.data = torch.randn_like(weight)


def swap_data_and_free(weight):
    weight.data = weight.data.clone().neg_()


def set_in_place(weight):
    with torch.no_grad():
        weight.set_(torch.randn_like(weight))


def edit_a_view(weight):
    with torch.no_grad():
        weight.view(-1)[11:13].fill_(4)


def edit_a_detached_alias(weight):
    weight.detach().neg_()


EDITS = (
    edit_everywhere,
    edit_one_row,
    edit_through_numpy,
    copy_under_no_grad,
    index_put_under_no_grad,
    swap_data,
    swap_data_and_free,
    set_in_place,
    edit_a_view,
    edit_a_detached_alias,
)


@every_cell
@pytest.mark.parametrize("name", ["weight_ih", "weight_hh"])
@pytest.mark.parametrize("edit", EDITS, ids=lambda f: f.__name__)
def test_edits(module, name, edit):
    for _ in range(3):
        edit(getattr(module, name))
        warm(module)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, foreach=False),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.1, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, foreach=False),
    "adam foreach": lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
    "adam fused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1),
}


@every_cell
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_optimizer_steps(module, make):
    optimizer = make(module.parameters())
    for _ in range(4):
        optimizer.zero_grad()
        out = module(torch.randn(BATCH, 24))
        (out[0] if isinstance(out, tuple) else out).square().sum().backward()
        before = module.weight_ih.detach().clone()
        optimizer.step()
        assert not before.equal(module.weight_ih)
        warm(module)


@every_cell
def test_load_state_dict(cell, module):
    for assign in (False, True, False):
        module.load_state_dict(MODULES[cell](24, 20).state_dict(), assign=assign)
        warm(module)


@every_cell
def test_clipping_and_initialisation(module):
    nn.init.orthogonal_(module.weight_hh)
    warm(module)
    torch.nn.utils.vector_to_parameters(
        torch.randn(sum(p.numel() for p in module.parameters())), module.parameters()
    )
    warm(module)
    module.reset_parameters()
    warm(module)


@every_cell
def test_another_parameter_object(module):
    for name in ("weight_ih", "weight_hh"):
        setattr(module, name, nn.Parameter(torch.randn_like(getattr(module, name))))
        warm(module)


@every_cell
def test_weights_swapped_between_modules(cell, module):
    other = warm(MODULES[cell](24, 20))
    for _ in range(3):
        module.weight_ih, other.weight_ih = other.weight_ih, module.weight_ih
        warm(module)
        warm(other)
    module.weight_ih.data, other.weight_ih.data = other.weight_ih.data, module.weight_ih.data
    warm(module)
    warm(other)
    torch.utils.swap_tensors(module.weight_hh, other.weight_hh)
    warm(module)
    warm(other)


def test_one_weight_in_two_cells():
    """The same memory as the weights of an LSTM, of a GRU, and in another shape."""
    storage = torch.randn(4 * 24 * 24)
    lstm, gru = fusednn.LSTMCell(24, 24, bias=False), fusednn.GRUCell(24, 24, bias=False)
    for start in (0, 4):
        for module, gates in ((lstm, 4), (gru, 3)):
            size = gates * 24 * 24
            if start + size <= storage.numel():
                module.weight_ih = module.weight_hh = nn.Parameter(storage[start : start + size].view(-1, 24))
    for _ in range(3):
        warm(lstm)
        warm(gru)
        with torch.no_grad():
            storage.neg_()


@every_cell
def test_views_of_one_storage(cell):
    """Slices, transposes and expansions that start at the same address."""
    rows = (4 if cell == "lstm" else 3) * 24
    base = torch.randn(rows + 24, rows + 24)
    views = (
        base[:rows, :24],
        base.t()[:rows, :24],
        base[:1, :24].expand(rows, 24),
        base.view(-1)[: rows * 24].view(rows, 24),
        base[1 : rows + 1, :24],
    )
    tensors = workload(cell, BATCH, 24, 24).tensors
    for _ in range(4):
        for view in views:
            for name in ("weight_ih", "weight_hh"):
                changed = {**tensors, name: view}
                with torch.no_grad():
                    torch.testing.assert_close(fused_step(cell, changed), oracle_step(cell, changed))
        base.neg_()


@every_cell
def test_memory_used_again_at_the_same_address(cell):
    seen = set()
    for index in range(40):
        module = MODULES[cell](24, 20)
        seen.add(module.weight_ih.data_ptr())
        for _ in range(3):
            assert_current(module)
        del module
        if index % 8 == 0:
            gc.collect()
    assert len(seen) < 40, "no address came twice: this would prove nothing"


@every_cell
def test_entries_of_dead_weights_vanish(cell, native):
    for _ in range(10):
        warm(MODULES[cell](24, 20))
    gc.collect()
    warm(MODULES[cell](24, 20))
    assert native.packed_weights() <= 2
    alive = [warm(MODULES[cell](24, 20)) for _ in range(5)]
    assert native.packed_weights() >= len(alive)
    native.clear_packed_weights()
    assert native.packed_weights() == 0
    for module in alive:
        warm(module)


@every_cell
def test_more_weights_than_the_cache_keeps(cell, native):
    modules = [MODULES[cell](4, 8) for _ in range(300)]
    input = torch.randn(BATCH, 4)
    with torch.no_grad():
        for _ in range(3):
            for module in modules:
                module(input)
    assert native.packed_weights() <= 256
    for module in (modules[0], modules[150], modules[-1]):
        warm(module)


@every_cell
def test_inference_tensors(cell):
    """They count no versions, so that nothing could tell a change."""
    with torch.inference_mode():
        module = MODULES[cell](24, 20)
        for _ in range(3):
            warm(module)
            module.weight_hh.add_(1)
            module.weight_ih[5, 7] = 4
    made_outside = MODULES[cell](24, 20)
    with torch.inference_mode():
        warm(made_outside)
    with torch.no_grad():
        made_outside.weight_hh.add_(1)
    with torch.inference_mode():
        warm(made_outside)


@every_cell
def test_another_instruction_set(module):
    for _ in range(2):
        for name in instruction_sets():
            with instruction_set(name):
                warm(module)


@every_cell
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_another_dtype_of_the_same_memory(cell, module, dtype):
    module.to(dtype)
    for _ in range(3):
        warm(module)
    module.float()
    warm(module)


@every_cell
def test_nothing_is_kept_when_told_so(cell, native):
    native.keep_packed_weights(False)
    try:
        warm(MODULES[cell](24, 20))
        assert native.packed_weights() == 0
    finally:
        native.keep_packed_weights(True)
    warm(MODULES[cell](24, 20))
    assert native.packed_weights() == 1


@every_cell
def test_functional_calls_with_temporaries(cell):
    """Weights made for one call, as torch.func and hypernetworks do."""
    module = MODULES[cell](24, 20)
    input = torch.randn(BATCH, 24)
    for _ in range(20):
        parameters = {name: torch.randn_like(getattr(module, name)) for name in PARAMETERS}
        results = []
        for backend in ("cpu", "reference"):
            with fusednn.use_backend(backend):
                results.append(torch.func.functional_call(module, parameters, (input,)))
        torch.testing.assert_close(results[0], results[1])


@every_cell
def test_threads_share_the_cache(cell):
    """Calls from several threads, over weights that come and go."""
    from concurrent.futures import ThreadPoolExecutor

    shared = MODULES[cell](24, 20)

    def work(index):
        with fusednn.use_backend("cpu"):
            for _ in range(20):
                assert_current(shared)
                assert_current(MODULES[cell](8 + index, 12))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


@every_cell
def test_an_edit_of_one_element_past_the_version_counter(module):
    """What the samples can miss (docs/design/002-weight-cache.md) is seen once the version moves."""
    input = torch.randn(BATCH, 24)
    with torch.no_grad():
        for _ in range(3):
            module(input)
        module.weight_ih.data[module.weight_ih.shape[0] // 2 + 1, 3] += 5
        module.weight_ih.add_(0)
    assert_current(module)
