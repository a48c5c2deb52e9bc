// B200, B300 (sm_100f), a pair of SMs shares each tile, 256x256x256, BF16 out: the shape of large training GEMMs.
#include "nvfp4_gemm.cuh"

using Instance = nibble::Nvfp4Gemm<cutlass::arch::Sm100, cute::Shape<cute::_256, cute::_256, cute::_256>, cute::Shape<cute::_2, cute::_1, cute::_1>,
                                   cutlass::gemm::KernelTmaWarpSpecialized2SmNvf4Sm100,
                                   cutlass::epilogue::TmaWarpSpecialized2Sm, cutlass::bfloat16_t>;
NIBBLE_NVFP4_GEMM_INSTANCE(Instance)
