// RTX 5090, RTX PRO, GB10 (sm_120f), 128x128x128, FP32 out. The architecture has no clusters; auto is the cooperative schedule.
#include "nvfp4_gemm.cuh"

using Instance = nibble::Nvfp4Gemm<cutlass::arch::Sm120, cute::Shape<cute::_128, cute::_128, cute::_128>, cute::Shape<cute::_1, cute::_1, cute::_1>,
                                   cutlass::gemm::collective::KernelScheduleAuto,
                                   cutlass::epilogue::collective::EpilogueScheduleAuto, float>;
NIBBLE_NVFP4_GEMM_INSTANCE(Instance)
