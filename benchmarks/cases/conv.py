"""The depthwise-separable block of MobileNets: depthwise, BatchNorm, ReLU6, pointwise, BatchNorm, ReLU6.

N = batch, C = input channels, O = output channels, P = pixels of the input, Q = pixels of the result,
k = kernel size. `depthwise_conv2d` cases are the first convolution alone, with bias and ReLU6.

flops, a multiply-add being two, norms and activations not counted:
    forward    2 N Q C (k² + O)         depthwise_conv2d: 2 N Q C k²
    training   3 x forward: each product itself, its gradient to the input, its gradient to the weight

bytes, each tensor that a pass reads or writes counted once, e bytes an element; what lies between the two
products needs no memory in inference, and in training the norms' statistics part the passes:
    W = C k² + C O + 4 (C + O)          weights, and each norm's weight, bias, mean and variance
    inference  e (N C P + N O Q + W)    depthwise_conv2d: e (N C P + N C Q + C k² + C)
    training   forward  e (N C P + 2 N C Q + 2 N O Q + W): z1 and z2 are written, read by the next pass
                        (z1) or by the last (z2, counted with the result)
               backward e (N O Q + 2 N C Q + N O Q + 2 N C P + 2 W): gradient of the result, z2, z1 read
                        and its gradient written, input read and its gradient written, weights, gradients
               depthwise_conv2d: forward, and e (N C Q + 2 N C P + 2 (C k² + C))

A training step is a forward, and a backward from a gradient of the result that is drawn once, the same for
all peers, in the result's own memory format. (Not from a sum: behind a norm with the batch's statistics most
of its gradients are zero but for rounding.) Its inputs keep away from the kinks of ReLU6 (see
benchmarks/kinks.py), so there are no training cases of 16 bits, which can't.

A peer takes its input in the better of both memory formats, which it is given before the time is taken.
"""

from __future__ import annotations

import dataclasses
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.kinks import clear_of_kinks
from benchmarks.registry import COMPILE, EAGER, FUSEDNN, REFERENCE, Case, Mode, Peer
from benchmarks.workload import ModuleWorkload, backward_of_random, seeded_generator

# N, C, O, H = W, k, stride, dilation
SHAPES = [
    (1, 32, 64, 112, 3, 1, 1),
    (8, 64, 128, 56, 3, 1, 1),
    (8, 128, 128, 56, 3, 2, 1),
    (8, 256, 256, 28, 3, 1, 1),
    (8, 512, 512, 14, 3, 1, 1),
    (1, 512, 512, 14, 3, 1, 1),
    (1, 256, 256, 64, 3, 1, 6),
    (2, 96, 96, 56, 7, 1, 1),
]
QUICK = [SHAPES[0], SHAPES[5]]
DEPTHWISE_SHAPES = [SHAPES[0], SHAPES[4], SHAPES[7]]

FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}

Shape = tuple[int, int, int, int, int, int, int]


