"""torch.library's own checks, torch.compile, torch.export, autocast, torch.func."""

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap

import fusednn

from .cells import CELLS, MODULES, STATES, TORCH_MODULES, fused_step, run, torch_step, workload
from .op_cases import OPS, op_cases

every_cell = pytest.mark.parametrize("cell", CELLS)


def outputs_of(result):
    return result if isinstance(result, tuple) else (result,)


def pair_of_modules(cell: str, input_size: int = 6, hidden: int = 10, **kwargs):
    """Return fusednn's module and torch's with the same parameters."""
    ours, theirs = (
        MODULES[cell](input_size, hidden, **kwargs),
        TORCH_MODULES[cell](input_size, hidden, **kwargs),
    )
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def zero_state(cell: str, batch: int, hidden: int, dtype=torch.float32):
    states = tuple(torch.zeros(batch, hidden, dtype=dtype) for _ in STATES[cell])
    return states if cell == "lstm" else states[0]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_opcheck(name, backend, request):
    if backend == "cpu":
        request.getfixturevalue("native")
    op = getattr(torch.ops.fusednn, name).default
    cases = op_cases(name)
    with fusednn.use_backend(backend):
        for case, args in cases.items():
            try:
                torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
            except Exception as error:
                raise AssertionError(f"{name} {case}") from error


@pytest.mark.parametrize("name", OPS)
def test_opcheck_of_autograd_and_dynamic_shapes(name):
    """All of opcheck, on the largest case that trains: the rest of it takes seconds a case."""
    op = getattr(torch.ops.fusednn, name).default
    trained = [
        args for case, args in op_cases(name).items() if case.startswith("B=9") and "False" not in case
    ]
    torch.library.opcheck(op, trained[-1])


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck_of_dtypes(name, dtype):
    op = getattr(torch.ops.fusednn, name).default
    args = op_cases(name, dtype)
    torch.library.opcheck(op, list(args.values())[-1], test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", OPS)
def test_fakes_have_the_kernels_shapes_and_strides(place, name):
    """On each backend, since a compiled graph takes the fake's word for every one of them."""
    op = getattr(torch.ops.fusednn, name)
    for case, args in op_cases(name).items():
        args = tuple(a.detach().to(place.device) if isinstance(a, torch.Tensor) else a for a in args)
        real = op(*args)
        fake = op(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
        for index, (r, f) in enumerate(zip(real, fake, strict=True)):
            assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride()), f"{case}, result {index}"


@every_cell
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_fullgraph(cell, backend):
    """Forward and backward in one graph each, and a batch that changes without compiling again and again."""
    torch._dynamo.reset()
    ours, theirs = pair_of_modules(cell)
    compiled = torch.compile(ours, fullgraph=True, backend=backend, dynamic=True)
    for batch in (3, 9, 12):
        input = torch.randn(batch, 6)
        with torch._dynamo.config.patch(error_on_recompile=batch == 12):
            actual = outputs_of(compiled(input, zero_state(cell, batch, 10)))
        expected = outputs_of(theirs(input))
        for module, outputs in ((ours, actual), (theirs, expected)):
            module.zero_grad()
            sum(o.square().sum() for o in outputs).backward()
        torch.testing.assert_close(actual, expected)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)


