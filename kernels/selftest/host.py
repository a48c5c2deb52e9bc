"""What can be checked of the 4-bit path without a GPU: layout, codes and packed product against CUTLASS on the host."""

import torch

from kernels import build, host_checks
from kernels.formats import minifloat, nibbles, scale_layout
from kernels.gemm.nvfp4 import gemm_nvfp4
from kernels.gemm.packed import operands
from kernels.selftest.gemms import exact_operand
from kernels.selftest.shapes import RAGGED
from kernels.selftest.verdicts import NOT_COMPILED, Line, judge


def checks() -> list[Line]:
    """One line each for the scale layout, the number formats and the packed GEMM."""
    unit = build.UNITS["host_checks"]
    if not build.is_built(unit) and (reason := build.cannot_build()):
        return [Line("host checks against CUTLASS", NOT_COMPILED, reason)]
    try:
        build.build(unit)
    except (RuntimeError, OSError) as error:  # the other checks of this machine still count
        return [Line("host checks against CUTLASS", NOT_COMPILED, f"failed: {str(error).splitlines()[-1]}")]
    return [_layout(), _formats(), _product()]


def _layout() -> Line:
    failures = []
    for m, n, k in RAGGED:
        for operand, rows in (("a", m), ("b", n)):
            offsets, size = host_checks.scale_layout(operand, m, n, k)
            ours = scale_layout.swizzled_offsets(rows, k // 16)
            if not torch.equal(ours, offsets) or size != scale_layout.swizzled_size(rows, k // 16):
                failures.append(f"operand {operand} of {m} x {n} x {k}")
    return judge("scale layout", failures, f"equals CUTLASS's index map for {2 * len(RAGGED)} operands")


def _formats() -> Line:
    x = torch.exp2(torch.empty(200_000).uniform_(-12, 10, generator=torch.Generator().manual_seed(0)))
    e2m1 = nibbles.encode(minifloat.round_nearest(x, minifloat.E2M1), x.signbit())
    e4m3 = minifloat.round_nearest(x, minifloat.E4M3).to(torch.float8_e4m3fn).view(torch.uint8)
    failures = [
        f"{name} by {by}: {count} of {x.numel()} codes differ"
        for name, by, ours in (("e2m1", "cutlass", e2m1), ("e2m1", "cuda", e2m1), ("ue4m3", "cutlass", e4m3))
        if (count := int((ours != host_checks.encode(x, name, by)).sum()))
    ]
    return judge("E2M1 and E4M3 rounding", failures, f"equals CUTLASS's and CUDA's converters on {x.numel()} numbers")


def _product() -> Line:
    failures = []
    for m, n, k in RAGGED:
        a, b = exact_operand(m, k, 1, "cpu"), exact_operand(n, k, 2, "cpu")
        left, right = operands.prepare(a), operands.prepare(b, scale_layout.COLUMN_MULTIPLE)
        host = host_checks.reference_gemm(left.codes, left.scales, right.codes, right.scales, 1.0)[:, :n]
        if not torch.equal(host, gemm_nvfp4(a, b, 1.0, torch.float32)):
            failures.append(f"{m} x {n} x {k}")
    return judge(
        "packed operands", failures, f"CUTLASS's host GEMM gives our product, bit for bit, {len(RAGGED)} shapes"
    )
