"""Every Triton kernel of the fast path compiles ahead of time for Hopper and both Blackwells, without a GPU.

Values are checked by test_triton_interpreted.py (CPU) and by scripts/check/check_fast.py (GPU). Here: no spills,
the layouts as planned, and the E2M1 conversion instruction in every quantizer for Blackwell and in none for Hopper.
"""

import re
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1: nothing to compile", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kernels import adamw, sass, triton_common  # noqa: E402
from kernels.quantize import triton_kernels, triton_ops, triton_shaped, triton_tiles  # noqa: E402
from kernels.selftest import conversion  # noqa: E402
from kernels.spec import HIF4_SCALES, MXFP4_SCALES, NVFP4_SCALES, QuantSpec  # noqa: E402

TARGETS = [90, 100, 120]
NVFP4 = dict(
    TARGET=6.0, RANGE=2688.0, POW2=False, SELECT_46=False, ROUNDING="rtn", EDEN_GROUPS=1, SCALED=False, PAIRS=True,
    STREAM=16, STORE_VALUES=True, STORE_PACKED=False, EVEN=True, TILE=64, STAGES=2, INTERPRET=False, SQUARE=False,
    PARTS=0, FORM=None, members_ptr=None, table_ptr=None,
)  # fmt: skip
QUANTIZE = {
    "rtn_46_axis0_packed_out": dict(AXIS=0, PACKED=False, HAS_SIGNS=False, SELECT_46=True, STORE_PACKED=True),
    "sr_axis0_from_packed": dict(AXIS=0, PACKED=True, HAS_SIGNS=True, ROUNDING="sr", STORE_PACKED=True),
    "sr8_axis1": dict(AXIS=1, PACKED=False, HAS_SIGNS=True, ROUNDING="sr8", STORE_PACKED=True),
    "ms_eden_axis1": dict(AXIS=1, PACKED=False, HAS_SIGNS=True, ROUNDING="ms_eden"),
    "ms_eden_axis0": dict(AXIS=0, PACKED=False, HAS_SIGNS=True, ROUNDING="ms_eden"),
    "ms_eden_two_rounds": dict(AXIS=0, PACKED=False, HAS_SIGNS=False, PARTS=1, ROUNDING="ms_eden"),
    "ms_eden_three_rounds": dict(AXIS=1, PACKED=True, HAS_SIGNS=False, PARTS=2, ROUNDING="ms_eden"),
    "ms_eden_upstream_axis0": dict(
        AXIS=0, PACKED=True, HAS_SIGNS=True, ROUNDING="ms_eden", EDEN_GROUPS=8, SCALED=True, POW2=True
    ),
}
POINTERS = {
    "src_ptr": "*bf16", "src_scales_ptr": "*u8", "src_global_ptr": "*fp32", "rotation_ptr": "*bf16",
    "rotation0_ptr": "*bf16", "rotation1_ptr": "*bf16",
    "signs_ptr": "*fp32", "signs0_ptr": "*fp32", "signs1_ptr": "*fp32", "amax_ptr": "*fp32", "amax0_ptr": "*fp32",
    "amax1_ptr": "*fp32", "plain_ptr": "*fp32", "rng_ptr": "*i64", "layer_ptr": "*i64",
    "values_ptr": "*bf16", "codes_ptr": "*i32", "scales_ptr": "*u8", "scale_ptr": "*fp32", "members_ptr": "*u8",
    "levels_ptr": "*fp32",
}  # fmt: skip


@contextmanager
def active_gpu(target: int):
    """Triton as on a machine with this GPU: what is compiled ahead must see what a launch there would see."""
    driver = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", target, 32))
    triton.runtime.driver.set_active(driver)
    try:
        yield driver.get_current_target()
    finally:
        triton.runtime.driver.set_active(None)  # looked up again when next asked for


def compile_kernel(kernel, constants: dict, target: int, warps: int = 4, registers: int | None = None, **types):
    """The compiled kernel; arguments that are not constants are pointers by name, or i32."""
    signature = {
        name: "constexpr" if name in constants else {**POINTERS, **types}.get(name, "i32") for name in kernel.arg_names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name not in constants}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    form = constants.get("FORM")
    competing = constants.get("SELECT_46") or (form is not None and len(form.candidates) > 1)
    competing = competing or (form is not None and form.rule == "rms")
    options = {"num_warps": warps, "maxnreg": registers, "enable_fp_fusion": not competing}
    with active_gpu(target) as gpu:
        return triton.compile(source, target=gpu, options=options)


