"""NVFP4 GEMMs on Blackwell's 4-bit tensor cores (compute capability 10.0, 10.3, 12.0, 12.1), by csrc's CUTLASS kernels.

Other GEMMs as by cublaslt. The call is one custom operator (opaque to torch.compile, with a fake implementation); its
library is found, or built, at the first call. Kernels run on the current stream, their workspace comes from torch's
allocator, nothing synchronizes.
"""

import ctypes
import functools

import torch
from torch import Tensor

from kernels import build
from kernels.formats.nvfp4 import NVFP4Tensor
from kernels.formats.scale_layout import COLUMN_MULTIPLE
from kernels.gemm.packed import rules
from kernels.gemm.packed.contract import training_gemm, values_unavailable
from kernels.gemm.packed.operands import crop, prepare

WANTS = "packed"
OUTPUTS = {torch.bfloat16: "bf16", torch.float32: "f32"}


def unavailable() -> str | None:
    """Why these kernels can't run on the current device, or None."""
    if not torch.cuda.is_available():
        return "needs a CUDA GPU, torch sees none"
    capability = torch.cuda.get_device_capability()
    arch = rules.ARCHS.get(capability)
    if arch is None:
        known = ", ".join(f"{major}.{minor}" for major, minor in rules.ARCHS)
        return f"needs compute capability {known} (Blackwell); this is {capability[0]}.{capability[1]}"
    missing = [unit.name for unit in build.UNITS.values() if unit.arch == arch and not build.is_built(unit)]
    if missing and (reason := build.cannot_build()):
        return f"{', '.join(missing)} not built, and can't be built here: {reason}"
    return values_unavailable()


def gemm_nvfp4(a: NVFP4Tensor, b: NVFP4Tensor, alpha: Tensor, out_dtype: torch.dtype, kind: str) -> Tensor:
    """alpha * A B^T on raw operands, checked by packed.contract. `kind` does not matter."""
    left, right = prepare(a), prepare(b, COLUMN_MULTIPLE)
    d = gemm_op(left.codes, left.scales, right.codes, right.scales, alpha, out_dtype)
    return crop(d, right.rows)


gemm = training_gemm("cutlass", gemm_nvfp4)


@torch.library.custom_op("nibble::gemm_nvfp4_cutlass", mutates_args=(), device_types="cuda")
def gemm_op(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, alpha: Tensor, out_dtype: torch.dtype) -> Tensor:
    """D[M, N] from padded codes a [M, K/2], b [N, K/2], swizzled scales, and alpha (FP32 [] on the device)."""
    (m, half), n = a.shape, b.shape[0]
    d = a.new_empty(m, n, dtype=out_dtype)
    if m and n:
        properties = torch.cuda.get_device_properties(a.device)
        arch = rules.ARCHS[properties.major, properties.minor]
        name = rules.kernel_name(arch, m, n, OUTPUTS[out_dtype], properties.multi_processor_count)
        launch(name, a, a_scales, b, b_scales, alpha, d, half * 2)
    return d


@gemm_op.register_fake
def _(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, alpha: Tensor, out_dtype: torch.dtype) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=out_dtype)


@functools.cache
def library(name: str) -> ctypes.CDLL:
    """The loaded library of a unit of kernels.build, built first if the cache lacks it."""
    loaded = ctypes.CDLL(str(build.build(build.UNITS[name])))
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
    loaded.nibble_gemm_can_implement.argtypes = [integer] * 3
    loaded.nibble_gemm_workspace_bytes.argtypes = [integer] * 4
    loaded.nibble_gemm_workspace_bytes.restype = size
    loaded.nibble_gemm_run.argtypes = [*[pointer] * 6, *[integer] * 3, pointer, size, integer, integer, pointer]
    loaded.nibble_gemm_error_string.restype = ctypes.c_char_p
    return loaded


def launch(
    name: str, a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, alpha: Tensor, d: Tensor, k: int
) -> None:
    """Run kernel `name` on the current stream, into d [M, N].

    Raises ValueError for a tensor that TMA can't address and RuntimeError with CUTLASS's or CUDA's message.
    """
    tensors = {"a": a, "a_scales": a_scales, "b": b, "b_scales": b_scales, "d": d}
    for tensor_name, tensor in tensors.items():
        if tensor.data_ptr() % rules.TMA_BYTES:
            raise ValueError(f"{tensor_name} starts at an address that is not a multiple of 16 bytes; call .clone()")
    kernel = library(name)
    (m, n), device = d.shape, d.device
    sm_count = torch.cuda.get_device_properties(device).multi_processor_count
    with torch.cuda.device(device):
        workspace = torch.empty(kernel.nibble_gemm_workspace_bytes(m, n, k, sm_count), dtype=torch.uint8, device=device)
        pointers = (t.data_ptr() for t in (a, a_scales, b, b_scales, alpha, d))
        stream = torch.cuda.current_stream(device).cuda_stream
        error = kernel.nibble_gemm_run(
            *pointers, m, n, k, workspace.data_ptr(), workspace.numel(), device.index, sm_count, stream
        )
    if error:
        message = kernel.nibble_gemm_error_string(error).decode()
        raise RuntimeError(f"{name}: M={m}, N={n}, K={k} on {device}: error {error}: {message}")
