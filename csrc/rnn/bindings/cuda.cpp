// Python face of the CUDA launchers of the rnn family.
//
// Device-agnostic: the tensors' device decides the guard, stream_of the stream, so that the test module,
// whose "device" is the CPU, runs exactly these checks.
#include <ATen/Functions.h>
#include <c10/core/DeviceGuard.h>
#include <cuda_runtime_api.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <tuple>

#include "core/bindings/bindings.h"
#include "core/bindings/cuda_arguments.h"
#include "rnn/cuda/params.h"

namespace fusednn {
namespace {

// A call of whose tensors the first is [B, multiple * H].
class Arguments : public CudaArguments {
 public:
  Arguments(const char* op, const char* name, const at::Tensor& like, int64_t multiple)
      : CudaArguments(op, name, like) {
    TORCH_CHECK(like.dim() == 2, op, ": ", name, ": got shape ", like.sizes(), ", expected 2 dimensions");
    TORCH_CHECK(like.size(1) % multiple == 0, op, ": ", name, ": got shape ", like.sizes(),
                ", expected a multiple of ", multiple, " columns");
    batch_ = like.size(0);
    hidden_ = like.size(1) / multiple;
  }

  int64_t batch() const { return batch_; }
  int64_t hidden() const { return hidden_; }

  template <class MaybeTensor>
  MaybeTensor rows(const char* name, const MaybeTensor& t, int64_t multiple) const {
    return dense(name, t, {batch_, multiple * hidden_});
  }

  OptionalTensor bias(const char* name, const OptionalTensor& t, int64_t multiple) const {
    return dense(name, t, {multiple * hidden_});
  }

  at::Tensor empty_rows(int64_t multiple) const { return at::empty({batch_, multiple * hidden_}, options()); }

