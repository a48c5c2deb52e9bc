"""NVFP4 GEMMs by torch.nn.functional.scaled_mm (cuBLASLt): nothing to build, any GPU on which torch has NVFP4.

Other GEMMs go as by cublaslt.

Each operand brings two levels of scales: E4M3 per 1x16 in the 128x4 layout and one FP32. alpha's two global scales
and its constant are passed as A's second level, 1 as B's, so the accumulator is multiplied by the same number as
elsewhere.
"""

import torch
from torch import Tensor

from kernels.formats.nvfp4 import NVFP4Tensor
from kernels.gemm.packed.contract import training_gemm, values_unavailable
from kernels.gemm.packed.operands import crop, prepare

WANTS = "packed"
# torch asks for multiples of 16 of both extents of its second operand, more than the 8 that TMA needs.
COLUMN_MULTIPLE = 16
NVFP4_CAPABILITY = (10, 0)  # cuBLASLt has block-scaled FP4 from Blackwell on


def unavailable() -> str | None:
    """Why torch's NVFP4 GEMM can't run on the current device, or None."""
    needed = all(hasattr(torch.nn.functional, name) for name in ("scaled_mm", "ScalingType", "SwizzleType"))
    if not needed or not hasattr(torch, "float4_e2m1fn_x2"):
        return f"torch {torch.__version__} has no torch.nn.functional.scaled_mm with float4; 2.11 has"
    if not torch.cuda.is_available():
        return "needs a CUDA GPU, torch sees none"
    capability = torch.cuda.get_device_capability()
    if capability < NVFP4_CAPABILITY:
        return f"needs compute capability 10.0 or newer (Blackwell); this is {capability[0]}.{capability[1]}"
    return values_unavailable()


def gemm_nvfp4(a: NVFP4Tensor, b: NVFP4Tensor, alpha: Tensor, out_dtype: torch.dtype, kind: str) -> Tensor:
    """alpha * A B^T on raw operands, checked by packed.contract. `kind` does not matter."""
    # Imported here: torch before 2.11 may lack them, and unavailable() must still be able to say so.
    from torch.nn.functional import ScalingType, SwizzleType, scaled_mm

    left, right = prepare(a), prepare(b, COLUMN_MULTIPLE)
    levels = [ScalingType.BlockWise1x16, ScalingType.TensorWise]
    swizzles = [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE]
    d = scaled_mm(
        left.codes.view(torch.float4_e2m1fn_x2),
        right.codes.view(torch.float4_e2m1fn_x2).t(),
        [left.scales, alpha],
        levels,
        [right.scales, torch.ones_like(alpha)],
        levels,
        swizzle_a=swizzles,
        swizzle_b=swizzles,
        output_dtype=out_dtype,
    )
    return crop(d, right.rows)


gemm = training_gemm("scaled_mm", gemm_nvfp4)
