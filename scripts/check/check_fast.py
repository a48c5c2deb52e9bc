"""Compare every Triton quantizer with the reference: python scripts/check/check_fast.py [--workers 14 | --small]

Runs on the GPU, or on a CPU under TRITON_INTERPRET=1 (use --small). All slots of the recipes, both axes, packed and
BF16 sources, the input families of docs/numerics.md#7-what-is-equal-what-is-bounded, ragged sizes. Prints the share
of codes and block scales that differ
and fails (exit code 1) where it exceeds what docs/numerics.md#7-what-is-equal-what-is-bounded allows: 0 for RTN, SR
and 4/6 without rotation, else 1e-5;
tensor scale, amax and signs always equal where no rotation precedes them.
"""

import argparse
import itertools
import math
import multiprocessing
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from base.terminal import one_line_on_ctrl_c

if __name__ == "__main__":
    one_line_on_ctrl_c("check_fast")

import torch
from torch import Tensor

from base.files import write_json
from kernels.philox import Draw
from kernels.quantize import Quantized, reference_impl
from kernels.rotation import merged, two_parts
from kernels.spec import (
    FP8_SCALES,
    HIF4_SCALES,
    MXFP4_SCALES,
    NO_CLIP_MAX,
    NVFP4_SCALES,
    NVFP4_SQUARE_SCALES,
    TENSOR_FP32,
    UE5M3_SCALES,
    QuantSpec,
)

try:
    from kernels.quantize import triton_impl
except ModuleNotFoundError as error:  # --help needs no Triton
    if error.name.partition(".")[0] != "triton":
        raise
    triton_impl = None

