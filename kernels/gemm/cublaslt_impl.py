"""GEMMs of the emulated path on CUDA: BF16 or native FP8 tensor cores, the scales as a device alpha in the epilogue.

No transposes in BF16: fprop, dgrad and wgrad are the NT, NN and TN products of row-major tensors. Native FP8 needs
sm_89 and both operands contiguous along the contraction, which is how the Triton quantizers write float8 values; what
lies the other way is transposed first, and what has no FP8 product is widened to BF16, which is exact. FP32 operands
(rotated but unquantized) take the reference's path, scales per row an FP32 output that is multiplied afterwards.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from kernels import cublaslt
from kernels.gemm import reference_impl
from kernels.gemm.reference_impl import accumulator_scale, round_output
from kernels.quantize import Quantized

if find_spec("triton"):  # every torch for CUDA brings it; without, this module is only imported, never used
    from kernels.gemm import transpose  # noqa: F401  registers nibble::transpose_bytes

WANTS = "values"
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FP8_MULTIPLE = 16


def unavailable() -> str | None:
    """Why this back end can't run: no CUDA GPU, one older than sm_80, or no libcublasLt beside torch."""
    if not torch.cuda.is_available():
        return "needs a CUDA GPU"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"needs sm_80 or newer (BF16 tensor cores); this is sm_{major}{minor}"
    try:
        cublaslt.load_library()
    except OSError as error:
        return f"libcublasLt did not load: {error}"
    return None


def gemm(a: Quantized, b: Quantized, kind: str, alpha_const: float, out_dtype: torch.dtype) -> Tensor:
    left = a.values.t() if kind == "wgrad" else a.values
    right = b.values.t() if kind == "fprop" else b.values
    if left.shape[1] != right.shape[0]:
        raise ValueError(f"{kind}: contraction dims differ: a {tuple(a.values.shape)}, b {tuple(b.values.shape)}")
    alpha = accumulator_scale(a.scale, b.scale, kind, alpha_const)
    if torch.float32 in (left.dtype, right.dtype):
        return reference_impl.gemm(a, b, kind, alpha_const, out_dtype)
    left, right = _compatible(left, right)
    is_bf16 = left.dtype == torch.bfloat16
    if is_bf16 and alpha is None:
        # Without scales: the plain library product, so that six `none` slots are bitwise the BF16 baseline.
        return torch.ops.nibble.plain_matmul(left, right, out_dtype == torch.float32)
    if not isinstance(alpha, Tensor):
        alpha = torch.full((), 1.0 if alpha is None else alpha, dtype=torch.float32, device=left.device)
    if alpha.ndim == 0:
        return torch.ops.nibble.scaled_matmul(left, right, alpha, out_dtype == torch.float32)
    one = torch.ones((), dtype=torch.float32, device=left.device)
    return round_output(torch.ops.nibble.scaled_matmul(left, right, one, True) * alpha, out_dtype)


def _compatible(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Both FP8 in the layout and pairing that the hardware multiplies, else both BF16.

    An operand that lies the other way is transposed: a byte read and a byte written an element, where widening would
    write two and have the product read them. It happens to what fprop quantized along its own contraction.
    """
    sizes = (*left.shape, right.shape[1])
    native = (
        left.dtype in FP8
        and right.dtype in FP8
        and not left.dtype == right.dtype == torch.float8_e5m2
        and all(size % FP8_MULTIPLE == 0 for size in sizes)
    )
    if not native:
        return left.to(torch.bfloat16), right.to(torch.bfloat16)
    left = left if left.stride(1) == 1 else torch.ops.nibble.transpose_bytes(left.t())
    return left, right if right.stride(0) == 1 else torch.ops.nibble.transpose_bytes(right).t()


@torch.library.custom_op("nibble::plain_matmul", mutates_args=())
def _plain_matmul_op(left: Tensor, right: Tensor, out_fp32: bool) -> Tensor:
    left, right = _laid_out(left, right)
    return cublaslt.mm(left, right, torch.float32 if out_fp32 else torch.bfloat16)


@_plain_matmul_op.register_fake
def _(left, right, out_fp32):
    return left.new_empty((left.shape[0], right.shape[1]), dtype=torch.float32 if out_fp32 else torch.bfloat16)


def _laid_out(*matrices: Tensor) -> tuple[Tensor, ...]:
    return tuple(matrix if 1 in matrix.stride() else matrix.contiguous() for matrix in matrices)


@torch.library.custom_op("nibble::scaled_matmul", mutates_args=())
def _scaled_matmul_op(left: Tensor, right: Tensor, alpha: Tensor, out_fp32: bool) -> Tensor:
    left, right = _laid_out(left, right)
    out = left.new_empty((left.shape[0], right.shape[1]), dtype=torch.float32 if out_fp32 else torch.bfloat16)
    return cublaslt.matmul(left, right, alpha, out)


@_scaled_matmul_op.register_fake
def _(left, right, alpha, out_fp32):
    return left.new_empty((left.shape[0], right.shape[1]), dtype=torch.float32 if out_fp32 else torch.bfloat16)
