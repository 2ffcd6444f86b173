// Run-time choice of the instruction set. Compiled for the baseline only.
#include <atomic>

#include "attention/cpu/params.h"
#include "attention/cpu/projection_params.h"
#include "conv/cpu/params.h"
#include "core/cpu/features.h"
#include "recurrence/cpu/params.h"
#include "rnn/cpu/params.h"
#include "spatial/cpu/params.h"

namespace fusednn::cpu {

namespace baseline {
extern const RnnKernels rnn_table;
extern const ConvKernels conv_table;
extern const SpatialKernels spatial_table;
extern const AttentionLstmKernels attention_lstm_table;
extern const AttentionKernels attention_table;
extern const ProjectionKernels projection_table;
}  // namespace baseline
#if defined(FUSEDNN_HAVE_X86_ISAS)
namespace avx2 {
extern const RnnKernels rnn_table;
extern const ConvKernels conv_table;
extern const SpatialKernels spatial_table;
extern const AttentionLstmKernels attention_lstm_table;
extern const AttentionKernels attention_table;
extern const ProjectionKernels projection_table;
}  // namespace avx2
namespace avx512 {
extern const RnnKernels rnn_table;
extern const ConvKernels conv_table;
extern const SpatialKernels spatial_table;
extern const AttentionLstmKernels attention_lstm_table;
extern const AttentionKernels attention_table;
extern const ProjectionKernels projection_table;
}  // namespace avx512
#endif

const char* name(Isa isa) {
  constexpr const char* names[] = {"baseline", "avx2", "avx512"};
  return names[static_cast<int>(isa)];
}

Isa best_isa() {
#if defined(FUSEDNN_HAVE_X86_ISAS)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::baseline;
#else
  return Isa::baseline;
#endif
}

namespace {

std::atomic<Isa>& in_use() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

}  // namespace

Isa current_isa() { return in_use(); }

bool set_isa(Isa isa) {
  if (isa > best_isa()) return false;
  in_use() = isa;
  return true;
}

const RnnKernels& rnn_kernels() {
#if defined(FUSEDNN_HAVE_X86_ISAS)
  if (current_isa() == Isa::avx512) return avx512::rnn_table;
  if (current_isa() == Isa::avx2) return avx2::rnn_table;
#endif
  return baseline::rnn_table;
}

const ConvKernels& conv_kernels() {
#if defined(FUSEDNN_HAVE_X86_ISAS)
  if (current_isa() == Isa::avx512) return avx512::conv_table;
  if (current_isa() == Isa::avx2) return avx2::conv_table;
#endif
  return baseline::conv_table;
}

const SpatialKernels& spatial_kernels() {
#if defined(FUSEDNN_HAVE_X86_ISAS)
  if (current_isa() == Isa::avx512) return avx512::spatial_table;
  if (current_isa() == Isa::avx2) return avx2::spatial_table;
#endif
  return baseline::spatial_table;
}

const AttentionLstmKernels& attention_lstm_kernels() {
#if defined(FUSEDNN_HAVE_X86_ISAS)
  if (current_isa() == Isa::avx512) return avx512::attention_lstm_table;
  if (current_isa() == Isa::avx2) return avx2::attention_lstm_table;
#endif
  return baseline::attention_lstm_table;
}

const AttentionKernels& attention_kernels() {
#if defined(FUSEDNN_HAVE_X86_ISAS)
  if (current_isa() == Isa::avx512) return avx512::attention_table;
  if (current_isa() == Isa::avx2) return avx2::attention_table;
#endif
  return baseline::attention_table;
}

const ProjectionKernels& projection_kernels() {
#if defined(FUSEDNN_HAVE_X86_ISAS)
  if (current_isa() == Isa::avx512) return avx512::projection_table;
  if (current_isa() == Isa::avx2) return avx2::projection_table;
#endif
  return baseline::projection_table;
}

}  // namespace fusednn::cpu
