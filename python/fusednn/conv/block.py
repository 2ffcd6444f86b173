"""The depthwise-separable block of MobileNets and EfficientNets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import has_torch_function

from ..core import dispatch, native
from ..core.tensors import HALVES, accumulation_dtype
from ..core.transforms import autocast, may_need_backward, under_transform
from . import batch_norm, checks, eligibility, functional, ops, shortcut

_ACTIVATION_MODULES: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
}
_CHILDREN = ("depthwise", "norm1", "activation1", "pointwise", "norm2", "activation2")


class DepthwiseSeparableConv2d(nn.Module):
    r"""Depthwise convolution, norm, activation, 1×1 convolution, norm, activation, residual, as one.

    ``out = act2(norm2(pointwise(act1(norm1(depthwise(input)))))) + (input if residual else 0)``
    (Howard et al. 2017; without the last activation: Sandler et al. 2018).

    The children are torch's own layers, ``depthwise``, ``norm1``, ``activation1``, ``pointwise``, ``norm2``,
    ``activation2``, and hold all parameters and buffers; those left out are None. In inference the norms are
    folded into the weights and everything is one pass; in training the batch's statistics are gathered on the
    way, and running statistics updated as ``nn.BatchNorm2d`` does. A block with a child that is hooked, of
    another class (``SyncBatchNorm``, a parametrized or quantized convolution, another norm or activation) or
    called under a ``torch.func`` transform calls its children one by one; ``fusednn.explain`` says so.

    Args:
        in_channels: C.
        out_channels: C'.
        kernel_size: of the depthwise convolution, an int or a pair, like the next three.
        stride: as in ``nn.Conv2d``.
        padding: as in ``nn.Conv2d``.
        dilation: as in ``nn.Conv2d``.
        multiplier: filters for each channel, m.
        bias: of both convolutions; None: where no norm follows.
        padding_mode: as in ``nn.Conv2d``.
        norm: makes norm1 from a number of channels; None for none.
        activation: name of the first activation, as in :class:`fusednn.DepthwiseConv2d`.
        pointwise_norm: makes norm2.
        pointwise_activation: name of the second activation.
        residual: add the input to the result: ``in_channels`` must be ``out_channels``, the stride 1.
        device: of the parameters.
        dtype: of the parameters.

    Shapes:
        input ``[N, C, H, W]``, without norms also ``[C, H, W]``; returns ``[N, C', H', W']``.

    Raises:
        ValueError: the options contradict each other; in training, one value per channel.
        RuntimeError: a size, dtype or device does not fit, as torch's own layers word it.
    """

    depthwise: nn.Conv2d
    norm1: nn.Module | None
    activation1: nn.Module | None
    pointwise: nn.Conv2d
    norm2: nn.Module | None
    activation2: nn.Module | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        *,
        multiplier: int = 1,
        bias: bool | None = None,
        padding_mode: Any = "zeros",
        norm: Callable[..., nn.Module] | None = nn.BatchNorm2d,
        activation: str | None = "relu6",
        pointwise_norm: Callable[..., nn.Module] | None = nn.BatchNorm2d,
        pointwise_activation: str | None = "relu6",
        residual: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        hidden = in_channels * multiplier
        factory = {k: v for k, v in (("device", device), ("dtype", dtype)) if v is not None}
        depthwise = nn.Conv2d(
            in_channels,
            hidden,
            kernel_size,
            stride,
            padding,
            dilation,
            groups=in_channels,
            bias=norm is None if bias is None else bias,
            padding_mode=padding_mode,
            **factory,
        )
        pointwise = nn.Conv2d(
            hidden, out_channels, 1, bias=pointwise_norm is None if bias is None else bias, **factory
        )
        self._adopt(
            depthwise,
            None if norm is None else norm(hidden, **factory),
            _activation_module("activation", activation),
            pointwise,
            None if pointwise_norm is None else pointwise_norm(out_channels, **factory),
            _activation_module("pointwise_activation", pointwise_activation),
            residual,
        )

    @classmethod
    def from_modules(
        cls,
        depthwise: nn.Conv2d,
        norm1: nn.Module | None,
        activation1: nn.Module | None,
        pointwise: nn.Conv2d,
        norm2: nn.Module | None,
        activation2: nn.Module | None,
        *,
        residual: bool = False,
    ) -> DepthwiseSeparableConv2d:
        """Make a block of existing modules, which it shares: the same objects become its children.

        Raises:
            TypeError: a convolution is no ``nn.Conv2d``, or another argument neither a module nor None.
            ValueError: the convolutions are not depthwise and 1×1 or don't fit each other, or there is no
                place for a residual.
        """
        block = cls.__new__(cls)
        block._adopt(depthwise, norm1, activation1, pointwise, norm2, activation2, residual)
        return block

    def _adopt(self, *children_and_residual: Any) -> None:
        *children, residual = children_and_residual
        named = dict(zip(_CHILDREN, children, strict=True))
        eligibility.check_children(named, residual)
        super().__init__()
        for name, child in named.items():
            self.register_module(name, child)
        modes = {child.training for child in children if child is not None}
        self.training = modes != {False}
        self.residual = residual
        self._shortcut = shortcut.Shortcut()

    def forward(self, input: Tensor) -> Tensor:
        """Return the block's result."""
        children = {name: self._modules[name] for name in _CHILDREN}
        if shortcut.applies(input):
            out = self._plain(input, children)
            if out is not None:
                return out
        reasons = eligibility.against_children(children)
        sources = () if reasons else self._sources()
        if not reasons and under_transform(input, *sources):
            reasons = ["a torch.func transform or forward-mode AD is active, which sees torch's ops only"]
        reasons = reasons or eligibility.against_input(input, *children.values())
        reasons = reasons or self._against_folding(input, sources)
        return self._composite(input, reasons) if reasons else self._fused(input, sources)

    def _plain(self, input: Tensor, children: dict[str, nn.Module | None]) -> Tensor | None:
        """Return the result of a plain CPU call, past the dispatcher; None for any other call."""
        options = self._shortcut.options(children, self.residual)
        if options is None:
            return None
        norms = (eligibility.norm_of(self.norm1), eligibility.norm_of(self.norm2))
        batch_norms, sources = self._batch_norms(), self._sources()
        if has_torch_function((input, *sources)):
            return None
        recorded = may_need_backward(input, *sources)
        cpu, depthwise, pointwise = native.extension.cpu, self.depthwise, self.pointwise
        if batch_norms == norms and (recorded or any(norms)):
            function = cpu.try_separable_training
        elif not recorded and not any(batch_norms):
            function = cpu.try_separable_inference
        else:
            return None
        norm1, norm2 = map(shortcut.batch_norm_fields, norms, map(bool, batch_norms))
        first, second = (depthwise.weight, depthwise.bias), (pointwise.weight, pointwise.bias)
        return function(options, input, *first, *norm1, *second, *norm2)

    def _composite(self, input: Tensor, reasons: list[str]) -> Tensor:
        """Call the children in turn."""
        if not torch.compiler.is_compiling():
            dispatch.record_composite("depthwise_separable_conv2d", reasons)
        out = input
        for name in _CHILDREN:
            child = self._modules[name]
            out = out if child is None else child(out)
        return self._add_residual(out, input)

    def _add_residual(self, out: Tensor, input: Tensor) -> Tensor:
        if not self.residual:
            return out
        if out.shape != input.shape:
            raise RuntimeError(
                f"depthwise_separable_conv2d: residual has shape {list(input.shape)}, expected "
                f"{list(out.shape)}: choose a padding that keeps the image's size"
            )
        return out + input

    def _sources(self) -> tuple[Tensor | None, ...]:
        """Everything that the folded weights are made from."""
        found: list[Tensor | None] = []
        for conv, norm in ((self.depthwise, self.norm1), (self.pointwise, self.norm2)):
            found += (conv.weight, conv.bias)
            if type(norm) is nn.BatchNorm2d:
                found += (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        return tuple(found)

    def _fused(self, input: Tensor, sources: tuple[Tensor | None, ...]) -> Tensor:
        name, depthwise = "depthwise_separable_conv2d", self.depthwise
        kernel, padding = depthwise.weight.shape[2:], depthwise.padding
        x = input
        if depthwise.padding_mode != "zeros":
            x = F.pad(x, depthwise._reversed_padding_repeated_twice, mode=depthwise.padding_mode)
            padding = (0, 0)
        options = checks.geometry(name, kernel, depthwise.stride, padding, depthwise.dilation)
        checks.check_size(name, x, kernel, *options[1:])
        (x,) = autocast(x)
        # Under autocast the input may be wider than the result: torch's addition then decides on the dtype.
        residual = input if self.residual and input.dtype == x.dtype else None
        if residual is not None:
            checks.check_residual(name, x, depthwise.weight, self.pointwise.weight, residual, options)
        acts = (eligibility.activation_of(self.activation1), eligibility.activation_of(self.activation2))
        batch1, batch2 = self._batch_norms()
        if batch1 or batch2 or may_need_backward(input, *sources):
            weights = self._weights(x.dtype)
            out = functional.separable_training(x, weights, batch1, batch2, residual, options, acts)
        else:
            weights = self._weights(x.dtype)
            out = ops.separable_conv2d_forward(x, *weights, residual, *options, *acts)
        return out if residual is not None else self._add_residual(out, input)

    def _against_folding(self, input: Tensor, sources: tuple[Tensor | None, ...]) -> list[str]:
        """Why the frozen norms can't be folded: only the CPU's inference takes folded weights in float32."""
        norms = [eligibility.norm_of(norm) for norm in (self.norm1, self.norm2)]
        frozen = any(norm is not None and not batch_norm.uses_batch_statistics(norm) for norm in norms)
        dtype = checks.cast_dtype(input)
        if not frozen or dtype not in HALVES:
            return []
        if input.device.type != "cpu":
            return [f"a norm's frozen statistics are not folded into {dtype} on {input.device.type}"]
        if may_need_backward(input, *sources):
            return [f"a gradient is wanted, and a norm's frozen statistics are not folded into {dtype}"]
        return []

    def _batch_norms(self) -> tuple[nn.BatchNorm2d | None, nn.BatchNorm2d | None]:
        """The norms that take their statistics from the batch; None for each other one."""
        norm1, norm2 = (eligibility.norm_of(n) for n in (self.norm1, self.norm2))
        return (
            norm1 if batch_norm.uses_batch_statistics(norm1) else None,
            norm2 if batch_norm.uses_batch_statistics(norm2) else None,
        )

    def _weights(self, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """Weights and biases of both products, with those norms folded that have frozen statistics.

        With one folded all are in float32 or wider: a norm may magnify without bound what rounding loses.
        """
        found: list[Tensor | None] = []
        folds = False
        for conv, norm in ((self.depthwise, self.norm1), (self.pointwise, self.norm2)):
            norm = eligibility.norm_of(norm)
            frozen = None if batch_norm.uses_batch_statistics(norm) else norm
            folds = folds or frozen is not None
            found += batch_norm.fold(conv.weight, conv.bias, frozen)
        dtype = accumulation_dtype(dtype) if folds else dtype
        return tuple(None if t is None else t.to(dtype) for t in found)

    def extra_repr(self) -> str:
        """Say whether the input is added."""
        return "residual=True" if self.residual else ""


def _activation_module(argument: str, name: str | None) -> nn.Module | None:
    op_name = checks.activation_name("DepthwiseSeparableConv2d", argument, name)
    return None if op_name == "none" else _ACTIVATION_MODULES[op_name]()
