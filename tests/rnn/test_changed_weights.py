"""A step is of the weights of this moment: every way to change a weight, against the reference."""

import gc
import threading

import pytest
import torch
from torch import nn

import fusednn
from fusednn.testing import instruction_set, instruction_sets

from .cells import CELLS, MODULES, PARAMETERS, fused_step, oracle_step, workload

BATCH = 16  # large enough for panels

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
    """Call more than once: whatever is kept of the weights is kept now."""
    for _ in range(3):
        assert_current(module)
    return module


@pytest.fixture
def module(cell):
    return warm(MODULES[cell](24, 20))


def edit_everywhere(weight):
    weight.data.mul_(-1)


def edit_one_row(weight):
    weight.data[7] = 0.5


def edit_one_element(weight):
    weight.data[5, 7] += 3


def zero_a_head(weight):
    weight.data[4:9] = 0


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
    edit_one_element,
    zero_a_head,
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


DEAD = slice(3, None, 8)  # columns


@every_cell
@pytest.mark.parametrize("name", ["SGD", "Adam", "Adagrad"])
def test_fused_steps_with_dead_inputs(cell, name):
    """They leave the version counter as it was, and change nothing in the columns of inputs that are 0."""
    module = MODULES[cell](40, 40)
    optimizer = getattr(torch.optim, name)(module.parameters(), lr=0.5, fused=True)
    x = torch.randn(BATCH, 40)
    x[:, DEAD] = 0
    for _ in range(6):
        with torch.no_grad():
            module(x)
            module(x)
        optimizer.zero_grad()
        out = module(x)
        (out[0] if isinstance(out, tuple) else out).sum().backward()
        optimizer.step()
        theirs = getattr(nn, type(module).__name__)(40, 40)
        theirs.load_state_dict(module.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(module(x), theirs(x), rtol=1e-4, atol=1e-4)


def _rewrite(weight):
    with torch.no_grad():
        weight[6, 2] = 50


@every_cell
def test_memory_shared_with_a_process(cell, module):
    module.share_memory()
    warm(module)
    child = torch.multiprocessing.get_context("fork").Process(target=_rewrite, args=(module.weight_ih,))
    child.start()
    child.join()
    assert module.weight_ih[6, 2] == 50
    assert_current(module)


@every_cell
def test_a_write_of_another_thread(module):
    thread = threading.Thread(target=_rewrite, args=(module.weight_hh,))
    thread.start()
    thread.join()
    assert_current(module)


@every_cell
def test_averaged_and_interpolated(cell, module):
    averaged = warm(torch.optim.swa_utils.AveragedModel(module).module)
    for other in (MODULES[cell](24, 20), MODULES[cell](24, 20)):
        with torch.no_grad():
            for mine, theirs in zip(averaged.parameters(), other.parameters(), strict=True):
                mine.lerp_(theirs, 0.5)
        warm(averaged)


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
