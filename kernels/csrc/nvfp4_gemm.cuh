// Block-scaled NVFP4 GEMM for Blackwell, one kernel per .cu file: D[M,N] = alpha * (A . SFA) (B . SFB)^T.
//
//   A  [M, K] e2m1, row-major, two codes a byte, the even element in the low nibble; B [N, K] the same ("TN").
//   SFA, SFB  ue4m3, one per 16 elements along K, in the 128x4 layout that kernels/formats/scale_layout.py defines:
//             offset(r, g) = ((r/128) * ceil(G/4) + g/4) * 512 + (r%32) * 16 + ((r%128)/32) * 4 + g%4,  G = K/16.
//   alpha     one float in device memory (the product of both global scales); it multiplies the FP32 accumulator, once.
//   D  [M, N] row-major, bf16 or float, rounded once from FP32. There is no C operand.
//
// Shape rule (TMA's 16-byte rows; kernels/gemm/packed/rules.py says the same and a test compares them):
//   K % 32 == 0, N % (16 / sizeof(D)) == 0, M free.
//
// The functions are plain C: no libtorch, so one build serves every torch and Python. Nothing here allocates, synchronizes,
// prints or keeps state. Compile with -DNDEBUG: with asserts on, CUTLASS aborts the process where there is no GPU.
// What each argument was checked against is written in AUDIT.md.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/detail/sm100_blockscaled_layout.hpp"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/util/packed_stride.hpp"

namespace nibble {

using Input = cutlass::nv_float4_t<cutlass::float_e2m1_t>;
constexpr int kInputAlignment = 32;  // elements: TMA moves rows in units of 16 bytes, two codes each

// Errors: 0 is success, cutlass::Status is passed on as it is, CUDA's errors are moved out of its way.
constexpr int kCudaErrorBase = 1000;
constexpr int kErrorWorkspaceTooSmall = 900;

template <class ArchTag, class Tile, class Cluster, class MainloopSchedule, class EpilogueSchedule, class Output>
struct Nvfp4Gemm {
  static constexpr int kOutputAlignment = 128 / cutlass::sizeof_bits<Output>::value;
  using OperatorClass = cutlass::arch::OpClassBlockScaledTensorOp;

  // ElementC = void: no source operand is loaded, beta stays 0.
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      ArchTag, OperatorClass, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto, float, float, void,
      cutlass::layout::RowMajor, kOutputAlignment, Output, cutlass::layout::RowMajor, kOutputAlignment,
      EpilogueSchedule>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      ArchTag, OperatorClass, Input, cutlass::layout::RowMajor, kInputAlignment, Input, cutlass::layout::ColumnMajor,
      kInputAlignment, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      MainloopSchedule>::CollectiveOp;
  // Four extents (M, N, K, batch); the last argument leaves CUTLASS's default persistent tile scheduler.
  using Kernel =
      cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue, void>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  using ScaleConfig = typename Mainloop::Sm1xxBlkScaledConfig;

  static typename Gemm::Arguments arguments(const void* a, const void* a_scales, const void* b, const void* b_scales,
                                            const float* alpha, void* d, int m, int n, int k, int device,
                                            int sm_count) {
    using Code = cutlass::float_e2m1_t;
    using Scale = cutlass::float_ue4m3_t;
    auto shape = cute::make_shape(m, n, k, 1);
    typename Gemm::Arguments args{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {m, n, k, 1},
        {static_cast<const Code*>(a), cutlass::make_cute_packed_stride(typename Kernel::StrideA{}, {m, k, 1}),
         static_cast<const Code*>(b), cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, {n, k, 1}),
         static_cast<const Scale*>(a_scales), ScaleConfig::tile_atom_to_shape_SFA(shape),
         static_cast<const Scale*>(b_scales), ScaleConfig::tile_atom_to_shape_SFB(shape)},
        {{}, nullptr, {}, static_cast<Output*>(d),
         cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, {m, n, 1})}};
    args.epilogue.thread.alpha_ptr = alpha;  // read by the kernel: no synchronization, and CUDA graphs stay valid
    args.epilogue.thread.beta = 0.0f;        // a source-less epilogue refuses anything else
    args.hw_info.device_id = device;
    args.hw_info.sm_count = sm_count;  // sm_120's scheduler would otherwise query it at every call
    return args;
  }

  static int run(typename Gemm::Arguments const& args, void* workspace, size_t workspace_bytes, cudaStream_t stream) {
    if (auto status = Gemm::can_implement(args); status != cutlass::Status::kSuccess) return static_cast<int>(status);
    if (workspace_bytes < Gemm::get_workspace_size(args)) return kErrorWorkspaceTooSmall;
    // This library has its own copy of the CUDA runtime: point it at the caller's device (torch made it current already).
    if (auto error = cudaSetDevice(args.hw_info.device_id); error != cudaSuccess) return kCudaErrorBase + error;
    Gemm gemm;
    if (auto status = gemm.initialize(args, workspace, stream); status != cutlass::Status::kSuccess)
      return static_cast<int>(status);
    return static_cast<int>(gemm.run(stream));
  }
};

}  // namespace nibble

// The C interface of one instance. Every library exports the same names: ctypes loads them with RTLD_LOCAL.
#define NIBBLE_EXPORT extern "C" __attribute__((visibility("default")))
#define NIBBLE_NVFP4_GEMM_INSTANCE(INSTANCE)                                                                           \
  NIBBLE_EXPORT int nibble_gemm_can_implement(int m, int n, int k) {                                                   \
    return static_cast<int>(INSTANCE::Gemm::can_implement(                                                             \
        INSTANCE::arguments(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, m, n, k, 0, 1)));                    \
  }                                                                                                                    \
  NIBBLE_EXPORT size_t nibble_gemm_workspace_bytes(int m, int n, int k, int sm_count) {                                \
    return INSTANCE::Gemm::get_workspace_size(                                                                         \
        INSTANCE::arguments(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, m, n, k, 0, sm_count));              \
  }                                                                                                                    \
  NIBBLE_EXPORT int nibble_gemm_run(const void* a, const void* a_scales, const void* b, const void* b_scales,          \
                                    const float* alpha, void* d, int m, int n, int k, void* workspace,                 \
                                    size_t workspace_bytes, int device, int sm_count, void* stream) {                  \
    return INSTANCE::run(INSTANCE::arguments(a, a_scales, b, b_scales, alpha, d, m, n, k, device, sm_count),           \
                         workspace, workspace_bytes, static_cast<cudaStream_t>(stream));                               \
  }                                                                                                                    \
  NIBBLE_EXPORT const char* nibble_gemm_error_string(int error) {                                                      \
    if (error == nibble::kErrorWorkspaceTooSmall) return "the workspace is smaller than nibble_gemm_workspace_bytes";  \
    if (error >= nibble::kCudaErrorBase)                                                                               \
      return cudaGetErrorString(static_cast<cudaError_t>(error - nibble::kCudaErrorBase));                             \
    return cutlassGetStatusString(static_cast<cutlass::Status>(error));                                                \
  }
