"""CUTLASS's and CUDA's own answers on the CPU (csrc/host_checks.cu), as torch functions: what our formats are tested
against.

Each call builds the library on first use (seconds, needs nvcc and the CUTLASS headers; RuntimeError without them).
"""

import ctypes
import functools

import torch
from torch import Tensor

from kernels import build
from kernels.formats.scale_layout import swizzled_size

# name -> the exported function that turns FP32 into codes of that format
ENCODERS = {
    ("e2m1", "cutlass"): "nibble_e2m1_cutlass",
    ("e2m1", "cuda"): "nibble_e2m1_cuda",
    ("e4m3", "cutlass"): "nibble_e4m3_cutlass",
    ("ue4m3", "cutlass"): "nibble_ue4m3_cutlass",
    ("e4m3", "cuda"): "nibble_e4m3_cuda",
}
DECODERS = {"e2m1": "nibble_e2m1_decode", "ue4m3": "nibble_ue4m3_decode"}


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build.build(build.UNITS["host_checks"])))
    for name in (*ENCODERS.values(), *DECODERS.values()):
        getattr(library, name).argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    for name in ("nibble_scale_layout_a", "nibble_scale_layout_b"):
        getattr(library, name).argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
        getattr(library, name).restype = ctypes.c_int64
    library.nibble_reference_gemm.argtypes = [
        *[ctypes.c_void_p] * 4,
        ctypes.c_float,
        ctypes.c_void_p,
        *[ctypes.c_int] * 3,
    ]
    return library


def encode(x: Tensor, format: str, by: str) -> Tensor:
    """FP32 [n] -> uint8 [n] codes of `format` ("e2m1", "e4m3", "ue4m3"), as "cutlass" or "cuda" converts them."""
    x = x.to(torch.float32).contiguous()
    codes = torch.empty(x.numel(), dtype=torch.uint8)
    getattr(_library(), ENCODERS[format, by])(x.data_ptr(), codes.data_ptr(), x.numel())
    return codes


def decode(codes: Tensor, format: str) -> Tensor:
    """uint8 [n] codes of "e2m1" or "ue4m3" -> FP32 [n], by CUTLASS."""
    codes = codes.contiguous()
    x = torch.empty(codes.numel(), dtype=torch.float32)
    getattr(_library(), DECODERS[format])(codes.data_ptr(), x.data_ptr(), codes.numel())
    return x


def scale_layout(operand: str, m: int, n: int, k: int) -> tuple[Tensor, int]:
    """CUTLASS's offsets (int64 [rows, k / 16]) of the scales of operand "a" or "b" of an m x n x k GEMM, and its
    bytes."""
    offsets = torch.empty(m if operand == "a" else n, k // 16, dtype=torch.int64)
    size = getattr(_library(), f"nibble_scale_layout_{operand}")(m, n, k, offsets.data_ptr())
    return offsets, size


def reference_gemm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, alpha: float) -> Tensor:
    """CUTLASS's host reference: alpha * A B^T in FP32 from packed codes a [M, K/2], b [N, K/2] (uint8) and swizzled
    scales.

    Slow (a plain triple loop): 512^3 takes about 0.1 s. Raises ValueError if a scale buffer has the wrong size.
    """
    (m, half), n = a.shape, b.shape[0]
    for name, rows, scales in (("a_scales", m, a_scales), ("b_scales", n, b_scales)):
        if scales.numel() != swizzled_size(rows, half // 8):
            raise ValueError(f"{name}: got {scales.numel()} bytes, need {swizzled_size(rows, half // 8)}")
    d = torch.zeros(m, n, dtype=torch.float32)  # the reference adds 0 * d: NaN if d started as garbage
    operands = [t.contiguous() for t in (a, a_scales, b, b_scales)]
    _library().nibble_reference_gemm(*(t.data_ptr() for t in operands), alpha, d.data_ptr(), m, n, half * 2)
    return d
