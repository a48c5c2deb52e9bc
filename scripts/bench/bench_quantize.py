"""Time every Triton quantizer on one GPU: python scripts/bench/bench_quantize.py [--tune] [--json out.json]

Each line: median microseconds, bytes moved (inputs read once, outputs written once) per second, and that bandwidth as
a share of a device-to-device copy measured in the same run. --tune times all launch shapes and prints the best of each
kernel, to be copied into triton_ops.CONFIGS. Bits are checked by scripts/check/check_fast.py, not here.
"""

from __future__ import annotations  # Launch: without Triton there is none

import argparse
import itertools
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from base.terminal import one_line_on_ctrl_c

if __name__ == "__main__":
    one_line_on_ctrl_c("bench_quantize")

import torch
from torch import Tensor

from base.files import write_json
from kernels.spec import HIF4_SCALES, MXFP4_SCALES, NVFP4_SCALES, QuantSpec

try:
    from triton.testing import do_bench

    from kernels.quantize import triton_impl, triton_ops, triton_tiles
    from kernels.quantize.triton_ops import CONFIGS, Launch
except ModuleNotFoundError as error:  # --help needs no Triton
    if error.name.partition(".")[0] != "triton":
        raise

PACKED_BYTES = 0.5 + 1 / 16


@dataclass(frozen=True)
class Case:
    """One kernel (op: quantize, amax, fp8, fp8_both, unpack or plain_amax) and the bytes an element that it moves."""

    name: str
    op: str
    axis: int = 1
    rounding: str = "rtn"
    four_over_six: bool = False
    dim: int = 1
    packed_in: bool = False
    packed_out: bool = False
    grid: str = "e2m1"
    select: str = "absmax"
    scales: tuple = NVFP4_SCALES

    @property
    def bytes(self) -> float:
        read = PACKED_BYTES if self.packed_in else 2.0
        written = {"quantize": 2.0, "unpack": 2.0, "fp8": 1.0, "fp8_both": 2.0}.get(self.op, 0.0)
        return read + written + (PACKED_BYTES if self.packed_out else 0.0)

    @property
    def spec(self) -> QuantSpec:
        select = "four_over_six" if self.four_over_six else self.select
        rule = {"scale_rule": "ceil"} if self.scales == MXFP4_SCALES else {}
        return QuantSpec.resolve(self.grid, self.scales, select, self.rounding, **rule)

    @property
    def config_key(self) -> tuple[str, int] | None:
        """Which entry of triton_ops.CONFIGS it runs with; None for kernels that have a fixed shape."""
        if self.op == "quantize":
            return triton_ops.config_key(self.packed_in, self.axis, self.spec, self.dim > 1)
        return ("amax_packed" if self.packed_in else "amax", self.axis) if self.op == "amax" else None


FORWARD_FORMS = [("int4", "absmax"), ("if4", "absmax"), ("po2_mix", "absmax"), ("po4_mix", "absmax"),
                 ("sfp4", "four_over_six"), ("e2m1", "search")]  # fmt: skip