FOUR_SR = {"select": "four_over_six", "rounding": "sr", "target_max": NO_CLIP_MAX, "scale_cap": 256.0}
NVFP4 = {
    "rtn": {},
    "rtn_46": {"select": "four_over_six"},
    "rtn_pow2": {"tensor_scale": "pow2"},
    "sr": {"rounding": "sr"},
    "sr_46": FOUR_SR,
    "sr_8bit": {"rounding": "sr", "random_bits": 8},
    "ms_eden": {"rounding": "ms_eden"},
    "ms_eden_rotation": {"rounding": "ms_eden", "eden_block": "rotation"},
    "ms_eden_upstream": {"rounding": "ms_eden", "eden_block": "rotation", "eden_space": "scaled"},
}
SPECS = {name: QuantSpec.resolve("e2m1", NVFP4_SCALES, **fields) for name, fields in NVFP4.items()}
SQUARE = {
    "square_rtn": {},
    "square_46": {"select": "four_over_six"},
    "square_sr": {"rounding": "sr"},
    "square_sr_46_8bit": {**FOUR_SR, "random_bits": 8},
}
UNROTATED_ONLY = {
    **{name: QuantSpec.resolve("e2m1", NVFP4_SQUARE_SCALES, **fields) for name, fields in SQUARE.items()},
    "e4m3": QuantSpec.resolve("e4m3", FP8_SCALES[0]),
    "e5m2": QuantSpec.resolve("e5m2", FP8_SCALES[0]),
    "e4m3_rows": QuantSpec.resolve("e4m3", FP8_SCALES[1]),
}
NVFP4_FORMS = {
    "int4": ("int4", "absmax", "rtn"),
    "int4_sr": ("int4", "absmax", "sr"),
    "int4_eden": ("int4", "absmax", "ms_eden"),
    "if4": ("if4", "absmax", "rtn"),
    "if4_sr": ("if4", "absmax", "sr"),
    "if4_eden": ("if4", "absmax", "ms_eden"),
    "if4_46": ("if4", "four_over_six", "rtn"),
    "sfp4_46": ("sfp4", "four_over_six", "rtn"),
    "sfp4_sr": ("sfp4", "absmax", "sr"),
    "sfp4_46_eden": ("sfp4", "four_over_six", "ms_eden"),
    "po2_mix": ("po2_mix", "absmax", "rtn"),
    "po2_sr": ("po2_gauss", "absmax", "sr"),
    "po2_eden": ("po2_gauss", "absmax", "ms_eden"),
    "po4_mix": ("po4_mix", "absmax", "rtn"),
    "po4_eden": ("po4_gauss", "absmax", "ms_eden"),
    "search": ("e2m1", "search", "rtn"),
}
MXFP4 = {
    "mxfp4_floor": {},
    "mxfp4_even": {"scale_rule": "even"},
    "mxfp4_ceil": {"scale_rule": "ceil"},
    "mxfp4_rms": {"scale_rule": "rms"},
    "mxfp4_sr": {"scale_rule": "ceil", "rounding": "sr"},
    "mxfp4_prescale_sr": {"prescale": 0.75, "rounding": "sr"},
    "mxfp4_sr_8bit": {"scale_rule": "ceil", "rounding": "sr", "random_bits": 8},
    "mxfp4_macro": {"scale_rule": "ceil", "macro_bits": 5},
    "mxfp4_macro_sr": {"scale_rule": "ceil", "macro_bits": 5, "rounding": "sr"},
}
# Other forms (docs/formats.md): all but hif4 and MXFP4 also from packed codes of their own.
FORMS = {
    **{name: QuantSpec.resolve(grid, NVFP4_SCALES, *how) for name, (grid, *how) in NVFP4_FORMS.items()},
    **{name: QuantSpec.resolve("e2m1", MXFP4_SCALES, **fields) for name, fields in MXFP4.items()},
    "hif4": QuantSpec.resolve("hif4", HIF4_SCALES),
    "ue5m3": QuantSpec.resolve("e2m1", UE5M3_SCALES),
    "ue5m3_tensor_46": QuantSpec.resolve("e2m1", (TENSOR_FP32, *UE5M3_SCALES), select="four_over_six"),
    "ue5m3_sr": QuantSpec.resolve("e2m1", (TENSOR_FP32, *UE5M3_SCALES), rounding="sr"),
}
SQUARE_FORMS = {
    "square_if4": QuantSpec.resolve("if4", NVFP4_SQUARE_SCALES),
    "square_po2_sr": QuantSpec.resolve("po2_mix", NVFP4_SQUARE_SCALES, rounding="sr"),
    "square_search": QuantSpec.resolve("e2m1", NVFP4_SQUARE_SCALES, select="search"),
}
UNROTATED_ONLY |= SQUARE_FORMS
EVERY = {**SPECS, **UNROTATED_ONLY, **FORMS}
# Allowed share of differing codes or scales where a sum decides (docs/numerics.md#7-what-is-equal-what-is-bounded).
SUM_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """One comparison: which quantizer, where its input comes from, and the limit that holds."""

    spec: str
    axis: int
    rotation: int
    source: str
    family: str
    shape: tuple[int, int]

    @property
    def limit(self) -> float:
        exact = self.rotation == 1 and "eden" not in self.spec
        return 0.0 if exact else SUM_TOLERANCE


