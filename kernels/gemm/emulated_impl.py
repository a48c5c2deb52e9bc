"""The path of 4-bit tensor cores, packed operands and all, with the product itself emulated: a test on any machine."""

from functools import partial

from kernels.gemm_nvfp4 import routing

WANTS = "packed"
unavailable = partial(routing.unavailable, "emulated")
gemm = partial(routing.gemm, backend="emulated")