BACKWARD_FORMS = [form for form in FORWARD_FORMS if form[1] != "search"]
CASES = [
    Case("x fprop: rtn 4/6, values + packed", "quantize", four_over_six=True, packed_out=True),
    Case("x fprop: rtn, values + packed", "quantize", packed_out=True),
    Case("rtn axis 0", "quantize", axis=0),
    Case("dy dgrad: ms_eden rot 128", "quantize", rounding="ms_eden", dim=128),
    Case("dy wgrad: ms_eden rot 128", "quantize", axis=0, rounding="ms_eden", dim=128),
    Case("x wgrad: ms_eden rot 128 from packed", "quantize", axis=0, rounding="ms_eden", dim=128, packed_in=True),
    Case("dy dgrad: sr rot 128", "quantize", rounding="sr", dim=128),
    Case("dy wgrad: sr rot 128", "quantize", axis=0, rounding="sr", dim=128),
    Case("x wgrad: sr rot 128 from packed", "quantize", axis=0, rounding="sr", dim=128, packed_in=True),
    *(
        Case(f"x fprop: {grid} {select}, values + packed", "quantize", packed_out=True, grid=grid, select=select)
        for grid, select in FORWARD_FORMS
    ),
    *(
        Case(
            f"dy {gemm}: {grid} {select} ms_eden rot 128",
            "quantize",
            axis,
            "ms_eden",
            dim=128,
            grid=grid,
            select=select,
        )
        for grid, select in BACKWARD_FORMS
        for gemm, axis in (("dgrad", 1), ("wgrad", 0))
    ),
    *(Case(f"dy mxfp4 ceil sr rot 64 axis {a}", "quantize", a, "sr", dim=64, scales=MXFP4_SCALES) for a in (1, 0)),
    *(Case(f"dy hif4 rot 64 axis {a}", "quantize", a, dim=64, grid="hif4", scales=HIF4_SCALES) for a in (1, 0)),
    Case("amax rotated axis 1", "amax", axis=1, dim=128),
    Case("amax rotated axis 0", "amax", axis=0, dim=128),
    Case("amax rotated both axes", "amax", axis=2, dim=128),
    Case("amax rotated axis 0 from packed", "amax", axis=0, dim=128, packed_in=True),
    Case("amax, no rotation (Inductor)", "plain_amax"),
    Case("fp8 e4m3 axis 1", "fp8"),
    Case("fp8 e4m3 axis 0 (transposing)", "fp8", axis=0),
    Case("fp8 e4m3 both axes", "fp8_both"),
    Case("values from packed", "unpack", packed_in=True),
    Case("values from packed, transposed", "unpack", axis=0, packed_in=True),
]


def operands(rows: int, columns: int) -> dict[str, Tensor]:
    """Source tensors on the GPU; random, since constant data can run faster."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    x = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16, generator=generator)
    rng, layer = torch.tensor([1234, 5, 0], device="cuda"), torch.tensor(3, device="cuda")
    signs = triton_impl.rht_signs(rng, layer, 2, 128, False)
    amax = x.abs().amax().float() * 4
    first = triton_ops.launch_quantize(
        x, None, None, amax, None, None, None, 1, QuantSpec.resolve("e2m1", NVFP4_SCALES).key, 0, False, True
    )
    return dict(x=x, rng=rng, layer=layer, signs=signs, amax=amax, codes=first[2], scales=first[3], outer=first[1])


def call(case: Case, o: dict[str, Tensor]):
    """Launch the case once."""
    source = (o["codes"], o["scales"]) if case.packed_in else (o["x"], None)
    signs = o["signs"][: case.dim] if case.dim > 1 else None
    if case.op == "quantize":
        return triton_ops.launch_quantize(
            *source, o["outer"], o["amax"], signs, o["rng"], o["layer"], case.axis, case.spec.key, 4, True,
            case.packed_out,
        )  # fmt: skip
    if case.op == "amax":
        return triton_ops.launch_amax(*source, *(signs if case.axis in (a, 2) else None for a in (0, 1)))
    if case.op == "fp8":
        return torch.ops.nibble.quantize_fp8(o["x"], o["amax"], case.axis, 448.0, False, False, True)
    if case.op == "fp8_both":
        return triton_tiles.launch_fp8_both(o["x"], o["amax"], 448.0, False, True)
    if case.op == "unpack":
        return torch.ops.nibble.unpack_values(*source, case.axis)
    return compiled_amax(o["x"])


@torch.compile
def compiled_amax(x: Tensor) -> Tensor:
    return x.abs().amax(-1).amax().to(torch.float32)


def candidates(case: Case) -> list[Launch]:
    """Launch shapes that --tune tries; those that don't fit in registers or shared memory fail and are skipped."""
    if case.config_key[0].endswith("_rows"):
        return [
            Launch(b, w, 1, 1, r) for b in (64, 128, 256, 512) for w in (2, 4, 8) if b >= 32 * w for r in (None, 64)
        ]
    if case.op == "amax":
        tiles, stages, limits = ((128,) if case.axis == 2 else (64, 128, 256)), (2, 3, 4), (None,)
    else:
        tiles, stages, limits = (64, 128), (1, 2, 3), (None, 128, 96)
    shapes = itertools.product(tiles, (4, 8), stages, (1, 2, 3, 4, 5), limits)
    return [Launch(*shape) for shape in shapes if not (case.op == "quantize" and shape[:2] == (128, 4))]