@every_cell
@pytest.mark.parametrize("hx", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_compile_of_each_way_to_call(cell, hx, batched):
    torch._dynamo.reset()
    ours, theirs = pair_of_modules(cell)
    input = torch.randn(*([4] if batched else []), 6)
    state = zero_state(cell, 4, 10)
    state = state if batched else (tuple(s[0] for s in state) if cell == "lstm" else state[0])
    args = (input, state) if hx else (input,)
    with torch.no_grad():
        actual = torch.compile(ours, fullgraph=True, backend="aot_eager")(*args)
        torch.testing.assert_close(actual, theirs(*args))


@every_cell
def test_compiled_loop_over_time(cell):
    torch._dynamo.reset()
    ours, theirs = pair_of_modules(cell)

    def unroll(module, inputs):
        state, found = None, []
        for x in inputs.unbind(0):
            state = module(x, state)
            found.append(state[0] if cell == "lstm" else state)
        return torch.stack(found)

    inputs = torch.randn(4, 3, 6)
    compiled = torch.compile(lambda x: unroll(ours, x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs), unroll(theirs, inputs))


@every_cell
@pytest.mark.parametrize("strict", [False, True])
def test_export(cell, strict):
    torch._dynamo.reset()
    ours, theirs = pair_of_modules(cell)
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {"input": {0: batch}, "hx": ({0: batch}, {0: batch}) if cell == "lstm" else {0: batch}}
    args = (torch.randn(5, 6), zero_state(cell, 5, 10))
    with torch.no_grad():
        program = torch.export.export(ours, args, dynamic_shapes=shapes, strict=strict)
        assert any(f"{cell}_cell_forward" in str(node.target) for node in program.graph.nodes)
        for rows in (2, 11):
            args = (torch.randn(rows, 6), zero_state(cell, rows, 10))
            torch.testing.assert_close(program.module()(*args), theirs(*args))


@every_cell
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("hx", [False, True])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(place, cell, dtype, hx, state_dtype):
    """The dtypes of torch's cell, and its values to the precision of the products."""
    ours, theirs = (m.to(place.device) for m in pair_of_modules(cell))
    input = torch.randn(9, 6, device=place.device)
    state = zero_state(cell, 9, 10, state_dtype)
    state = tuple(s.to(place.device) + 0.5 for s in state) if cell == "lstm" else state.to(place.device) + 0.5
    args = (input, state) if hx else (input,)
    # On a CPU a state keeps its precision; on a GPU it is cast.
    wide = place.device == "cpu" and torch.promote_types(dtype, state_dtype if hx else input.dtype) != dtype
    if wide and place.backend in ("cuda", "triton"):
        with (
            torch.autocast(place.device, dtype),
            pytest.raises(RuntimeError, match=r"a state of torch\.float32"),
        ):
            ours(*args)
        return
    with torch.autocast(place.device, dtype):
        actual, expected = outputs_of(ours(*args)), outputs_of(theirs(*args))
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        torch.testing.assert_close(a, e, rtol=0.02, atol=0.02)
    for outputs in (actual, expected):
        sum(o.float().square().sum() for o in outputs).backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert a.grad.dtype == b.grad.dtype
        torch.testing.assert_close(a.grad, b.grad, rtol=0.05, atol=0.05)


@every_cell
def test_autocast_leaves_float64_alone(cell):
    ours, theirs = pair_of_modules(cell, dtype=torch.float64)
    input = torch.randn(3, 6, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours(input), theirs(input))


@every_cell
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_wide_state(native, cell, dtype):
    """float32 state beside 16-bit weights, as autocast makes it: the state keeps float32's exactness."""
    work = workload(cell, 9, 6, 10, dtype)
    tensors = {name: t.float() if name in STATES[cell] else t for name, t in work.tensors.items()}
    args = (*tensors.values(), True)
    name = f"{cell}_cell_forward"
    outputs = getattr(native, name)(*args)
    exact = run(torch_step, work.map(torch.Tensor.double), ())
    for state, out in zip(STATES[cell], outputs):
        assert out.dtype == torch.float32
        torch.testing.assert_close(out.double(), exact[f"{state}'"], rtol=1e-5, atol=1e-6)


@every_cell
def test_functional_call(cell):
    ours, theirs = pair_of_modules(cell)
    parameters = {name: torch.randn_like(p, requires_grad=True) for name, p in ours.named_parameters()}
    input = torch.randn(9, 6)
    actual, expected = (functional_call(m, parameters, (input,)) for m in (ours, theirs))
    torch.testing.assert_close(actual, expected)
    grads = [
        torch.autograd.grad(outputs_of(out)[0].sum(), list(parameters.values())) for out in (actual, expected)
    ]
    torch.testing.assert_close(*grads)


@every_cell
def test_func_grad_and_vmap_over_samples(cell):
    """Per-sample gradients, the usual use of torch.func."""
    ours, theirs = pair_of_modules(cell)  # torch's own cell can't be mapped: a loop stands for it
    inputs = torch.randn(5, 6)
    parameters = {name: p.detach() for name, p in ours.named_parameters()}

    def loss(parameters, x, module):
        return outputs_of(functional_call(module, parameters, (x,)))[0].square().sum()

    mapped = vmap(grad(lambda p, x: loss(p, x, ours)), in_dims=(None, 0))(parameters, inputs)
    for index, x in enumerate(inputs):
        single = grad(lambda p, x=x: loss(p, x, theirs))(parameters)
        torch.testing.assert_close({name: g[index] for name, g in mapped.items()}, single)


@every_cell
def test_vmap_over_an_ensemble(cell):
    modules = [MODULES[cell](6, 10) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(modules)
    input = torch.randn(4, 6)
    outputs = vmap(lambda p: outputs_of(functional_call(modules[0], (p, buffers), (input,)))[0])(parameters)
    for module, out in zip(modules, outputs, strict=True):
        torch.testing.assert_close(out, outputs_of(module(input))[0])


@every_cell
def test_jvp(cell):
    work = workload(cell, 4, 6, 10, torch.float64)
    direction = torch.randn_like(work.tensors["input"])
    results = [
        jvp(lambda x, s=step: s(cell, {**work.tensors, "input": x}), (work.tensors["input"],), (direction,))
        for step in (fused_step, torch_step)
    ]
    torch.testing.assert_close(results[0], results[1])


@every_cell
def test_forward_mode(cell):
    work = workload(cell, 4, 6, 10, torch.float64)
    tangent = torch.randn_like(work.tensors["weight_hh"])
    found = []
    for step in (fused_step, torch_step):
        with torch.autograd.forward_ad.dual_level():
            weight = torch.autograd.forward_ad.make_dual(work.tensors["weight_hh"], tangent)
            outputs = step(cell, {**work.tensors, "weight_hh": weight})
            found.append([torch.autograd.forward_ad.unpack_dual(o).tangent for o in outputs])
    torch.testing.assert_close(found[0], found[1])
