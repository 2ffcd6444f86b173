// The eager shortcut of LSTM and GRU cells on CPU tensors; core/bindings/eager.h.
#include "core/bindings/eager.h"
#include "rnn/bindings/cpu.h"

namespace fusednn {
namespace {

using at::Tensor;

struct NoOptions {
  template <class Visitor>
  void visit(Visitor&) {}
};

template <class Call>
bool plain_cell(int64_t gates, const Call& a, PlainCall& call) {
  if (!call.ok() || a.input.dim() != 2 || a.weight_hh.dim() != 2) return false;
  const int64_t batch = a.input.size(0), hidden = a.weight_hh.size(1), rows = gates * hidden;
  call(a.hx, {batch, hidden});
  if constexpr (requires { a.cx; }) call(a.cx, {batch, hidden});
  call(a.weight_ih, {rows, a.input.size(1)});
  call(a.weight_hh, {rows, hidden});
  call(a.bias_ih, {rows});
  call(a.bias_hh, {rows});
  return call.ok();
}

struct LstmCell {
  static constexpr const char* name = "lstm_cell";
  static constexpr size_t inputs = 7;
  using Options = NoOptions;

  static EagerResults forward(at::TensorList t, const Options&, bool save) {
    auto [h, c, gates] =
        lstm_cell_forward({t[0], t[1], t[2], t[3], t[4], optional(t[5]), optional(t[6]), save});
    if (!save) return {{h, c}};
    // A copy of c: the caller may write into the result, as with torch's cell.
    return {{h, c}, {c.clone(), gates}};
  }

  static std::array<Tensor, inputs> backward(at::TensorList t, at::TensorList saved,
                                             const variable_list& grads,
                                             const std::array<bool, inputs>& needs, const Options&) {
    auto [input, hx, cx, weight_ih, weight_hh, bias] =
        lstm_cell_backward({optional(grads[0]),
                            optional(grads[1]),
                            t[0],
                            t[1],
                            t[2],
                            t[3],
                            t[4],
                            saved[0],
                            saved[1],
                            {needs[0], needs[1], needs[2], needs[3], needs[4], needs[5] || needs[6]}});
    return {std::move(input),     std::move(hx), std::move(cx), std::move(weight_ih),
            std::move(weight_hh), bias,          bias};
  }
};

struct GruCell {
  static constexpr const char* name = "gru_cell";
  static constexpr size_t inputs = 6;
  using Options = NoOptions;

  static EagerResults forward(at::TensorList t, const Options&, bool save) {
    auto [h, gates] = gru_cell_forward({t[0], t[1], t[2], t[3], optional(t[4]), optional(t[5]), save});
    return {{h}, {gates}};
  }

  static std::array<Tensor, inputs> backward(at::TensorList t, at::TensorList saved,
                                             const variable_list& grads,
                                             const std::array<bool, inputs>& needs, const Options&) {
    auto [input, hx, weight_ih, weight_hh, bias_ih, bias_hh] =
        gru_cell_backward({grads[0], t[0], t[1], t[2], t[3], saved[0], needs});
    return {std::move(input),     std::move(hx),      std::move(weight_ih),
            std::move(weight_hh), std::move(bias_ih), std::move(bias_hh)};
  }
};

struct LstmCall {
  Tensor input, hx, cx, weight_ih, weight_hh;
  OptionalTensor bias_ih, bias_hh;
  FUSEDNN_ARGUMENTS(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh)
};

std::optional<std::tuple<Tensor, Tensor>> try_lstm_cell(const LstmCall& a) {
  PlainCall call(a.input);
  if (!plain_cell(4, a, call)) return std::nullopt;
  const std::array<Tensor, LstmCell::inputs> tensors{
      a.input, a.hx, a.cx, a.weight_ih, a.weight_hh, or_undefined(a.bias_ih), or_undefined(a.bias_hh)};
  const variable_list out = run_eager<LstmCell>(tensors, {}, call.recorded()).outputs;
  return std::make_tuple(out[0], out[1]);
}

struct GruCall {
  Tensor input, hx, weight_ih, weight_hh;
  OptionalTensor bias_ih, bias_hh;
  FUSEDNN_ARGUMENTS(input, hx, weight_ih, weight_hh, bias_ih, bias_hh)
};

std::optional<Tensor> try_gru_cell(const GruCall& a) {
  PlainCall call(a.input);
  if (!plain_cell(3, a, call)) return std::nullopt;
  const std::array<Tensor, GruCell::inputs> tensors{
      a.input, a.hx, a.weight_ih, a.weight_hh, or_undefined(a.bias_ih), or_undefined(a.bias_hh)};
  return run_eager<GruCell>(tensors, {}, call.recorded()).outputs[0];
}

}  // namespace

FUSEDNN_BINDINGS(cpu) {
  shortcut(m, "try_lstm_cell", &try_lstm_cell);
  shortcut(m, "try_gru_cell", &try_gru_cell);
}

}  // namespace fusednn
