// CUTLASS's and CUDA's own answers, computed on the host, for the tests that compare ours with them. No GPU is touched.
//
// Exported: CUTLASS's index map of the swizzled scales, the E2M1 and E4M3 conversions of CUTLASS and of cuda_fp4.h and
// cuda_fp8.h, and CUTLASS's host reference of the block-scaled GEMM on packed operands.
#include <cuda_fp4.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/detail/sm100_blockscaled_layout.hpp"
#include "cutlass/numeric_conversion.h"
#include "cutlass/util/packed_stride.hpp"
#include "cutlass/util/reference/host/gett.hpp"

#define NIBBLE_EXPORT extern "C" __attribute__((visibility("default")))

using ScaleConfig = cutlass::detail::Sm1xxBlockScaledConfig<16>;

namespace {
// Offset of the scale of every (row, group) in `layout`, row-major; returns the bytes that the layout spans.
template <class Layout>
int64_t dump(Layout layout, int rows, int k, int64_t* offsets) {
  for (int row = 0; row < rows; ++row)
    for (int group = 0; group < k / 16; ++group)
      offsets[int64_t(row) * (k / 16) + group] = layout(row, group * 16, 0);
  return cute::cosize(layout);
}
}  // namespace

NIBBLE_EXPORT int64_t nibble_scale_layout_a(int m, int n, int k, int64_t* offsets) {
  return dump(ScaleConfig::tile_atom_to_shape_SFA(cute::make_shape(m, n, k, 1)), m, k, offsets);
}

NIBBLE_EXPORT int64_t nibble_scale_layout_b(int m, int n, int k, int64_t* offsets) {
  return dump(ScaleConfig::tile_atom_to_shape_SFB(cute::make_shape(m, n, k, 1)), n, k, offsets);
}

// float -> code, one byte a code.
NIBBLE_EXPORT void nibble_e2m1_cutlass(const float* x, uint8_t* codes, int64_t count) {
  for (int64_t i = 0; i < count; ++i) codes[i] = cutlass::float_e2m1_t(x[i]).storage & 0xF;
}

NIBBLE_EXPORT void nibble_e2m1_cuda(const float* x, uint8_t* codes, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    codes[i] = __nv_cvt_float_to_fp4(x[i], __NV_E2M1, cudaRoundNearest) & 0xF;
}

NIBBLE_EXPORT void nibble_e4m3_cutlass(const float* x, uint8_t* codes, int64_t count) {
  for (int64_t i = 0; i < count; ++i) codes[i] = cutlass::float_e4m3_t(x[i]).storage;
}

// The unsigned type of the scales: what the tensor core reads.
NIBBLE_EXPORT void nibble_ue4m3_cutlass(const float* x, uint8_t* codes, int64_t count) {
  for (int64_t i = 0; i < count; ++i) codes[i] = cutlass::float_ue4m3_t(x[i]).storage;
}

NIBBLE_EXPORT void nibble_e4m3_cuda(const float* x, uint8_t* codes, int64_t count) {
  for (int64_t i = 0; i < count; ++i) codes[i] = __nv_cvt_float_to_fp8(x[i], __NV_SATFINITE, __NV_E4M3);
}

// code -> float.
NIBBLE_EXPORT void nibble_e2m1_decode(const uint8_t* codes, float* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] = float(cutlass::float_e2m1_t::bitcast(codes[i]));
}

NIBBLE_EXPORT void nibble_ue4m3_decode(const uint8_t* codes, float* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] = float(cutlass::float_ue4m3_t::bitcast(codes[i]));
}

// d[m, n] = alpha * sum over k of a * a_scale * b * b_scale on packed codes and swizzled scales, accumulated in FP32.
NIBBLE_EXPORT void nibble_reference_gemm(const uint8_t* a, const uint8_t* a_scales, const uint8_t* b,
                                         const uint8_t* b_scales, float alpha, float* d, int m, int n, int k) {
  using namespace cute;
  using Code = cutlass::float_e2m1_t;
  using Scale = cutlass::float_ue4m3_t;
  using StrideRows = Stride<int64_t, Int<1>, int64_t>;
  auto operand = [k](const uint8_t* codes, int rows) {
    return make_tensor(recast_ptr<Code const>(codes),
                       make_layout(make_shape(rows, k, 1),
                                   cutlass::make_cute_packed_stride(StrideRows{}, make_shape(rows, k, 1))));
  };
  auto shape = make_shape(m, n, k, 1);
  auto tensor_a = operand(a, m);
  auto tensor_b = operand(b, n);
  auto tensor_sfa = make_tensor(recast_ptr<Scale const>(a_scales), ScaleConfig::tile_atom_to_shape_SFA(shape));
  auto tensor_sfb = make_tensor(recast_ptr<Scale const>(b_scales), ScaleConfig::tile_atom_to_shape_SFB(shape));
  auto layout_d =
      make_layout(make_shape(m, n, 1), cutlass::make_cute_packed_stride(StrideRows{}, make_shape(m, n, 1)));
  auto tensor_d = make_tensor(d, layout_d);

  cutlass::reference::host::GettBlockScalingMainloopParams<float, decltype(tensor_a), decltype(tensor_sfa),
                                                           decltype(tensor_b), decltype(tensor_sfb)>
      mainloop{tensor_a, tensor_sfa, tensor_b, tensor_sfb};
  cutlass::reference::host::GettBlockScalingEpilogueParams<float, float, float, decltype(tensor_d), decltype(tensor_d)>
      epilogue{alpha, 0.0f, tensor_d, tensor_d};
  cutlass::reference::host::Gemm3x(mainloop, epilogue);
}
