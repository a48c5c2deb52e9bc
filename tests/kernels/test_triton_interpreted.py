"""The Triton quantizers against the reference on a CPU, in Triton's interpreter: scripts/check/check_fast.py --small.

In a process of its own: whether kernels are interpreted is fixed when they are imported. The GPU runs all cases.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.formats.nvfp4 import NVFP4Tensor
from kernels.spec import NVFP4_SCALES, QuantSpec
from launcher import cells
from launcher.compose import compose
from quant import library
from quant.names import SLOTS
from quant.plan import Precision

pytest.importorskip("triton")
from kernels.quantize import triton_impl

EXACT = ("rtn", "rtn_46", "rtn_pow2", "sr", "sr_46", "sr_8bit", "square_rtn", "square_46", "square_sr")
EXACT += ("square_sr_46_8bit", "mxfp4_sr_8bit")
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def comparisons(tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("check") / "rows.json"
    command = [sys.executable, "scripts/check/check_fast.py", "--small", "--json", str(out)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
    assert out.exists(), result.stdout + result.stderr
    return json.loads(out.read_text())


def test_every_quantizer_agrees_with_the_reference(comparisons):
    wrong = [row for row in comparisons if not row["ok"]]
    assert not wrong, wrong[:3]


def test_all_kinds_of_slots_were_compared(comparisons):
    """Both axes, packed and BF16 sources, rotated and not, every rounding."""
    seen = {(r["spec"], r["axis"], r["source"], r["rotation"] > 1) for r in comparisons if "axis" in r}
    for spec in ("rtn", "rtn_46", "sr", "ms_eden"):
        assert {(spec, a, s, r) for a in (0, 1) for s in ("bf16", "packed") for r in (False, True)} <= seen
    assert {("square_rtn", 1, "bf16", False), ("e4m3_rows", 0, "bf16", False), ("e5m2", 1, "bf16", False)} <= seen
    over = {r["rotation"] for r in comparisons if r["spec"] in ("ms_eden_rotation", "ms_eden_upstream")}
    assert over == {32}  # two groups share a correction
    assert {"ms_eden", "rtn_46", "if4_eden", "search", "sfp4_46_eden"} == {
        r["spec"] for r in comparisons if r.get("family") == "high" and r["rotation"] == 128
    }
    for form in ("po4_mix", "sfp4_46_eden", "int4_sr", "if4_eden", "search", "mxfp4_macro", "ue5m3_sr", "hif4"):
        assert form in {r["spec"] for r in comparisons}
    for family in ("subnormal_scales", "gradient"):
        assert {"rtn", "rtn_46", "sr", "ms_eden", "ms_eden_rotation", "square_46", "e5m2"} <= {
            r["spec"] for r in comparisons if r.get("family") == family
        }


def test_no_recipe_runs_the_reference_on_a_gpu():
    """Every quantizer of every file of configs/quant and of the leaderboard's own arms has a kernel."""
    arms = cells.load("leaderboard")["axes"]["recipe"].values()
    own = [words for words in arms if any(word.startswith("quant.") for word in words)]
    assert own
    composed = (compose(["model=llama_30m", "data=text", "data.files=x", *words]).config.quant for words in own)
    for values in (*map(library.mapping, library.names()), *composed):
        recipe = Precision.from_dict(values).recipe.audited()
        if recipe is None:  # Transformer Engine's own
            continue
        for slot in SLOTS:
            operand, turned = recipe.operand(slot), recipe.gemm(slot.split(".")[0]).rotation.dim is not None
            if operand.is_quantized and operand.source != "fprop_transposed":
                assert triton_impl.supports(operand.spec, int(turned)) is None, (recipe.name, slot)


def test_without_rotation_all_but_ms_eden_agree_bit_for_bit(comparisons):
    plain = [r for r in comparisons if r["rotation"] == 1 and r["spec"] in EXACT]
    assert plain
    for row in plain:
        assert row["codes"] == row["block_scales"] == row["scale"] == row["values"] == 0, row


