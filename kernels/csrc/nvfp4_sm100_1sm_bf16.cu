// B200, B300 (sm_100f), one SM a tile, 128x128x256, BF16 out: for outputs too small to fill the GPU with 2-SM tiles.
#include "nvfp4_gemm.cuh"

using Instance = nibble::Nvfp4Gemm<cutlass::arch::Sm100, cute::Shape<cute::_128, cute::_128, cute::_256>, cute::Shape<cute::_1, cute::_1, cute::_1>,
                                   cutlass::gemm::KernelTmaWarpSpecialized1SmNvf4Sm100,
                                   cutlass::epilogue::TmaWarpSpecialized1Sm, cutlass::bfloat16_t>;
NIBBLE_NVFP4_GEMM_INSTANCE(Instance)
