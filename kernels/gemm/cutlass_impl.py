"""NVFP4 GEMMs on 4-bit tensor cores by the kernels of csrc (see kernels/gemm_nvfp4); others as by cublaslt."""

from functools import partial

from kernels.gemm_nvfp4 import routing

WANTS = "packed"
unavailable = partial(routing.unavailable, "cutlass")
gemm = partial(routing.gemm, backend="cutlass")