@pytest.mark.slow  # a minute: all forms, both axes, every family of inputs
def test_every_form_agrees_with_the_reference(tmp_path):
    out = tmp_path / "rows.json"
    command = [sys.executable, "scripts/check/check_fast.py", "--small", "--forms", "--json", str(out)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


def test_files_of_other_kernels():
    files = ["tests/kernels/test_pointwise.py", "tests/kernels/test_adamw.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0 and "29 passed" in result.stdout, result.stdout[-4000:] + result.stderr[-2000:]


def test_the_e2m1_conversion_alone_agrees_on_every_tie_and_many_numbers():
    """The arithmetic that the conversion instruction replaces on Blackwell; there, python -m kernels.selftest, which
    takes ten times as many numbers."""
    command = [sys.executable, "-c", "from kernels.selftest import conversion; print(conversion.check('cpu', 100_000))"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert "runs and right" in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize(
    "scales",
    [
        torch.ones(32, 2),  # 1x32 blocks
        torch.ones(4, 4),  # 8x16
        torch.ones(4, 32),  # transposed
        torch.ones(128),  # swizzled
        torch.ones(4, 32).t(),  # strided
        torch.ones(32, 4).to(torch.float8_e5m2),
    ],
    ids=lambda scales: f"{list(scales.shape)} {list(scales.stride())} {scales.dtype}",
)
def test_packed_operands_with_other_scales_are_refused(scales):
    scales = scales if scales.dtype == torch.float8_e5m2 else scales.to(torch.float8_e4m3fn)
    p = NVFP4Tensor(torch.zeros(32, 32, dtype=torch.uint8), scales, torch.ones(()))
    signs, spec = torch.ones(16), QuantSpec.resolve("e2m1", NVFP4_SCALES)
    for read in (
        lambda: triton_impl.dequantize(p, 1),
        lambda: triton_impl.amax_packed(p, 0, signs, False),
        lambda: triton_impl.requantize(p, spec, 0, torch.ones(()), signs, None, ("values",)),
    ):
        with pytest.raises(ValueError, match=r"packed \[32, 64\] has .*the Triton back end reads .*backend=reference"):
            read()


def test_columns_beyond_32_bit_offsets_are_refused():
    x, spec = torch.empty(16, 2**24, dtype=torch.bfloat16), QuantSpec.resolve("e2m1", NVFP4_SCALES)  # untouched pages
    for read in (
        lambda: triton_impl.quantize(x, spec, 0, torch.ones(()), None, None, ("values",)),
        lambda: triton_impl.amax(x, 0, torch.ones(16), False),
    ):
        with pytest.raises(ValueError, match=r"2\^24 columns, got 16777216: use backend=reference"):
            read()


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(["--small"], marks=pytest.mark.gpu),
        pytest.param([], marks=pytest.mark.gpu_long),
    ],
    ids=["small", "all"],
)
def test_every_quantizer_agrees_with_the_reference_on_the_gpu(cases, tmp_path):
    workers = str(min(16, os.cpu_count()))  # nearly all of the time is compilation
    words = ["--workers", workers, "--json", str(tmp_path / "rows.json")]
    command = [sys.executable, "scripts/check/check_fast.py", *cases, *words]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


BEYOND_32_BITS = """
import torch
from kernels.quantize import triton_impl, triton_tiles
wide = torch.empty(17 * 2**27 + 64, dtype=torch.bfloat16)  # untouched pages take no memory
x = torch.as_strided(wide, (18, 16), (2**27, 1)).copy_(torch.randn(18, 16, generator=torch.Generator().manual_seed(0)))
amax = x.float().abs().amax()
for axis in (0, 1):
    far, near = (torch.ops.nibble.quantize_fp8(t, amax, axis, 448.0, False, False, True)[0] for t in (x, x.clone()))
    assert torch.equal(far.view(torch.uint8), near.view(torch.uint8)), axis
"""


def test_fp8_reads_rows_beyond_two_to_the_31_elements():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", BEYOND_32_BITS]
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
