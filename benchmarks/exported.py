"""ONNX Runtime and OpenVINO on the ONNX export of a ``torch.nn`` module: what a user could deploy instead.

Both get float32 arithmetic, torch's number of threads and inputs that are already in their own format, so
that a call is the runtime's work alone.
"""

from __future__ import annotations

import importlib
import io
import logging
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .registry import PeerMissing

Arrange = Callable[[Mapping[str, Tensor]], tuple[Any, ...]]


class _ByName(nn.Module):
    """The module with its inputs as flat positional tensors: ONNX has no nested arguments."""

    def __init__(self, module: nn.Module, arrange: Arrange, names: tuple[str, ...]) -> None:
        super().__init__()
        self.module = module
        self.arrange = arrange
        self.names = names

    def forward(self, *tensors: Tensor) -> object:
        return self.module(*self.arrange(dict(zip(self.names, tensors))))


def _need(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise PeerMissing(f"{error.name} is not installed (pip install 'fusednn[peers]')") from error


def export_onnx(module: nn.Module, arrange: Arrange, inputs: Mapping[str, Tensor]) -> bytes:
    """Return the module, in ``eval`` mode and with static shapes, as an ONNX model.

    Raises:
        PeerMissing: onnx or onnxscript isn't installed.

    """
    _need("onnx")
    _need("onnxscript")
    flat = _ByName(module.eval(), arrange, tuple(inputs))
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the exporter reports its progress as warnings
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(flat, tuple(inputs.values()), dynamo=True, verbose=False)
    finally:
        logging.disable(level)
    assert program is not None
    return program.model_proto.SerializeToString()


def onnxruntime_call(
    module: nn.Module, arrange: Arrange, inputs: Mapping[str, Tensor]
) -> Callable[[], list[Any]]:
    """Return a call of ONNX Runtime's CPU provider that gives a list of arrays."""
    runtime = _need("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # Its threads would go on spinning after a call, on the time of the peer whose turn comes next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    model = export_onnx(module, arrange, inputs)
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feeds = dict(zip((i.name for i in session.get_inputs()), (t.numpy() for t in inputs.values())))
    return lambda: session.run(None, feeds)


def openvino_call(
    module: nn.Module, arrange: Arrange, inputs: Mapping[str, Tensor]
) -> Callable[[], list[Any]]:
    """Return a call of OpenVINO's CPU plugin that gives a list of arrays, valid until the next call."""
    openvino = _need("openvino")
    core = openvino.Core()
    model = core.read_model(io.BytesIO(export_onnx(module, arrange, inputs)))
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
        "INFERENCE_PRECISION_HINT": "f32",  # its default is bfloat16 where the CPU has it
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    feeds = [tensor.numpy() for tensor in inputs.values()]

    def call() -> list[Any]:
        return list(request.infer(feeds, share_inputs=True, share_outputs=True).values())

    return call
