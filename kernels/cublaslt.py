"""cuBLASLt's matrix product with alpha and beta on the device, through ctypes.

torch.mm has no alpha on a device tensor; its FP32 output with a multiplication afterwards costs 16 to 26 % more than
BF16 output (docs/kernels.md#4-cublaslt). cuBLASLt applies a device alpha to the FP32 accumulator in the epilogue,
before the one
rounding to the output type: exactly docs/numerics.md#1-values-and-scales. The library is the one torch has loaded;
nothing is built.

cuBLASLt is column-major. For row-major out[P, Q] = left[P, k] right[k, Q] it is asked for out^T = right^T left^T: its A
is `right`, its B is `left`, m = Q, n = P. A row-major matrix is its own transpose read column-major, so an operand is
op N when its rows are contiguous and op T when its columns are (a transposed view).

Which algorithm: the heuristic's first choice is up to 30 % slower than another one (H200, llama_30m and llama_100m: 4 %
of all GEMM time). At the first use of a shape those that it names are timed, and the fastest is taken **of those that
give the bits of the usual one**. So the clock decides no result: another run, rank or start may take another algorithm
and computes the same.
"""

import ctypes
from collections.abc import Callable
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
CANDIDATES, SAMPLED_ROWS, LEAD, REPEATS = 12, 4096, 3, 6
GAIN = 0.98  # of the usual one's time: less is noise
# Where fewer of the results are not zero (weights that begin at zero), equal bits prove nothing; tried so often.
NONZERO, TRIES = 0.5, 3


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
    """Descriptors and algorithms of one product shape: `candidates`, as the heuristic orders them, and the one to take,
    `best`; None is torch's own product."""

    def __init__(self, library, lt, p: int, q: int, k: int, left, right, out_dtype, alignment: int, plain: bool):
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
        found, results = ctypes.c_int(), (Heuristic * CANDIDATES)()
        status = library.cublasLtMatmulAlgoGetHeuristic(
            lt, self.description, self.a, self.b, self.d, self.d, preference, CANDIDATES, results, ctypes.byref(found)
        )
        library.cublasLtMatmulPreferenceDestroy(preference)
        self.candidates = [result for result in results[: found.value] if result.state == 0]
        if not (plain or self.candidates):
            shapes = f"[{p}, {k}] x [{k}, {q}], {left} x {right} -> {out_dtype}"
            raise RuntimeError(f"cuBLASLt has no algorithm (status {status}) for {shapes}")
        self.usual: Heuristic | None = None if plain else self.candidates[0]
        self.best = self.usual
        self.tries = TRIES

    def settle(self, run: Callable[[Heuristic | None], None], out: Tensor) -> None:
        """Take the fastest candidate that gives the bits of the usual one. `run` writes the product to `out`."""
        self.tries -= 1
        run(self.usual)
        if torch.count_nonzero(out) < NONZERO * out.numel():
            return
        bits, least = _some_rows(out).clone(), GAIN * _ms(run, self.usual)
        for candidate in self.candidates:
            if candidate is self.usual:
                continue
            run(candidate)
            if torch.equal(_some_rows(out), bits) and (time := _ms(run, candidate)) < least:
                self.best, least = candidate, time
        self.tries = 0


def _some_rows(out: Tensor) -> Tensor:
    """Spread over all tiles of the product: another order of summation shows in many, and there is no room for all."""
    return out[:: max(1, out.shape[0] // SAMPLED_ROWS)]


def _ms(run: Callable[[Heuristic | None], None], candidate: Heuristic | None) -> float:
    """Of the GPU: launches run ahead of it, since one from the host takes as long as a small product."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for number in range(LEAD + REPEATS):
        if number == LEAD:
            begin.record()
        run(candidate)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / REPEATS


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
    device_index: int, p: int, q: int, k: int, left, right, out_dtype: torch.dtype, alignment: int, plain: bool
) -> Algorithm:
    """The Algorithm of a shape, made at its first use. `plain`: of `mm`, whose usual one is torch's."""
    return Algorithm(*handle(device_index), p, q, k, left, right, out_dtype, alignment, plain)


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
    chosen = _chosen(left, right, out)
    if chosen.tries and beta == 0 and _may_settle(out):
        chosen.settle(lambda one: _launch(chosen, one, left, right, alpha, out, beta), out)
    _launch(chosen, chosen.best, left, right, alpha, out, beta)
    return out


def mm(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
    """torch.mm of BF16 matrices, bit for bit, by whatever is fastest."""
    out = left.new_empty((left.shape[0], right.shape[1]), dtype=out_dtype)
    chosen, one = _chosen(left, right, out, plain=True), constant(1.0, left.device)

    def run(candidate: Heuristic | None) -> None:
        if candidate is not None:
            _launch(chosen, candidate, left, right, one, out, 0.0)
        elif out_dtype == left.dtype:
            torch.mm(left, right, out=out)
        else:
            torch.ops.aten.mm.dtype_out(left, right, out_dtype, out=out)

    if chosen.tries and _may_settle(out):
        chosen.settle(run, out)
    run(chosen.best)
    return out


def _chosen(left: Tensor, right: Tensor, out: Tensor, plain: bool = False) -> Algorithm:
    (p, k), q = left.shape, right.shape[1]
    shapes = (left.dtype, *operand(left)), (right.dtype, *operand(right))
    return algorithm_of(left.device.index, p, q, k, *shapes, out.dtype, _alignment(left, right, out), plain)


def _may_settle(out: Tensor) -> bool:
    """Not while a CUDA graph is captured: nothing runs then. The steps before have settled what it needs."""
    return out.is_cuda and not torch.cuda.is_current_stream_capturing()


def _launch(
    chosen: Algorithm, best: Heuristic, left: Tensor, right: Tensor, alpha: Tensor, out: Tensor, beta: float
) -> None:
    device = left.device
    library, lt = handle(device.index)
    workspace = torch.empty(best.workspace_bytes, dtype=torch.uint8, device=device)
    pointers = [
        ctypes.c_void_p(tensor.data_ptr()) for tensor in (alpha, right, left, constant(beta, device), out, workspace)
    ]
    status = library.cublasLtMatmul(
        lt, chosen.description, pointers[0], pointers[1], chosen.a, pointers[2], chosen.b, pointers[3],
        pointers[4], chosen.d, pointers[4], chosen.d, ctypes.byref(best.algo), pointers[5],
        ctypes.c_size_t(best.workspace_bytes), ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream),
    )  # fmt: skip
    check(status, "cublasLtMatmul")
