"""Which compiled kernel runs which shape: the shape rule of the instances in csrc and the choice between them.

No torch. tests/kernels/test_csrc_gemm.py compares `shape_error` with what the compiled kernels themselves answer.
"""

from kernels.formats.scale_layout import CONTRACTION_MULTIPLE, round_up

# Compute capability -> the family target whose machine code runs there. "f" code runs on the later members of its
# family too (CUDA 13.0: 100f on B200 and B300, 120f on RTX 5090, RTX PRO and GB10), "a" code on one alone.
ARCHS = {(10, 0): "100f", (10, 3): "100f", (12, 0): "120f", (12, 1): "120f"}
OUTPUT_BYTES = {"bf16": 2, "f32": 4}
TMA_BYTES = 16  # rows of every matrix that TMA moves are multiples of this
TWO_SM_TILE = 256  # the 2-SM kernel computes 256 x 256 of the result on a pair of SMs


def shape_error(m: int, n: int, k: int, output: str) -> str | None:
    """Why the kernels can't take an m x n x k GEMM with `output` "bf16" or "f32", or None: CUTLASS's can_implement."""
    columns = TMA_BYTES // OUTPUT_BYTES[output]
    if k % CONTRACTION_MULTIPLE:
        return f"K={k} must be a multiple of {CONTRACTION_MULTIPLE} (16 bytes of codes a row)"
    if n % columns:
        return f"N={n} must be a multiple of {columns} (16 bytes of {output} a row)"
    return None


def kernel_name(arch: str, m: int, n: int, output: str, sm_count: int) -> str:
    """The unit of kernels.build that computes m x n results of `output` on `arch` with `sm_count` SMs.

    sm_120 has one tile. On sm_100 a pair of SMs that shares a 256 x 256 tile loads half as much of B per product, so
    it is faster as long as there is a tile for every pair; below that, half-empty, the 128 x 128 tiles of single SMs
    spread the work over four times as many units. (A rule, not a measurement: nobody here has a B200. selftest times
    both.)
    """
    if arch == "120f":
        return f"nvfp4_sm120_{output}"
    pairs_of_work = (round_up(m, TWO_SM_TILE) // TWO_SM_TILE) * (round_up(n, TWO_SM_TILE) // TWO_SM_TILE)
    sms = "2sm" if pairs_of_work >= sm_count // 2 else "1sm"
    return f"nvfp4_sm100_{sms}_{output}"
