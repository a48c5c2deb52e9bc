"""cuBLASLt's matrix product with alpha and beta on the device, through ctypes.

torch.mm has no alpha on a device tensor; its FP32 output with a multiplication afterwards costs 16 to 26 % more than
BF16 output (docs/kernels.md#4-cublaslt). cuBLASLt applies a device alpha to the FP32 accumulator in the epilogue,
before the one
rounding to the output type: exactly docs/numerics.md#1-values-and-scales. The library is the one torch has loaded;
nothing is built.

cuBLASLt is column-major. For row-major out[P, Q] = left[P, k] right[k, Q] it is asked for out^T = right^T left^T: its A
is `right`, its B is `left`, m = Q, n = P. A row-major matrix is its own transpose read column-major, so an operand is
op N when its rows are contiguous and op T when its columns are (a transposed view).
"""

import ctypes
from functools import cache, lru_cache

import torch
from torch import Tensor

# cublasLt.h, cublas_api.h, library_types.h (CUDA 12 and 13 agree).
COMPUTE_32F, TYPE_32F = 68, 0
CUDA_TYPES = {
    torch.float32: TYPE_32F,
    torch.bfloat16: 14,
    torch.float8_e4m3fn: 28,
    torch.float8_e5m2: 29,
}
DESC_POINTER_MODE, DESC_TRANSA, DESC_TRANSB = 2, 3, 4
POINTER_MODE_DEVICE = 1
PREF_MAX_WORKSPACE, PREF_REDUCTION_SCHEMES, PREF_MIN_ALIGNMENT_A = 1, 3, 5
# Split-K sums in FP32 only: the scheme that adds partial sums in the output type would round to BF16 in between.
REDUCTION_IN_COMPUTE_TYPE = 2
WORKSPACE_BYTES = 32 * 2**20
MAX_ALIGNMENT = 256


class Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = [
        ("algo", ctypes.c_uint64 * 8),
        ("workspace_bytes", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


def load_library() -> ctypes.CDLL:
    """libcublasLt of the CUDA version torch was built for. Raises OSError if torch has none (CPU builds)."""
    if torch.version.cuda is None:
        raise OSError("this torch is a CPU build: it brings no libcublasLt")
    return ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.split('.')[0]}")


def check(status: int, call: str) -> None:
    """Raise RuntimeError for a cublasStatus_t other than success."""
    if status:
        raise RuntimeError(f"cuBLASLt: {call} returned status {status} (cublasStatus_t)")


@lru_cache
def handle(device_index: int) -> tuple[ctypes.CDLL, ctypes.c_void_p]:
    """(library, cublasLtHandle_t) of a device; made once, kept for the life of the process."""
    library = load_library()
    result = ctypes.c_void_p()
    with torch.cuda.device(device_index):
        check(library.cublasLtCreate(ctypes.byref(result)), "cublasLtCreate")
    return library, result


def operand(matrix: Tensor) -> tuple[bool, int]:
    """(is it a transposed view, leading dimension) of a 2-d operand as row-major storage.

    Raises ValueError unless rows or columns are contiguous.
    """
    rows, columns = matrix.shape
    row_stride, column_stride = matrix.stride()
    if column_stride == 1 and row_stride >= columns:
        return False, row_stride
    if row_stride == 1 and column_stride >= rows:
        return True, column_stride
    raise ValueError(
        f"a GEMM operand needs contiguous rows or columns; got strides {matrix.stride()}: call .contiguous()"
    )


class Algorithm:
    """Descriptors and the algorithm of one product shape: the heuristic's first choice, so the same in every run."""

    def __init__(self, library, lt, p: int, q: int, k: int, left, right, out_dtype: torch.dtype, alignment: int):
        """left, right: (dtype, transposed, leading dimension). Raises RuntimeError if cuBLASLt has no algorithm."""
        self.description = _create(library.cublasLtMatmulDescCreate, COMPUTE_32F, TYPE_32F)
        for attribute, value in (
            (DESC_POINTER_MODE, POINTER_MODE_DEVICE),
            (DESC_TRANSA, int(right[1])),
            (DESC_TRANSB, int(left[1])),
        ):
            _set(library.cublasLtMatmulDescSetAttribute, self.description, attribute, ctypes.c_int32(value))
        self.a = _layout(library, right[0], *((k, q) if right[1] else (q, k)), right[2])
        self.b = _layout(library, left[0], *((p, k) if left[1] else (k, p)), left[2])
        self.d = _layout(library, out_dtype, q, p, q)
        preference = _create(library.cublasLtMatmulPreferenceCreate)
        set_preference = library.cublasLtMatmulPreferenceSetAttribute
        _set(set_preference, preference, PREF_MAX_WORKSPACE, ctypes.c_uint64(WORKSPACE_BYTES))
        _set(set_preference, preference, PREF_REDUCTION_SCHEMES, ctypes.c_uint32(REDUCTION_IN_COMPUTE_TYPE))
        for operand_index in range(4):
            _set(set_preference, preference, PREF_MIN_ALIGNMENT_A + operand_index, ctypes.c_uint32(alignment))
        self.best, found = Heuristic(), ctypes.c_int()
        status = library.cublasLtMatmulAlgoGetHeuristic(
            lt, self.description, self.a, self.b, self.d, self.d, preference, 1, ctypes.byref(self.best),
            ctypes.byref(found),
        )  # fmt: skip
        library.cublasLtMatmulPreferenceDestroy(preference)
        if status or not found.value:
            shapes = f"[{p}, {k}] x [{k}, {q}], {left} x {right} -> {out_dtype}"
            raise RuntimeError(f"cuBLASLt has no algorithm (status {status}) for {shapes}")


def _create(function, *arguments: int) -> ctypes.c_void_p:
    result = ctypes.c_void_p()
    check(function(ctypes.byref(result), *arguments), function.__name__)
    return result


def _set(function, target: ctypes.c_void_p, attribute: int, value) -> None:
    size = ctypes.c_size_t(ctypes.sizeof(value))
    check(function(target, attribute, ctypes.byref(value), size), f"{function.__name__}({attribute})")


def _layout(library, dtype: torch.dtype, rows: int, columns: int, leading: int) -> ctypes.c_void_p:
    result = ctypes.c_void_p()
    sizes = ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(leading)
    check(library.cublasLtMatrixLayoutCreate(ctypes.byref(result), CUDA_TYPES[dtype], *sizes), "layout")
    return result


@cache
def algorithm_of(
    device_index: int, p: int, q: int, k: int, left, right, out_dtype: torch.dtype, alignment: int
) -> Algorithm:
    """The Algorithm of a shape, made at its first use."""
    return Algorithm(*handle(device_index), p, q, k, left, right, out_dtype, alignment)


@lru_cache
def constant(value: float, device: torch.device) -> Tensor:
    """FP32 [] on the device, for a beta or an alpha that never changes."""
    return torch.full((), value, dtype=torch.float32, device=device)


def _alignment(*tensors: Tensor) -> int:
    """Largest power of two, up to 256, that divides every data pointer."""
    bits = MAX_ALIGNMENT
    for tensor in tensors:
        bits |= tensor.data_ptr()
    return bits & -bits


def matmul(left: Tensor, right: Tensor, alpha: Tensor, out: Tensor, beta: float = 0.0) -> Tensor:
    """out = alpha * (left @ right) + beta * out: sums, alpha and beta in FP32, one rounding to out's dtype.

    left [P, k], right [k, Q]: BF16, or FP8 (left contiguous, right a transposed view, all dims multiples of 16), each
    row-major or a transposed view. alpha: float32 [] on the device. out: row-major [P, Q] float32 or bfloat16. beta: 0
    (out may be uninitialised) or 1. Returns out, computed on the current stream. Raises RuntimeError where cuBLASLt has
    no algorithm.
    """
    device = left.device
    library, lt = handle(device.index)
    (p, k), q = left.shape, right.shape[1]
    shapes = (left.dtype, *operand(left)), (right.dtype, *operand(right))
    chosen = algorithm_of(device.index, p, q, k, *shapes, out.dtype, _alignment(left, right, out))
    workspace = torch.empty(chosen.best.workspace_bytes, dtype=torch.uint8, device=device)
    pointers = [
        ctypes.c_void_p(tensor.data_ptr()) for tensor in (alpha, right, left, constant(beta, device), out, workspace)
    ]
    status = library.cublasLtMatmul(
        lt, chosen.description, pointers[0], pointers[1], chosen.a, pointers[2], chosen.b, pointers[3],
        pointers[4], chosen.d, pointers[4], chosen.d, ctypes.byref(chosen.best.algo), pointers[5],
        ctypes.c_size_t(chosen.best.workspace_bytes), ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream),
    )  # fmt: skip
    check(status, "cublasLtMatmul")
    return out