def inputs(rows: int, columns: int, device: str) -> dict[str, Tensor]:
    """The input families of docs/numerics.md#7-what-is-equal-what-is-bounded, BF16 [rows, columns]."""
    generator = torch.Generator().manual_seed(rows + columns)
    gaussian = torch.randn(rows, columns, generator=generator)
    one_hot = torch.zeros_like(gaussian)
    one_hot[rows // 2, :16] = gaussian[0, :16]
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(rows, columns // 8)
    powers = torch.exp2(torch.randint(-24, 3, (rows, columns // 16), generator=generator).float())
    # All but one element are 3.6 times 2^-9 T, the smallest scale of MS-EDEN: corrected by 0.9, every tenth becomes 0.
    vanishing = torch.ones_like(gaussian)
    vanishing[0, 0] = SPECS["ms_eden"].target_max * SPECS["ms_eden"].scale_cap * 2**9 / 3.6
    families = {
        "randn": gaussian,
        "zeros": torch.zeros_like(gaussian),
        "one_hot_block": one_hot,
        "all_equal": torch.full_like(gaussian, 0.7),
        "ties": ties * torch.where(gaussian < 0, -1.0, 1.0),
        "subnormal_scales": gaussian * powers.repeat_interleave(16, 1),
        "max_finite": gaussian.sign() * torch.finfo(torch.bfloat16).max,
        "high": gaussian.sign() * 1e36,  # of which sums over a rotation are still finite
        "tiny": gaussian * 2.0**-118,
        "gradient": gaussian * 2.0**-30,
        "vanishing": vanishing,
    }
    return {name: x.to(torch.bfloat16).to(device) for name, x in families.items()}


UNPACKED = ("tiny", "max_finite", "high")  # no source of packed codes has them
ROTATIONS = {"randn": (1, 16, 32, 64, 128), "high": (1,)}  # H200: such sums are Inf (docs/numerics.md, 7)


# MS-EDEN over a rotation block: without a rotation there is none, with one of 16 it is the group itself.
OVER_ROTATION = ("ms_eden_rotation", "ms_eden_upstream")


def cases() -> Iterator[Case]:
    """All: minutes on a GPU."""
    for shape in [(4096, 1024), (1040, 2816), (272, 144), (16, 128), (65536, 1024)]:
        families = list(inputs(16, 16, "cpu")) if shape[0] < 60000 else ["randn"]
        for axis in (0, 1):
            for family in families:
                rotations = ROTATIONS.get(family, (1, 128))
                for spec in UNROTATED_ONLY:
                    yield Case(spec, axis, 1, "bf16", family, shape)
                for spec in SPECS:
                    for rotation in rotations:
                        if shape[axis] % rotation or (spec in OVER_ROTATION and rotation == 1):
                            continue
                        for source in ("bf16", "packed"):
                            if source == "packed" and (shape[1] % 16 or family in UNPACKED):
                                continue
                            yield Case(spec, axis, rotation, source, family, shape)


def form_cases() -> Iterator[Case]:
    """Of the other forms; each quantizer of several candidates takes seconds to compile."""
    for shape in [(4096, 1024), (1040, 2816), (256, 192)]:
        families = list(inputs(16, 16, "cpu")) if shape[0] < 2000 else ["randn", "ties", "subnormal_scales"]
        for axis, (name, spec), family in itertools.product((0, 1), FORMS.items(), families):
            for rotation in (1, 64) if spec.multiple > 16 else (1, 128):
                if shape[axis] % max(rotation, spec.multiple) or rotation not in ROTATIONS.get(family, (rotation,)):
                    continue
                yield Case(name, axis, rotation, "bf16", family, shape)
                if family == "randn" and shape[1] % spec.multiple == 0:
                    yield Case(name, axis, rotation, "packed", family, shape)
                    yield Case(name, axis, rotation, "own", family, shape)


def small_cases() -> Iterator[Case]:
    """For the interpreter, which takes about half a second each. Not `tiny`: it reads subnormal BF16 wrongly."""
    shape = (32, 160)
    for axis in (0, 1):
        for spec in UNROTATED_ONLY:
            yield Case(spec, axis, 1, "bf16", "randn", shape)
        for spec in SPECS:
            for rotation in (32,) if spec in OVER_ROTATION else (1, 16):
                for source in ("bf16", "packed"):
                    yield Case(spec, axis, rotation, source, "randn", shape)
    for family in ("subnormal_scales", "gradient"):  # dead blocks lie along axis 1
        for spec in (*UNROTATED_ONLY, *SPECS):
            yield Case(spec, 1, 32 if spec in OVER_ROTATION else 1, "bf16", family, shape)
    yield Case("ms_eden", 1, 1, "bf16", "vanishing", shape)
    for axis, name in enumerate(("ms_eden", "rtn_46", "if4_eden", "search", "sfp4_46_eden")):
        yield Case(name, axis % 2, 128, "bf16", "high", (128, 128))
    yield from small_form_cases()


def small_form_cases() -> Iterator[Case]:
    """One for each way through the kernels of the other forms; test_forms_interpreted runs them all."""
    shape = (32, 192)
    for name in ("po4_mix", "sfp4_46_eden", "int4_sr", "search", "mxfp4_prescale_sr", "mxfp4_sr_8bit", "mxfp4_rms"):
        yield Case(name, 1, 1, "bf16", "subnormal_scales", shape)
    for name in ("if4_eden", "ue5m3_sr"):
        yield Case(name, 0, 16, "own", "randn", shape)
    yield Case("hif4", 0, 64, "bf16", "randn", (64, 32))
    yield Case("mxfp4_macro", 0, 1, "own", "randn", (128, 128))


def every_small_case() -> Iterator[Case]:
    """Of the other forms, for the interpreter: minutes."""
    for name, spec in FORMS.items():
        shape, rotation = ((128, 256), 64) if spec.multiple > 16 else ((32, 208), 16)
        for axis, turned in itertools.product((0, 1), (1, rotation)):
            for source in ("bf16", "packed", "own"):
                yield Case(name, axis, turned, source, "randn", shape)
        for family in inputs(16, 16, "cpu"):
            if family not in ("tiny", "randn"):  # Triton's interpreter reads subnormal BF16 wrongly
                yield Case(name, 1, 1, "bf16", family, shape)
    for name in SQUARE_FORMS:
        yield Case(name, 1, 1, "bf16", "subnormal_scales", (32, 160))


def run(case: Case, x: Tensor) -> dict[str, float]:
    """Shares of differing values: {"amax", "scale", "codes", "block_scales", "values"}."""
    spec = EVERY[case.spec]
    rng = torch.tensor([0x1234_5678_9ABC_DEF0, 7, 3], device=x.device)
    layer = torch.tensor(5, device=x.device)
    shares = {}
    signs = None
    if case.rotation > 1:
        fixed, signs = (reference_impl.rht_signs(rng, layer, 2, case.rotation, kind) for kind in (True, False))
        fast = (triton_impl.rht_signs(rng, layer, 2, case.rotation, kind) for kind in (True, False))
        shares["signs"] = max(_share(got, expected) for got, expected in zip(fast, (fixed, signs), strict=True))
    want = ("values", "packed") if spec.is_blocked else ("values",)
    if case.source != "bf16":
        first = reference_impl.amax(x, 1, None, False)
        made_by = SPECS["rtn_46"] if case.source == "packed" else spec
        x = reference_impl.quantize(x, made_by, 1, first, None, Draw(rng, layer, 1), ("packed",)).packed
        amax = [m.amax_packed(x, case.axis, signs, spec.per_row) for m in (reference_impl, triton_impl)]
        calls = [m.requantize for m in (reference_impl, triton_impl)]
    else:
        amax = [m.amax(x, case.axis, signs, spec.per_row) for m in (reference_impl, triton_impl)]
        calls = [m.quantize for m in (reference_impl, triton_impl)]
    shares["amax_ulp"] = _relative(amax[1], amax[0])
    expected, got = (call(x, spec, case.axis, amax[0], signs, Draw(rng, layer, 5), want) for call in calls)
    return shares | _compare(got, expected)


def both_axes_agree(x: Tensor, spec: QuantSpec, rotations: tuple[int, int], rounds: int = 1) -> bool:
    """Whether `quantize_both` gives bit for bit what two calls give."""
    rng, layer = torch.tensor([99, 3, 1], device=x.device), torch.tensor(2, device=x.device)
    signs = [
        rotation(rng, layer, gemm, dim, rounds) if dim > 1 else None
        for gemm, dim in zip((1, 2), rotations, strict=True)
    ]
    want = ("values", "packed")
    draws = [Draw(rng, layer, slot) for slot in (2, 4)]
    got = triton_impl.quantize_both(x, (spec, spec), tuple(signs), tuple(draws), (want, want))
    for axis, draw, sign, one in zip((1, 0), draws, signs, got, strict=True):
        largest = triton_impl.amax(x, axis, sign, spec.per_row)
        two = triton_impl.quantize(x, spec, axis, largest, sign, draw, want)
        if any(_compare(one, two).values()):
            return False
    return True


def rotation(rng: Tensor, layer: Tensor, gemm: int, dim: int, rounds: int) -> Tensor:
    """As kernels.quantize.rotation makes it, by the reference."""
    signs = reference_impl.rht_signs(rng, layer, gemm, dim if rounds == 1 else dim * 2 ** (rounds - 1), False)
    if rounds == 1:
        return signs
    matrix = merged(signs[: rounds * dim], dim)
    return matrix if rounds == 2 else two_parts(matrix)


def rounds_agree(x: Tensor, spec: QuantSpec, axis: int, dim: int, rounds: int) -> bool:
    """Whether a merged rotation gives what the reference gives, but for the order of sums."""
    rng, layer = torch.tensor([99, 3, 1], device=x.device), torch.tensor(2, device=x.device)
    matrix = rotation(rng, layer, 1, dim, rounds)
    first = reference_impl.quantize(x, SPECS["rtn_46"], 1, x.abs().amax().float(), None, None, ("packed",)).packed
    want, draw, same = ("values", "packed"), Draw(rng, layer, 4), []
    for source, measure, call in ((x, "amax", "quantize"), (first, "amax_packed", "requantize")):
        both = [reference_impl, triton_impl]
        amaxes = [getattr(module, measure)(source, axis, matrix, False) for module in both]
        same.append(_relative(amaxes[1], amaxes[0]) <= 2 * dim)
        results = [getattr(module, call)(source, spec, axis, amaxes[0], matrix, draw, want) for module in both]
        same.append(max(_compare(results[1], results[0]).values()) <= 16 / x.numel())
    return all(same)


def dequantizing_agrees(x: Tensor, spec: QuantSpec, axis: int) -> bool:
    """Whether packed x turns into the reference's values bit for bit, as row-major BF16 along either axis."""
    packed = reference_impl.quantize(x, spec, 1, x.abs().amax().float(), None, None, ("packed",)).packed
    got = triton_impl.dequantize(packed, axis).values
    return got.is_contiguous() and torch.equal(got.float(), reference_impl.dequantize(packed, axis).values.float())


def _compare(got: Quantized, expected: Quantized) -> dict[str, float]:
    shares = {"scale": _share(got.scale, expected.scale)}
    if expected.scale.isnan().all():
        return shares  # NaN or Inf in the input: codes and values are unspecified, every output is NaN
    shares["values"] = _share(got.values, expected.values)
    if expected.packed is None:
        return shares
    stored = got.values if got.values.shape == got.packed.shape else got.values.t()
    stored = stored if torch.equal(stored.float(), got.packed.values()) else got.values.t()
    shares["packed_values"] = _share(got.packed.values(), stored)
    pair = got.packed, expected.packed
    shares["codes"] = _share(*(p.levels() for p in pair))  # minus zero is zero: a tensor core gives +0 for -0
    shares["block_scales"] = _share(*(p.block_scales.view(torch.uint8) for p in pair))
    if expected.packed.members is not None:
        shares["members"] = _share(*(p.members for p in pair))
    return shares


def _share(got: Tensor, expected: Tensor) -> float:
    if got.shape != expected.shape:
        return float("inf")
    got, expected = got.float(), expected.float()
    return ((got != expected) & ~(got.isnan() & expected.isnan())).double().mean().item()


def _relative(got: Tensor, expected: Tensor) -> float:
    """Largest relative difference in units of 2^-24."""
    got, expected = got.double(), expected.double()
    return ((got - expected).abs() / expected.abs().clamp(min=1e-300)).nan_to_num().max().item() * 2**24


def verdict(case: Case, shares: dict[str, float], elements: int) -> bool:
    """Whether every share is allowed. Small tensors may have one differing block even where 1e-5 is the limit."""
    # A sum of 128 terms in FP32, in another order: 128 roundings of half an ulp at most.
    amax_limit = 128.0 if case.rotation > 1 else 0.0
    limits = {"amax_ulp": amax_limit, "signs": 0.0, "scale": 0.0, "packed_values": 0.0}
    slack = 16 / elements if case.limit else 0.0
    # Three standard errors of counting: 4096 x 1024 has 262,144 block scales, so 1e-5 of them is 2.6.
    counted = case.limit + 3 * math.sqrt(case.limit * 16 / elements) if case.limit else 0.0
    return all(share <= limits.get(name, max(counted, slack)) for name, share in shares.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="small shapes: for Triton's interpreter on a CPU")
    parser.add_argument("--forms", action="store_true", help="only other forms than FP8 and E2M1 under E4M3 scales")
    parser.add_argument("--workers", type=int, default=1, help="processes, each with some of the kernels to compile")
    parser.add_argument("--json", type=Path, help="write every comparison here")
    parser.add_argument("--verbose", action="store_true", help="print every comparison, not only the summary")
    args = parser.parse_args()
    if reason := "no module triton: pip install triton" if triton_impl is None else triton_impl.unavailable():
        print(f"the Triton back end can't run here: {reason} (or set TRITON_INTERPRET=1)")
        return 2
    kernels: dict[tuple, list[Case]] = {}
    for case in chosen_cases(args.small, args.forms):
        kernels.setdefault((case.spec, case.axis, case.source, case.rotation > 1), []).append(case)
    rows = [] if args.forms else single_rows()
    if args.workers > 1:
        # One thread each: with a pool of threads in every process 20 of them kept 32 cores busy with nothing.
        start = multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)
        with ProcessPoolExecutor(args.workers, *start) as pool:
            rows += itertools.chain(*pool.map(compare_all, kernels.values()))
    else:
        rows += compare_all(itertools.chain(*kernels.values()))
    for row in rows:
        if args.verbose or not row["ok"]:
            print({key: value for key, value in row.items() if value})
    summarize(rows)
    if args.json:
        write_json(args.json, rows)
    return 0 if all(row["ok"] for row in rows) else 1


def chosen_cases(small: bool, forms: bool) -> Iterator[Case]:
    if forms:
        return every_small_case() if small else form_cases()
    return small_cases() if small else itertools.chain(cases(), form_cases())


def compare_all(some: Iterable[Case]) -> list[dict]:
    """One row for each case, in the order of shapes, whose inputs are made once."""
    device = "cpu" if triton_impl.INTERPRET else "cuda"
    rows, families, shape = [], {}, None
    for case in sorted(some, key=lambda case: case.shape):
        if case.shape != shape:
            shape, families = case.shape, inputs(*case.shape, device)
        shares = run(case, families[case.family])
        ok = verdict(case, shares, case.shape[0] * case.shape[1])
        rows.append({**case.__dict__, "ok": ok, **shares})
    return rows


def single_rows() -> list[dict]:
    """One row for each comparison that is not of one quantizer: both axes at once, and packed operands as values."""
    x = inputs(32, 160, "cpu" if triton_impl.INTERPRET else "cuda")["randn"]
    pairs = [(spec, dims) for spec in ("rtn", "sr", "ms_eden") for dims in ((1, 1), (16, 16), (1, 16), (32, 1))]
    pairs += [(spec, (1, 1)) for spec in ("e4m3", "e5m2", "e4m3_rows", "square_rtn")]
    rows = [
        {"spec": f"both axes {spec}", "rotation": max(dims), "ok": both_axes_agree(x, EVERY[spec], dims)}
        for spec, dims in pairs
    ]
    turned = itertools.product(("rtn_46", "sr", "ms_eden"), (1, 0), (16, 32), (2, 3))
    rows += [
        {"spec": f"{rounds} rounds {spec}", "rotation": dim, "ok": rounds_agree(x, EVERY[spec], axis, dim, rounds)}
        for spec, axis, dim, rounds in turned
    ]
    rows += [
        {"spec": f"both axes {n} rounds", "rotation": dims[0], "ok": both_axes_agree(x, EVERY["ms_eden"], dims, n)}
        for n, dims in itertools.product((2, 3), ((16, 16), (32, 1)))
    ]
    unpacked = itertools.product(("rtn_46", "square_rtn"), (1, 0))
    return rows + [
        {"spec": f"values of {spec}", "rotation": 1, "ok": dequantizing_agrees(x, EVERY[spec], axis)}
        for spec, axis in unpacked
    ]


def summarize(rows: list[dict]) -> None:
    """One line for each quantizer: comparisons, failures, largest shares."""
    print(f"{'quantizer':18} {'rotation':>8} {'cases':>6} {'failed':>6}  largest share of differing")
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["spec"], "yes" if row["rotation"] > 1 else "no"), []).append(row)
    for (spec, rotated), members in groups.items():
        parts = ("amax_ulp", "scale", "block_scales", "codes", "values")
        largest = {part: max(row.get(part, 0.0) for row in members) for part in parts}
        text = "  ".join(f"{part} {value:.2g}" for part, value in largest.items())
        print(f"{spec:18} {rotated:>8} {len(members):6} {sum(not row['ok'] for row in members):6}  {text}")


if __name__ == "__main__":
    sys.exit(main())