def assert_e2m1_instruction_on_blackwell_only(compiled, target: int, folder: Path):
    """In the PTX, whose assembly asks for an architecture that has it, and in the machine code."""
    ptx = compiled.asm["ptx"]
    assert f".target sm_{target}a" in ptx
    assert ("cvt.rn.satfinite.e2m1x2.f32" in ptx) == (target >= 100)
    (folder / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    found = [name for name in sass.opcodes(folder / "kernel.cubin") if re.match(r"F2FP\.SATFINITE\.E2M1\.F32", name)]
    assert bool(found) == (target >= 100), found


@pytest.mark.parametrize(
    ("target", "expected"),
    [(80, False), (89, False), (90, False), (100, True), (103, True), (110, True), (120, True), (121, True)],
)
def test_the_instruction_is_chosen_by_the_gpu_that_is_compiled_for(target: int, expected: bool, monkeypatch):
    with active_gpu(target):
        assert triton_common.has_e2m1_instruction() == expected
        monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
        assert not triton_common.has_e2m1_instruction()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", QUANTIZE)
def test_quantize_kernel_compiles_without_spills(name: str, target: int, tmp_path: Path):
    constants = NVFP4 | QUANTIZE[name]
    source = "*i32" if constants["PACKED"] else "*bf16"
    select = "four_over_six" if constants["SELECT_46"] else "absmax"
    spec = QuantSpec("e2m1", NVFP4_SCALES, select, constants["ROUNDING"].removesuffix("8"))
    rotated = constants["HAS_SIGNS"] or constants["PARTS"] > 0
    key = triton_ops.config_key(constants["PACKED"], constants["AXIS"], spec, rotated)
    launch = triton_ops.CONFIGS[key]
    constants |= {"TILE": launch.tile, "STAGES": triton_ops.stages_of(launch, constants["PARTS"])}
    kernel, limit = triton_kernels.quantize_kernel, launch.registers
    types = {"rotation_ptr": "*fp32"} if constants["PARTS"] else {}
    compiled = compile_kernel(kernel, constants, target, launch.warps, limit, src_ptr=source, **types)
    # The layout argument of triton_kernels.py: no shuffles between the tensor core and the per-group sums.
    ptx = compiled.asm["ptx"]
    assert ".local" not in ptx
    assert constants["PARTS"] < 2 or compiled.metadata.shared <= 99 * 1024
    if target == 90 and constants["EDEN_GROUPS"] == 1:
        assert "wgmma" in ptx and "shfl.sync.bfly" not in ptx
    assert_e2m1_instruction_on_blackwell_only(compiled, target, tmp_path)


@pytest.mark.parametrize("target", [90, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["whole", "factors"])
def test_shaped_kernels_compile_and_a_thread_holds_whole_rows(form: str, target: int):
    """In the layout of the tensor core four threads would each work out every element of a row."""
    constants = triton_ops.constants(QuantSpec.resolve("e2m1", NVFP4_SCALES, select="four_over_six"), 0)
    constants |= dict(STORE_VALUES=True, STORE_PACKED=True, TILE=triton_shaped.TILE, INTERPRET=False)
    if form == "whole":
        kernel, constants = triton_shaped.shaped_kernel, constants | dict(PANEL=64, STAGES=triton_shaped.STAGES)
    else:
        kernel, constants = triton_shaped.factored_kernel, constants | dict(STATE=64)
    types = dict(feedback_ptr="*bf16", errors_ptr="*bf16", triangle_ptr="*fp32", sums_ptr="*fp32")
    compiled = compile_kernel(kernel, constants, target, triton_shaped.WARPS, **types)
    assert ".local" not in compiled.asm["ptx"] and "mma" in compiled.asm["ptx"]
    elements = re.findall(rf"math\.fma .*tensor<{triton_shaped.TILE}x1xf32, #(\w+)>", compiled.asm["ttgir"])
    assert len(elements) >= 16 and "mma" not in elements


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("along", "parts"),
    [
        ((True, False), 0),
        ((False, True), 0),
        ((True, True), 0),
        pytest.param((True, True), 1, marks=pytest.mark.slow),
        pytest.param((True, False), 2, marks=pytest.mark.slow),
    ],
)
def test_amax_kernel_compiles(along: tuple[bool, bool], parts: int, target: int):
    constants = dict(zip(("ALONG_0", "ALONG_1"), along, strict=True))
    launch = triton_ops.CONFIGS["amax", 2 if all(along) else int(along[1])]
    constants |= dict(
        PARTS=parts,
        PLAIN=not all(along),
        PACKED=False,
        SQUARE=False,
        EVEN=False,
        TILE=launch.tile,
        STAGES=triton_ops.stages_of(launch, parts),
        INTERPRET=False,
    )
    types = dict.fromkeys(("rotation0_ptr", "rotation1_ptr"), "*fp32") if parts else {}
    compiled = compile_kernel(triton_kernels.amax_kernel, constants, target, launch.warps, **types)
    limit = 99 if parts == 2 else 227
    assert compiled.metadata.shared <= limit * 1024 and ".local" not in compiled.asm["ptx"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["rtn", "four_over_six", "sr"])
def test_rows_kernel_compiles_without_spills(name: str, target: int, tmp_path: Path):
    launch = triton_ops.CONFIGS[f"{name}_rows", 1]
    constants = dict(
        TARGET=6.0, RANGE=1536.0, POW2=False, SELECT_46=name == "four_over_six",
        ROUNDING="sr" if name == "sr" else "rtn", STREAM=16, STORE_VALUES=True, STORE_PACKED=True,
        BLOCK=launch.tile, FORM=None, table_ptr=None, INTERPRET=False,
    )  # fmt: skip
    compiled = compile_kernel(triton_kernels.rows_kernel, constants, target, launch.warps, launch.registers)
    assert ".local" not in compiled.asm["ptx"] and "shfl.sync.bfly" not in compiled.asm["ptx"]
    assert_e2m1_instruction_on_blackwell_only(compiled, target, tmp_path)


@pytest.mark.parametrize("target", TARGETS)
def test_tile_kernels_compile(target: int, tmp_path: Path):
    square = dict(
        TARGET=6.0, RANGE=2688.0, POW2=False, SELECT_46=True, ROUNDING="sr", STREAM=16, STORE_VALUES=True,
        STORE_PACKED=True, TILES=8, FORM=None, table_ptr=None, INTERPRET=False,
    )  # fmt: skip
    fp8 = dict(TARGET=448.0, POW2=False, PER_ROW=True, IS_E4M3=True, TILE_R=16, TILE_C=256, INTERPRET=False)
    compiled = compile_kernel(triton_tiles.square_kernel, square, target, codes_ptr="*u8")
    assert_e2m1_instruction_on_blackwell_only(compiled, target, tmp_path)
    both = dict(TARGET=448.0, POW2=False, IS_E4M3=False, TILE_R=128, TILE_C=64, INTERPRET=False)
    types = dict(values_ptr="*u8", transposed_ptr="*u8", other_scale_ptr="*fp32")
    assert (
        "cvt.rn.satfinite.e5m2x2.f32" in compile_kernel(triton_tiles.fp8_both_kernel, both, target, **types).asm["ptx"]
    )
    assert compile_kernel(triton_tiles.fp8_kernel, fp8, target, values_ptr="*u8").asm["cubin"]
    unpack = dict(SQUARE=True, AXIS=0, TILE_R=64, TILE_C=128, INTERPRET=False)
    assert compile_kernel(triton_tiles.unpack_kernel, unpack, target).asm["cubin"]
    check = compile_kernel(conversion.convert_kernel, dict(BLOCK=128), target, x_ptr="*fp32", values_ptr="*fp32",
                           words_ptr="*i32", bytes_ptr="*u8")  # fmt: skip
    assert_e2m1_instruction_on_blackwell_only(check, target, tmp_path)
    signs = dict(STREAM=1, DIM=16, FIXED=False, INTERPRET=False)
    assert compile_kernel(triton_kernels.signs_kernel, signs, target, 1).asm["cubin"]


@pytest.mark.parametrize("aligned", [True, False])
def test_adamw_compiles_and_reads_four_neighbours_at_once(aligned: bool):
    form = dict(ALIGNED=aligned, BLOCK=adamw.BLOCK, BLOCKS=adamw.BLOCKS)
    types = dict.fromkeys(("lr", "beta1", "beta2", "eps", "decay"), "fp32")
    types |= {name: "*i64" for name in ("address_ptr", "size_ptr", "tensor_ptr", "first_ptr")}
    types |= dict(factor_ptr="*fp32", skip_ptr="*fp32")
    compiled = compile_kernel(adamw.adamw_kernel, form | dict(INTERPRET=False), 90, **types)
    assert ("ld.global.v4" in compiled.asm["ptx"]) == aligned and ".local" not in compiled.asm["ptx"]


FORMS = {
    "if4_eden": QuantSpec.resolve("if4", NVFP4_SCALES, rounding="ms_eden"),
    "int4_sr": QuantSpec.resolve("int4", NVFP4_SCALES, rounding="sr"),
    "po2_eden": QuantSpec.resolve("po2_gauss", NVFP4_SCALES, rounding="ms_eden"),
    "po4": QuantSpec.resolve("po4_mix", NVFP4_SCALES),
    "sfp4_46_eden": QuantSpec.resolve("sfp4", NVFP4_SCALES, "four_over_six", "ms_eden"),
    "search": QuantSpec.resolve("e2m1", NVFP4_SCALES, "search"),
    "mxfp4_rms": QuantSpec.resolve("e2m1", MXFP4_SCALES, scale_rule="rms"),
    "mxfp4_macro_sr": QuantSpec.resolve("e2m1", MXFP4_SCALES, rounding="sr", scale_rule="ceil", macro_bits=5),
    "hif4": QuantSpec.resolve("hif4", HIF4_SCALES),
}


def compile_form(spec: QuantSpec, axis: int, packed: bool, target: int = 90):
    launch = triton_ops.CONFIGS[triton_ops.config_key(False, axis, spec, True)]
    constants = NVFP4 | triton_ops.constants(spec, 4)
    constants |= dict(AXIS=axis, PACKED=False, HAS_SIGNS=True, STORE_PACKED=packed, TILE=launch.tile)
    constants |= dict(STAGES=launch.stages)
    looked_up, many = constants["FORM"].looked_up, len(spec.family.members) > 2
    constants = {k: v for k, v in constants.items() if k != ("table_ptr" if looked_up else "")}
    constants = {k: v for k, v in constants.items() if k != ("members_ptr" if many else "")}
    table = "*i32" if many else "*i16"
    kernel, limit = triton_kernels.quantize_kernel, launch.registers
    return compile_kernel(kernel, constants, target, launch.warps, limit, table_ptr=table)


QUICK = ("if4_eden",)  # the others take 5 to 10 s each


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in FORMS])
def test_forms_compile_without_spills(name: str, tmp_path: Path):
    compiled = compile_form(FORMS[name], 1, False)
    (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    found = sass.opcodes(tmp_path / "kernel.cubin")
    assert sum(count for op, count in found.items() if op.startswith(("LDL", "STL"))) <= 32  # 30: sfp4, triton 3.6
    assert "wgmma" in compiled.asm["ptx"]
    if len(FORMS[name].candidates) > 1:  # without .rn ptxas would fuse products into sums of squared errors
        assert not re.findall(r"\b(?:add|sub|mul)\.f32", compiled.asm["ptx"])


def test_values_of_forms_compile():
    for name in ("mxfp4_macro_sr",):
        spec = FORMS[name]
        constants = dict(SQUARE=False, AXIS=0, TILE_R=64, TILE_C=64, FORM=triton_ops.form_of(spec))
        constants |= dict(members_ptr=None) if len(spec.family.members) < 3 else {}
        compiled = compile_kernel(triton_tiles.unpack_form_kernel, constants, 90, codes_ptr="*u8")
        assert compiled.asm["cubin"]
