"""NVFP4 GEMMs on 4-bit tensor cores by the kernels of csrc (see kernels/gemm_nvfp4); others as in the reference."""

from functools import partial

from kernels.gemm_nvfp4 import BACKENDS, routing

WANTS = "packed"
unavailable = BACKENDS["cutlass"].unavailable
gemm = partial(routing.gemm, backend="cutlass")
