// Python face of the CUDA launchers of the rnn family.
//
// Device-agnostic: the tensors' device decides the guard, current_stream the stream, so that the test module,
// whose "device" is the CPU, runs exactly these checks.
#include <cuda_runtime_api.h>

#include <tuple>

#include "core/bindings/cuda_arguments.h"
#include "core/bindings/op.h"
#include "rnn/bindings/calls.h"
#include "rnn/cuda/params.h"

namespace fusednn {
namespace {

using at::Tensor;

// A call of whose tensors the first is [B, multiple * H].
class Arguments : public CheckedArguments {
 public:
  Arguments(const char* op, const char* name, const Tensor& like, int64_t multiple)
      : CheckedArguments(op, name, like) {
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

  Tensor empty_rows(int64_t multiple) const { return at::empty({batch_, multiple * hidden_}, options()); }

 private:
  int64_t batch_, hidden_;
};

const void* data(const Tensor& t) { return t.const_data_ptr(); }
const void* data(const OptionalTensor& t) { return data_or_null(t); }

std::tuple<Tensor, Tensor> lstm_gates_forward(const calls::LstmGatesForward& a) {
  const Arguments arguments("lstm_gates_forward", "gates", a.gates, 4);
  TORCH_CHECK(a.gates.is_contiguous(), "lstm_gates_forward: gates: got strides ", a.gates.strides(),
              ", expected a contiguous tensor, since it is overwritten");
  const c10::DeviceGuard guard(a.gates.device());
  const auto b_ih = arguments.bias("bias_ih", a.bias_ih, 4), b_hh = arguments.bias("bias_hh", a.bias_hh, 4);
  const auto c_prev = arguments.rows("cx", a.cx, 1);
  auto h = arguments.empty_rows(1), c = arguments.empty_rows(1);
  void* gates = a.save_gates ? a.gates.mutable_data_ptr() : const_cast<void*>(a.gates.const_data_ptr());
  launched(arguments, cuda::lstm_gates_forward({arguments.dtype(), arguments.batch(), arguments.hidden(),
                                                gates, data(b_ih), data(b_hh), data(c_prev),
                                                h.mutable_data_ptr(), c.mutable_data_ptr(), a.save_gates},
                                               current_stream(a.gates)));
  return {h, c};
}

std::tuple<Tensor, Tensor> lstm_gates_backward(const calls::LstmGatesBackward& a) {
  const Arguments arguments("lstm_gates_backward", "gates", a.gates, 4);
  const c10::DeviceGuard guard(a.gates.device());
  const auto saved = arguments.rows("gates", a.gates, 4);
  const auto d_h = arguments.rows("grad_h", a.grad_h, 1), d_c = arguments.rows("grad_c", a.grad_c, 1);
  const auto c_prev = arguments.rows("cx", a.cx, 1), c_next = arguments.rows("c", a.c, 1);
  auto grad_gates = arguments.empty_rows(4), grad_cx = arguments.empty_rows(1);
  launched(arguments,
           cuda::lstm_gates_backward(
               {arguments.dtype(), arguments.batch(), arguments.hidden(), data(d_h), data(d_c), data(saved),
                data(c_prev), data(c_next), grad_gates.mutable_data_ptr(), grad_cx.mutable_data_ptr()},
               current_stream(a.gates)));
  return {grad_gates, grad_cx};
}

std::tuple<Tensor, Tensor> gru_gates_forward(const calls::GruGatesForward& a) {
  const Arguments arguments("gru_gates_forward", "gates_x", a.gates_x, 3);
  const c10::DeviceGuard guard(a.gates_x.device());
  const auto x = arguments.rows("gates_x", a.gates_x, 3), recurrent = arguments.rows("gates_h", a.gates_h, 3);
  const auto b_ih = arguments.bias("bias_ih", a.bias_ih, 3), b_hh = arguments.bias("bias_hh", a.bias_hh, 3);
  const auto h_prev = arguments.rows("hx", a.hx, 1);
  auto h = arguments.empty_rows(1);
  auto gates = a.save_gates ? arguments.empty_rows(4) : at::empty({0}, a.gates_x.options());
  launched(arguments,
           cuda::gru_gates_forward({arguments.dtype(), arguments.batch(), arguments.hidden(), data(x),
                                    data(recurrent), data(b_ih), data(b_hh), data(h_prev),
                                    h.mutable_data_ptr(), a.save_gates ? gates.mutable_data_ptr() : nullptr},
                                   current_stream(a.gates_x)));
  return {h, gates};
}

std::tuple<Tensor, Tensor, Tensor> gru_gates_backward(const calls::GruGatesBackward& a) {
  const Arguments arguments("gru_gates_backward", "gates", a.gates, 4);
  const c10::DeviceGuard guard(a.gates.device());
  const auto saved = arguments.rows("gates", a.gates, 4);
  const auto d_h = arguments.rows("grad_h", a.grad_h, 1), h_prev = arguments.rows("hx", a.hx, 1);
  auto grad_x = arguments.empty_rows(3), grad_recurrent = arguments.empty_rows(3),
       grad_hx = arguments.empty_rows(1);
  launched(arguments,
           cuda::gru_gates_backward({arguments.dtype(), arguments.batch(), arguments.hidden(), data(d_h),
                                     data(saved), data(h_prev), grad_x.mutable_data_ptr(),
                                     grad_recurrent.mutable_data_ptr(), grad_hx.mutable_data_ptr()},
                                    current_stream(a.gates)));
  return {grad_x, grad_recurrent, grad_hx};
}

}  // namespace

FUSEDNN_BINDINGS(cuda) {
  op(m, "lstm_gates_forward", &lstm_gates_forward);
  op(m, "lstm_gates_backward", &lstm_gates_backward);
  op(m, "gru_gates_forward", &gru_gates_forward);
  op(m, "gru_gates_backward", &gru_gates_backward);
}

}  // namespace fusednn
