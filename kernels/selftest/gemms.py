"""NVFP4 GEMM back ends against the emulated product.

Two questions for each shape. Exact: with small integer operands every partial sum is a multiple of 1/4 below 2^22,
exact in FP32 in any order, so the result must be equal bit for bit; one misplaced scale or code shows. Random: with
quantized Gaussian operands the difference must stay within the error of two FP32 sums.
"""

import torch
from torch import Tensor

from kernels import build, sass
from kernels.formats.nvfp4 import NVFP4Tensor
from kernels.gemm.nvfp4 import BACKENDS, gemm_nvfp4
from kernels.gemm.packed import rules
from kernels.quantize import reference_impl
from kernels.selftest.verdicts import NOT_COMPILED, NOT_HERE, NOT_RUN, Line, judge
from kernels.spec import NVFP4_BLOCK, NVFP4_SCALES, QuantSpec

RTN = QuantSpec.resolve("e2m1", NVFP4_SCALES)
# One FP32 addition in a tensor core may truncate: an error of at most one unit in the last place, 2^-23.
ADDITION_ERROR = 2.0**-23
BF16_ERROR = 2.0**-8


def exact_operand(rows: int, k: int, seed: int, device: str) -> NVFP4Tensor:
    """Random codes and block scales from 1, 2, 4: values are multiples of 1/2 up to 24."""
    generator = torch.Generator(device).manual_seed(seed)
    codes = torch.randint(0, 256, (rows, k // 2), generator=generator, device=device, dtype=torch.uint8)
    exponents = torch.randint(0, 3, (rows, k // NVFP4_BLOCK), generator=generator, device=device)
    scales = torch.exp2(exponents.to(torch.float32)).to(torch.float8_e4m3fn)
    return NVFP4Tensor(codes, scales, torch.ones((), device=device))


def random_operand(rows: int, k: int, seed: int, device: str) -> NVFP4Tensor:
    """Gaussian numbers, rounded to nearest NVFP4."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(rows, k, generator=generator, device=device).to(torch.bfloat16)
    amax = reference_impl.amax(x, 1, None, False)
    return reference_impl.quantize(x, RTN, 1, amax, None, None, ("packed",)).packed


def bound(a: NVFP4Tensor, b: NVFP4Tensor, d: Tensor, alpha_const: float) -> Tensor:
    """How far two right results may differ: two sums of K products, K ulp of sum |a||b| each, and the last rounding."""
    left, right = a.values().abs(), b.values().abs()
    if left.is_cuda:
        magnitude = torch.mm(left.bfloat16(), right.bfloat16().t(), out_dtype=torch.float32)
    else:
        magnitude = left @ right.t()
    magnitude = magnitude * (a.global_scale * b.global_scale * alpha_const)
    rounding = BF16_ERROR * d.abs().float() if d.dtype == torch.bfloat16 else 0.0
    return 2 * (a.shape[1] + 1) * ADDITION_ERROR * magnitude + rounding


def check_shape(backend: str, m: int, n: int, k: int, kind: str, device: str) -> tuple[list[str], float]:
    """(failures, largest share of the bound that was used) of one shape, both output types."""
    failures, used = [], 0.0
    where = f"{kind} M={m} N={n} K={k}"
    for out_dtype in (torch.bfloat16, torch.float32):
        a, b = exact_operand(m, k, 1, device), exact_operand(n, k, 2, device)
        d = gemm_nvfp4(a, b, 1.0, out_dtype, kind, backend)
        expected = gemm_nvfp4(a, b, 1.0, out_dtype, kind, "packed_emulated")
        if wrong := int((d != expected).sum()):
            first = (d != expected).nonzero()[0].tolist()
            failures.append(f"{where} {out_dtype} exact: {wrong} of {d.numel()} differ, first at {first}")
        a, b = random_operand(m, k, 3, device), random_operand(n, k, 4, device)
        d = gemm_nvfp4(a, b, 1 / 128, out_dtype, kind, backend)
        expected = gemm_nvfp4(a, b, 1 / 128, out_dtype, kind, "packed_emulated")
        share = float(((d.float() - expected.float()).abs() / bound(a, b, expected, 1 / 128)).nan_to_num(0.0).max())
        used = max(used, share)
        if not share <= 1 or not bool(d.isfinite().all()):
            failures.append(f"{where} {out_dtype}: {share:.2f} of the FP32 summation bound")
    return failures, used


def check_backend(backend: str, shapes: list[tuple[str, int, int, int]], device: str) -> Line:
    """One line for a back end of gemm_nvfp4 over (kind, M, N, K) shapes."""
    name = f"gemm_nvfp4 {backend}"
    if reason := BACKENDS[backend].unavailable():
        return Line(name, NOT_HERE, reason)
    failures, used = [], 0.0
    for kind, m, n, k in shapes:
        try:
            wrong, share = check_shape(backend, m, n, k, kind, device)
        except RuntimeError as error:  # a kernel that fails on one shape must not hide the verdict on the others
            wrong, share = [f"{kind} M={m} N={n} K={k}: {error}"], 0.0
        failures += wrong
        used = max(used, share)
    return judge(name, failures, f"{len(shapes)} shapes exact and random; at most {used:.1e} of the FP32 bound used")


def compiled_kernels() -> list[Line]:
    """One line for each kernel of csrc that can't run here: whether it is compiled, its tensor-core instructions."""
    present = None
    if torch.cuda.is_available():
        present = rules.ARCHS.get(torch.cuda.get_device_capability())
    return [_compiled(unit, present) for unit in build.UNITS.values() if unit.arch not in ("host", present)]


def _compiled(unit: build.Unit, present: str | None) -> Line:
    if not build.is_built(unit):
        reason = build.cannot_build() or f"python -m kernels.build --arch {unit.arch} compiles it (a minute, 5 GB)"
        return Line(unit.name, NOT_COMPILED, reason)
    try:
        count = f"{sass.block_scaled_count(build.library_path(unit), unit.arch)} x {sass.BLOCK_SCALED[unit.arch]}"
    except RuntimeError as error:
        count = f"instructions not counted: {error}"
    return Line(unit.name, NOT_RUN, f"needs sm_{unit.arch}; {count}")