def precompile(job: tuple[Case, Launch]) -> None:
    """In a worker process: fill Triton's cache, so that the timing process only loads."""
    case, config = job
    try:
        o = operands(256, 256)
        with patch.dict(CONFIGS, {case.config_key: config}):
            call(case, o)
        torch.cuda.synchronize()
    except Exception as error:  # any failure means: not a candidate; the timing loop reports it
        print(f"{case.name} {config}: {type(error).__name__}", flush=True)


def tune(cases: list[Case], o: dict[str, Tensor], workers: int) -> dict[str, list[tuple[float, Launch]]]:
    """Median microseconds of every candidate of each case, best first; a candidate is in CONFIGS while it runs."""
    jobs = {(case, replace(c, programs=1)) for case in cases for c in candidates(case)}
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(precompile, sorted(jobs, key=str), chunksize=2))
    results = {}
    for case in cases:
        timed = []
        for config in candidates(case):
            try:
                with patch.dict(CONFIGS, {case.config_key: config}):
                    timed.append((time_us(lambda c=case: call(c, o), quick=True), config))
            except Exception:  # out of shared memory or registers
                continue
        results[case.name] = sorted(timed, key=lambda pair: pair[0])
    return results


def time_us(run, quick: bool = False) -> float:
    """Median of CUDA-event timings, the L2 cache flushed between runs (do_bench does)."""
    return do_bench(run, warmup=5 if quick else 25, rep=12 if quick else 200, return_mode="median") * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=65536)
    parser.add_argument("--columns", type=int, default=1024)
    parser.add_argument("--tune", action="store_true", help="time every launch shape (about 5 minutes on 16 cores)")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--workers", type=int, default=14, help="processes that compile for --tune")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_quantize needs a CUDA GPU; on a CPU, tests/kernels checks values and compilation")
    o = operands(args.rows, args.columns)
    elements = args.rows * args.columns
    copy = torch.empty_like(o["x"])
    copy_us = time_us(lambda: copy.copy_(o["x"]))
    bandwidth = 4 * elements / copy_us
    cases = [case for case in CASES if args.only in case.name]
    print(f"{torch.cuda.get_device_name()}, [{args.rows}, {args.columns}] BF16; copy {copy_us:.0f} us, "
          f"{bandwidth / 1e6:.2f} TB/s")  # fmt: skip
    tuned = tune([case for case in cases if case.config_key], o, args.workers) if args.tune else {}
    rows = [measure(case, o, elements, bandwidth, tuned.get(case.name)) for case in cases]
    if args.json:
        write_json(args.json, {"copy_us": copy_us, "device": torch.cuda.get_device_name(), "rows": rows})


def measure(case: Case, o: dict[str, Tensor], elements: int, bandwidth: float, tuned: list | None) -> dict:
    """Time one case with its default launch and print its line, with the best launches after --tune."""
    us = time_us(lambda: call(case, o))
    share = case.bytes * elements / us / bandwidth
    print(f"{case.name:40} {us:7.1f} us {case.bytes * elements / us / 1e6:6.2f} TB/s {share:6.1%} of copy  "
          f"{CONFIGS[case.config_key] if case.config_key else ''}")  # fmt: skip
    for best_us, config in (tuned or [])[:4]:
        print(f"{'':10} {best_us:7.1f} us {case.bytes * elements / best_us / bandwidth:6.1%}  {config}")
    top = [(best_us, config.__dict__) for best_us, config in tuned or []]
    return {"case": case.name, "us": us, "bytes_an_element": case.bytes, "share_of_copy": share, "tuned": top}


if __name__ == "__main__":
    main()