 private:
  int64_t batch_, hidden_;
};

const void* data(const at::Tensor& t) { return t.const_data_ptr(); }
const void* data(const OptionalTensor& t) { return data_or_null(t); }

std::tuple<at::Tensor, at::Tensor> lstm_gates_forward(const at::Tensor& gates, const OptionalTensor& bias_ih,
                                                      const OptionalTensor& bias_hh, const at::Tensor& cx,
                                                      bool save_gates, StreamOf stream_of) {
  const Arguments arguments("lstm_gates_forward", "gates", gates, 4);
  TORCH_CHECK(gates.is_contiguous(), "lstm_gates_forward: gates: got strides ", gates.strides(),
              ", expected a contiguous tensor, since it is overwritten");
  const c10::DeviceGuard guard(gates.device());
  const auto b_ih = arguments.bias("bias_ih", bias_ih, 4);
  const auto b_hh = arguments.bias("bias_hh", bias_hh, 4);
  const auto c_prev = arguments.rows("cx", cx, 1);
  auto h = arguments.empty_rows(1), c = arguments.empty_rows(1);
  void* gates_data = save_gates ? gates.mutable_data_ptr() : const_cast<void*>(gates.const_data_ptr());
  arguments.succeeded(cuda::lstm_gates_forward(
      {arguments.dtype(), arguments.batch(), arguments.hidden(), gates_data, data(b_ih), data(b_hh),
       data(c_prev), h.mutable_data_ptr(), c.mutable_data_ptr(), save_gates},
      stream_of(gates)));
  return {h, c};
}

std::tuple<at::Tensor, at::Tensor> lstm_gates_backward(const OptionalTensor& grad_h,
                                                       const OptionalTensor& grad_c, const at::Tensor& gates,
                                                       const at::Tensor& cx, const at::Tensor& c,
                                                       StreamOf stream_of) {
  const Arguments arguments("lstm_gates_backward", "gates", gates, 4);
  const c10::DeviceGuard guard(gates.device());
  const auto saved = arguments.rows("gates", gates, 4);
  const auto d_h = arguments.rows("grad_h", grad_h, 1), d_c = arguments.rows("grad_c", grad_c, 1);
  const auto c_prev = arguments.rows("cx", cx, 1), c_next = arguments.rows("c", c, 1);
  auto grad_gates = arguments.empty_rows(4), grad_cx = arguments.empty_rows(1);
  arguments.succeeded(cuda::lstm_gates_backward(
      {arguments.dtype(), arguments.batch(), arguments.hidden(), data(d_h), data(d_c), data(saved),
       data(c_prev), data(c_next), grad_gates.mutable_data_ptr(), grad_cx.mutable_data_ptr()},
      stream_of(gates)));
  return {grad_gates, grad_cx};
}

std::tuple<at::Tensor, at::Tensor> gru_gates_forward(const at::Tensor& gates_x, const at::Tensor& gates_h,
                                                     const OptionalTensor& bias_ih,
                                                     const OptionalTensor& bias_hh, const at::Tensor& hx,
                                                     bool save_gates, StreamOf stream_of) {
  const Arguments arguments("gru_gates_forward", "gates_x", gates_x, 3);
  const c10::DeviceGuard guard(gates_x.device());
  const auto x = arguments.rows("gates_x", gates_x, 3), recurrent = arguments.rows("gates_h", gates_h, 3);
  const auto b_ih = arguments.bias("bias_ih", bias_ih, 3);
  const auto b_hh = arguments.bias("bias_hh", bias_hh, 3);
  const auto h_prev = arguments.rows("hx", hx, 1);
  auto h = arguments.empty_rows(1);
  auto gates = save_gates ? arguments.empty_rows(4) : at::empty({0}, gates_x.options());
  arguments.succeeded(cuda::gru_gates_forward(
      {arguments.dtype(), arguments.batch(), arguments.hidden(), data(x), data(recurrent), data(b_ih),
       data(b_hh), data(h_prev), h.mutable_data_ptr(), save_gates ? gates.mutable_data_ptr() : nullptr},
      stream_of(gates_x)));
  return {h, gates};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> gru_gates_backward(const at::Tensor& grad_h,
                                                                  const at::Tensor& gates,
                                                                  const at::Tensor& hx, StreamOf stream_of) {
  const Arguments arguments("gru_gates_backward", "gates", gates, 4);
  const c10::DeviceGuard guard(gates.device());
  const auto saved = arguments.rows("gates", gates, 4);
  const auto d_h = arguments.rows("grad_h", grad_h, 1), h_prev = arguments.rows("hx", hx, 1);
  auto grad_x = arguments.empty_rows(3), grad_recurrent = arguments.empty_rows(3),
       grad_hx = arguments.empty_rows(1);
  arguments.succeeded(cuda::gru_gates_backward(
      {arguments.dtype(), arguments.batch(), arguments.hidden(), data(d_h), data(saved), data(h_prev),
       grad_x.mutable_data_ptr(), grad_recurrent.mutable_data_ptr(), grad_hx.mutable_data_ptr()},
      stream_of(gates)));
  return {grad_x, grad_recurrent, grad_hx};
}

}  // namespace

void bind_rnn_cuda(pybind11::module_& m, StreamOf stream_of) {
  namespace py = pybind11;
  const py::arg gates("gates"), bias_ih("bias_ih"), bias_hh("bias_hh"), cx("cx"), hx("hx"), grad_h("grad_h");
  const py::arg save_gates("save_gates");
  // wrap_* turns torch's exceptions into Python's and releases the GIL.
  m.def("lstm_gates_forward",
        torch::wrap_pybind_function_no_gil([=](const at::Tensor& gates, const OptionalTensor& bias_ih,
                                               const OptionalTensor& bias_hh, const at::Tensor& cx,
                                               bool save_gates) {
          return lstm_gates_forward(gates, bias_ih, bias_hh, cx, save_gates, stream_of);
        }),
        gates, bias_ih, bias_hh, cx, save_gates);
  m.def("lstm_gates_backward",
        torch::wrap_pybind_function_no_gil([=](const OptionalTensor& grad_h, const OptionalTensor& grad_c,
                                               const at::Tensor& gates, const at::Tensor& cx,
                                               const at::Tensor& c) {
          return lstm_gates_backward(grad_h, grad_c, gates, cx, c, stream_of);
        }),
        grad_h, py::arg("grad_c"), gates, cx, py::arg("c"));
  m.def("gru_gates_forward",
        torch::wrap_pybind_function_no_gil([=](const at::Tensor& gates_x, const at::Tensor& gates_h,
                                               const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
                                               const at::Tensor& hx, bool save_gates) {
          return gru_gates_forward(gates_x, gates_h, bias_ih, bias_hh, hx, save_gates, stream_of);
        }),
        py::arg("gates_x"), py::arg("gates_h"), bias_ih, bias_hh, hx, save_gates);
  m.def("gru_gates_backward",
        torch::wrap_pybind_function_no_gil(
            [=](const at::Tensor& grad_h, const at::Tensor& gates, const at::Tensor& hx) {
              return gru_gates_backward(grad_h, gates, hx, stream_of);
            }),
        grad_h, gates, hx);
}

}  // namespace fusednn