def _pixels(shape: Shape) -> tuple[int, int]:
    _n, _c, _o, size, _k, stride, _d = shape
    return size * size, ((size - 1) // stride + 1) ** 2


def block_flops(mode: Mode, shape: Shape) -> int:
    """Flops of a block; the module's text has the formula."""
    n, c, o, _, k, _, _ = shape
    forward = 2 * n * _pixels(shape)[1] * c * (k * k + o)
    return forward if mode == "inference" else 3 * forward


def block_bytes(mode: Mode, shape: Shape, itemsize: int = 4) -> int:
    """Bytes of a block; the module's text has the formula."""
    n, c, o, _, k, _, _ = shape
    p, q = _pixels(shape)
    weights = c * k * k + c * o + 4 * (c + o)
    if mode == "inference":
        return itemsize * (n * c * p + n * o * q + weights)
    forward = n * c * p + 2 * n * c * q + 2 * n * o * q + weights
    backward = 2 * n * o * q + 2 * n * c * q + 2 * n * c * p + 2 * weights
    return itemsize * (forward + backward)


def depthwise_flops(mode: Mode, shape: Shape) -> int:
    """Flops of the depthwise convolution alone."""
    n, c, _, _, k, _, _ = shape
    forward = 2 * n * _pixels(shape)[1] * c * k * k
    return forward if mode == "inference" else 3 * forward


def depthwise_bytes(mode: Mode, shape: Shape, itemsize: int = 4) -> int:
    """Bytes of the depthwise convolution alone."""
    n, c, _, _, k, _, _ = shape
    p, q = _pixels(shape)
    weights = c * k * k + c
    elements = n * c * p + n * c * q + weights
    if mode == "training":
        elements += n * c * q + 2 * n * c * p + 2 * weights
    return itemsize * elements


def _arrange(inputs: Mapping[str, Tensor]) -> tuple[Any, ...]:
    return (inputs["x"],)


class ConvWorkload(ModuleWorkload):
    """Peers that may choose the memory format of the input, and whose output has a gradient drawn for it."""

    peers = (EAGER, COMPILE, REFERENCE, FUSEDNN)

    def make_backward(self) -> Callable[[list[Tensor]], None]:
        """Return a backward from seeded random numbers."""
        return backward_of_random(self.case)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._faster: dict[str, str] = {}  # by peer: chosen once, so that eager is judged in its own format

    def build(self, peer: str) -> Peer:
        """Make one peer, in the format in which it is faster; the compiler lays its graph out itself."""
        if peer == COMPILE:
            return super().build(peer)
        if peer not in self._faster:
            seconds = {name: _seconds(self._build_in(name, peer)) for name in FORMATS}
            self._faster[peer] = min(seconds, key=lambda name: seconds[name])
        return self._build_in(self._faster[peer], peer)

    def _build_in(self, name: str, peer: str) -> Peer:
        contiguous = self.inputs
        try:
            self.inputs = {k: v.contiguous(memory_format=FORMATS[name]) for k, v in contiguous.items()}
            made = super().build(peer)
        finally:
            self.inputs = contiguous
        return dataclasses.replace(made, note="+".join(filter(None, (made.note, name))))


def _seconds(peer: Peer) -> float:
    """The best of a few calls."""
    times = []
    with peer.context():
        for _ in range(5):
            begin = time.perf_counter()
            peer.call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
    peer.reset()
    return min(times)


def _shape_of(case: Case) -> Shape:
    n, c, o, size, k, stride, dilation = (case.shape[name] for name in ("N", "C", "O", "H", "k", "s", "d"))
    return n, c, o, size, k, stride, dilation


def _depthwise(shape: Shape, bias: bool) -> nn.Conv2d:
    _n, c, _o, _size, k, stride, dilation = shape
    padding = dilation * (k - 1) // 2
    return nn.Conv2d(c, c, k, stride, padding, dilation, groups=c, bias=bias)


def _block(shape: Shape) -> nn.Module:
    c, o = shape[1:3]
    layers = OrderedDict(
        depthwise=_depthwise(shape, bias=False),
        norm1=nn.BatchNorm2d(c),
        activation1=nn.ReLU6(),
        pointwise=nn.Conv2d(c, o, 1, bias=False),
        norm2=nn.BatchNorm2d(o),
        activation2=nn.ReLU6(),
    )
    return nn.Sequential(layers)


def _draw(module: nn.Module, generator: torch.Generator) -> None:
    """Give every parameter and statistic a value of its own: a norm must not be the identity."""
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if not tensor.dtype.is_floating_point:
                continue
            if tensor.dim() == 4:
                tensor.normal_(generator=generator).div_(tensor[0].numel() ** 0.5)
            elif name.endswith("bias") or name.endswith("mean"):
                tensor.normal_(generator=generator)
            else:
                tensor.uniform_(0.5, 2, generator=generator)


def build_block(case: Case, device: torch.device) -> ConvWorkload:
    """Build the workload of a block."""
    shape = _shape_of(case)
    module = _block(shape).to(case.torch_dtype)

    def fused(fusednn: ModuleType) -> nn.Module:
        _n, c, o, _size, k, stride, dilation = shape
        return fusednn.DepthwiseSeparableConv2d(c, o, k, stride, dilation * (k - 1) // 2, dilation)

    return _workload(case, device, module, fused)


def build_depthwise(case: Case, device: torch.device) -> ConvWorkload:
    """Build the workload of a depthwise convolution with ReLU6."""
    shape = _shape_of(case)
    module = nn.Sequential(_depthwise(shape, bias=True), nn.ReLU6()).to(case.torch_dtype)

    def fused(fusednn: ModuleType) -> nn.Module:
        _n, c, _o, _size, k, stride, dilation = shape
        padding = dilation * (k - 1) // 2
        layer = fusednn.DepthwiseConv2d(c, c, k, stride, padding, dilation, activation="relu6")
        return nn.Sequential(layer)

    return _workload(case, device, module, fused)


def _workload(case: Case, device: torch.device, module: nn.Module, fused) -> ConvWorkload:
    n, c, _o, size = _shape_of(case)[:4]
    generator = seeded_generator(case.name.rpartition("-")[0])
    _draw(module, generator)
    x = torch.randn(n, c, size, size, generator=generator, dtype=case.torch_dtype)
    if case.mode == "training":
        x = clear_of_kinks(module.train(), x, case.shape["s"], generator)
    inputs = {"x": x}
    return ConvWorkload(
        case, device, module=module, fused=fused, inputs=inputs, arrange=_arrange, output_names=("y",)
    )


def _case(kind: str, mode: Mode, shape: Shape) -> Case:
    n, c, o, size, k, stride, dilation = shape
    flops, size_of, build = {
        "separable_conv2d": (block_flops, block_bytes, build_block),
        "depthwise_conv2d": (depthwise_flops, depthwise_bytes, build_depthwise),
    }[kind]
    tail = (f"-s{stride}" if stride > 1 else "") + (f"-d{dilation}" if dilation > 1 else "")
    return Case(
        name=f"{kind}-n{n}-c{c}-o{o}-h{size}-k{k}{tail}-{mode}",
        family="conv",
        mode=mode,
        shape={"N": n, "C": c, "O": o, "H": size, "k": k, "s": stride, "d": dilation},
        dtype="float32",
        flops=flops(mode, shape),
        bytes=size_of(mode, shape),
        build=build,
        quick=kind == "separable_conv2d" and shape in QUICK,
    )


_MODES: tuple[Mode, ...] = ("inference", "training")
_KINDS = (("separable_conv2d", SHAPES), ("depthwise_conv2d", DEPTHWISE_SHAPES))
CASES = [_case(kind, mode, shape) for kind, shapes in _KINDS for mode in _MODES for shape in shapes]
