"""The peers of a case whose work is one ``torch.nn`` module and its fused subclass."""

from __future__ import annotations

import contextlib
import copy
import zlib
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .exported import onnxruntime_call, openvino_call
from .registry import (
    COMPILE,
    EAGER,
    FUSEDNN,
    ONNXRUNTIME,
    OPENVINO,
    PEERS,
    REFERENCE,
    Case,
    Outputs,
    Peer,
    PeerMissing,
)

Arrange = Callable[[Mapping[str, Tensor]], tuple[Any, ...]]


def seeded_generator(name: str) -> torch.Generator:
    """Return a CPU generator whose draws depend on `name` alone, so that a re-run has the same inputs."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def flatten(result: object) -> list[Tensor]:
    """Return the tensors of a nested tuple, in order."""
    if isinstance(result, Tensor):
        return [result]
    assert isinstance(result, (tuple, list)), f"expected tensors, got {type(result).__name__}"
    return [tensor for item in result for tensor in flatten(item)]


def import_fusednn() -> ModuleType:
    """Import fusednn.

    Raises:
        PeerMissing: it isn't installed.

    """
    try:
        import fusednn
    except ModuleNotFoundError as error:
        if error.name != "fusednn":
            raise
        raise PeerMissing("fusednn is not installed") from error
    return fusednn


class ModuleWorkload:
    """Peers that share one module's weights and one set of inputs.

    Args:
        case: its mode and dtype decide what a call does.
        device: where the peers run; the oracle is always on the CPU.
        module: the ``torch.nn`` module in the case's dtype, on the CPU; every peer gets a copy.
        fused: given the ``fusednn`` package, returns a module that takes `module`'s ``state_dict``.
        inputs: name → CPU tensor in the case's dtype.
        arrange: turns inputs by name into the module's positional arguments.
        output_names: a name for each tensor that the module returns, in order.

    Inference is a call under ``no_grad`` in ``eval`` mode. Training is a forward and a backward to the
    parameters and every input; gradients are ``None`` at its start.

    """

    peers: tuple[str, ...] = PEERS

    def __init__(
        self,
        case: Case,
        device: torch.device,
        *,
        module: nn.Module,
        fused: Callable[[ModuleType], nn.Module],
        inputs: Mapping[str, Tensor],
        arrange: Arrange,
        output_names: tuple[str, ...],
    ) -> None:
        self.case = case
        self.device = device
        self.module = module.train(case.mode == "training")
        self.fused = fused
        self.inputs = dict(inputs)
        self.arrange = arrange
        self.output_names = output_names

    def oracle(self) -> Outputs:
        """Run the ``torch.nn`` module in float64 on the CPU."""
        module = copy.deepcopy(self.module).double()
        return self._run(self._module_peer("oracle", module, module, torch.device("cpu"), torch.float64))

    def build(self, peer: str) -> Peer:
        """Make one peer; the compiler of ``compile`` runs here, and exports too."""
        if peer == EAGER:
            module = self._copy()
            return self._module_peer(peer, module, module)
        if peer == COMPILE:
            return self._compiled()
        if peer in (FUSEDNN, REFERENCE):
            return self._fusednn(peer)
        if peer in (ONNXRUNTIME, OPENVINO):
            return self._exported(peer)
        raise ValueError(f"peer: got {peer!r}, expected one of {', '.join(PEERS)}")

    def make_backward(self) -> Callable[[list[Tensor]], None]:
        """Return what takes one peer's outputs backwards: the default, from the sum of them all."""
        return _backward_of_sum

    def _copy(self) -> nn.Module:
        return copy.deepcopy(self.module).to(self.device)

    def _fusednn(self, name: str) -> Peer:
        fusednn = import_fusednn()
        module = self.fused(fusednn).to(self.case.torch_dtype)
        module.load_state_dict(self.module.state_dict())
        module = module.to(self.device).train(self.module.training)
        if name == REFERENCE:
            return self._module_peer(name, module, module, backend=lambda: fusednn.use_backend("reference"))
        note = "+".join(dict.fromkeys(str(e.backend) for e in self._explain(fusednn, module)))
        return self._module_peer(name, module, module, note=note)

    def _explain(self, fusednn: ModuleType, module: nn.Module) -> tuple[Any, ...]:
        arguments = self.arrange({k: v.to(self.device) for k, v in self.inputs.items()})
        with torch.set_grad_enabled(self.case.mode == "training"):
            return tuple(fusednn.explain(module, *arguments))

    def _compiled(self) -> Peer:
        import torch._inductor.config as inductor

        module = self._copy()
        # dynamic=False: the shapes never change here, and static ones are the faster code.
        peer = self._module_peer(COMPILE, module, torch.compile(module, dynamic=False))
        with inductor.patch(freezing=self.case.mode == "inference"):
            self._run(peer)
        peer.reset()
        return peer

    def _exported(self, name: str) -> Peer:
        if self.case.mode == "training":
            raise PeerMissing("inference only")
        if self.device.type != "cpu":
            raise PeerMissing("runs on the CPU only")
        make = onnxruntime_call if name == ONNXRUNTIME else openvino_call
        call = make(copy.deepcopy(self.module), self.arrange, self.inputs)
        return Peer(name, call, lambda arrays: self._named([torch.from_numpy(a) for a in as_list(arrays)]))

    def _named(self, tensors: list[Tensor]) -> Outputs:
        if len(tensors) != len(self.output_names):
            raise ValueError(f"outputs: got {len(tensors)}, expected {', '.join(self.output_names)}")
        return dict(zip(self.output_names, tensors))

    def _module_peer(
        self,
        name: str,
        module: nn.Module,
        callee: Callable[..., object],
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: Callable[[], Any] = contextlib.nullcontext,
        note: str = "",
    ) -> Peer:
        training = self.case.mode == "training"
        device, dtype = device or self.device, dtype or self.case.torch_dtype
        inputs = {k: v.to(device, dtype, copy=True).requires_grad_(training) for k, v in self.inputs.items()}
        arguments = self.arrange(inputs)
        leaves = {**inputs, **dict(module.named_parameters())}
        backward = self.make_backward()

        def reset() -> None:
            for leaf in leaves.values():
                leaf.grad = None

        def step() -> object:
            reset()
            result = callee(*arguments)
            backward(flatten(result))
            return result

        def outputs(result: object) -> Outputs:
            named = self._named([t.detach() for t in flatten(result)])
            if training:
                named.update((f"grad {name}", gradient(name, leaf)) for name, leaf in leaves.items())
            return {name: tensor.clone() for name, tensor in named.items()}

        @contextlib.contextmanager
        def context() -> Iterator[None]:
            with torch.set_grad_enabled(training), backend():
                yield

        call = step if training else (lambda: callee(*arguments))
        return Peer(name, call, outputs, context, reset, note)

    def _run(self, peer: Peer) -> Outputs:
        with peer.context():
            return peer.outputs(peer.call())


def _backward_of_sum(outputs: list[Tensor]) -> None:
    loss = outputs[0].sum()
    for tensor in outputs[1:]:
        loss = loss + tensor.sum()
    loss.backward()


def backward_of_random(case: Case) -> Callable[[list[Tensor]], None]:
    """Return what takes outputs backwards from seeded random numbers, laid out as the outputs lie.

    The gradient of a sum is one number, read everywhere: what a next layer gives is as large as the outputs.
    """
    grads: list[Tensor] = []

    def backward(outputs: list[Tensor]) -> None:
        if not grads:
            generator = seeded_generator(f"gradient {case.name}")
            for out in outputs:
                grad = torch.randn(out.shape, generator=generator, dtype=case.torch_dtype)
                grads.append(torch.empty_like(out).copy_(grad))
        torch.autograd.backward(outputs, grads)

    return backward


def gradient(name: str, leaf: Tensor) -> Tensor:
    """Return the leaf's gradient.

    Raises:
        ValueError: the backward left none.

    """
    if leaf.grad is None:
        raise ValueError(f"{name}: the backward left no gradient")
    return leaf.grad


def as_list(arrays: Any) -> list[Any]:
    """Copy arrays that a runtime may reuse in its next call."""
    return [array.copy() for array in arrays]
