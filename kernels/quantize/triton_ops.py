"""Launches of the Triton quantizers and the torch operators around them, with their fake implementations.

Launch shapes are fixed: what scripts/bench/bench_quantize.py --tune found on an H100 or an H200, never tuned at run
time.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from kernels.philox import ROUNDING_STREAM
from kernels.quantize.triton_forms import Form, lookup
from kernels.quantize.triton_kernels import (
    ROTATION_TILE,
    amax_kernel,
    quantize_kernel,
    rows_kernel,
    signs_kernel,
)
from kernels.rotation import hadamard
from kernels.spec import NVFP4_BLOCK, ROTATION_DIMS, QuantSpec, from_key

INTERPRET = bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Launch:
    """tile: rows (axis 1) or columns (axis 0) of a 128-wide tile, or groups of rows_kernel; programs: for each
    multiprocessor (of rows_kernel more than fit at once); registers: limit for each
    thread, so that more programs fit."""

    tile: int
    warps: int
    stages: int = 2
    programs: int = 2
    registers: int | None = None


# What --tune found best, along either axis; along axis 1 those of kernels that no recipe uses (rtn, 4/6, packed ones)
# follow their axis-0 twins.
EITHER_AXIS = {
    "rtn": Launch(64, 4, 3, 2),
    "four_over_six": Launch(64, 8, 3, 2, 128),
    "sr": Launch(64, 8, 3, 2, 128),
    "ms_eden": Launch(64, 4, 3, 2),
    "rtn_packed": Launch(64, 4, 3, 3),
    "sr_packed": Launch(64, 8, 3, 4, 128),
    "ms_eden_packed": Launch(64, 4, 3, 3),
    # Forms (triton_forms.py); on an H200. A third or fourth table takes more registers than two programs have.
    "form": Launch(64, 8, 3, 2, 128),
    "two_tables": Launch(64, 4, 3, 2),
    "tables": Launch(64, 8, 3, 1),
    "amax": Launch(64, 4, 3, 2),
    "amax_packed": Launch(64, 4, 3, 3),
}
# By (kernel, axis); axis 2 is both.
CONFIGS: dict[tuple[str, int], Launch] = {
    **{(name, axis): launch for name, launch in EITHER_AXIS.items() for axis in (0, 1)},
    **{(f"{name}_rows", 1): Launch(128, 4, programs=64) for name in ("rtn", "four_over_six", "sr", "ms_eden", "form")},
    ("amax", 2): Launch(128, 8, 4, 1),
}


def config_key(is_packed: bool, axis: int, spec: QuantSpec, rotated: bool) -> tuple[str, int]:
    """The entry of CONFIGS that a quantizer runs with; "_rows" names those that rows_kernel serves."""
    form, is_plain = form_of(spec), axis == 1 and not rotated
    if form is not None:
        if is_plain and not is_packed and in_rows(form):
            return "form_rows", 1
        tables = "two_tables" if len(form.members) <= 2 else "tables"
        return tables if form.looked_up else "form", axis
    if is_packed:
        return f"{spec.rounding}_packed", axis
    name = "four_over_six" if spec.select == "four_over_six" else spec.rounding
    return (f"{name}_rows", 1) if is_plain else (name, axis)


@lru_cache
def form_of(spec: QuantSpec) -> Form | None:
    """What the kernels know of its format; None for E2M1 under E4M3 scales by one or two fits, their own path."""
    return None if spec.tensor_core and spec.select != "search" else Form.of(spec)


@lru_cache
def lookup_of(spec: QuantSpec, device: torch.device) -> Tensor | None:
    """What the kernels look up levels in, if they do."""
    form = form_of(spec)
    return lookup(spec.family.members).to(device) if form is not None and form.looked_up else None


@lru_cache
def levels_of(spec: QuantSpec, device: torch.device) -> Tensor:
    """FP32 [members * 16]: what each member's codes mean."""
    codes = torch.arange(16, dtype=torch.uint8)
    return torch.cat([grid.decode(codes) for grid in spec.family.members]).to(device)


def in_rows(form: Form) -> bool:
    """Whether rows_kernel, which sees groups of 16 one by one, can store it."""
    return form.group == NVFP4_BLOCK and len(form.members) <= 2


@lru_cache
def rotation_matrix(dim: int, device: torch.device) -> Tensor:
    """BF16 [128, 128]: block-diagonal Hadamard (identity for dim 1), columns permuted as triton_kernels.py explains."""
    block = hadamard(dim, torch.device("cpu"))
    matrix = torch.block_diag(*[block] * (ROTATION_TILE.value // dim))[:, permutation(torch.device("cpu"))]
    return matrix.to(torch.bfloat16).contiguous().to(device)


@lru_cache
def permutation(device: torch.device) -> Tensor:
    n = torch.arange(ROTATION_TILE.value)
    j, lane, b = n // 8, (n % 8) // 2, n % 2
    return (32 * lane + 2 * j + b).to(device)


def rotation_and_signs(signs: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor | None, int]:
    """(BF16 [128, 128], columns permuted; FP32 [dim] signs of its rows; 0). Of a merged rotation itself, nothing, and
    how many matrices it is the sum of: kernels lay it out as they load it."""
    if signs is None or signs.ndim == 1:
        return rotation_matrix(_dim(signs), device), signs, 0
    return signs.contiguous(), None, signs.ndim - 1


def grid_size(tiles: int, device: torch.device, per_multiprocessor: int) -> tuple[int]:
    """At most per_multiprocessor programs on each; 3 in all when interpreting, so that tests see the tile loop."""
    limit = 3
    if device.type == "cuda":
        limit = torch.cuda.get_device_properties(device).multi_processor_count * per_multiprocessor
    return (min(tiles, limit),)


def _dim(signs: Tensor | None) -> int:
    dim = 1 if signs is None else signs.shape[-1]
    if dim not in (1, *ROTATION_DIMS):
        raise ValueError(f"the Triton back end rotates by 16, 32, 64 or 128, not {dim}: use the reference back end")
    return dim


def check_columns(columns: int) -> None:
    """ValueError for tensors in whose tiles of 128 rows 32-bit offsets would not do."""
    if columns >= 2**24:
        raise ValueError(f"the Triton back end quantizes up to 2^24 columns, got {columns}: use backend=reference")


def launch_quantize(
    src: Tensor,
    src_scales: Tensor | None,
    src_global: Tensor | None,
    amax: Tensor,
    signs: Tensor | None,
    rng: Tensor | None,
    layer: Tensor | None,
    axis: int,
    spec: str,
    slot: int,
    store_values: bool,
    store_packed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(values, scale, codes, block scale bytes, members); a tensor that isn't wanted is empty. spec: a QuantSpec's
    key."""
    spec = from_key(spec)
    is_packed = src_scales is not None
    src = src.contiguous()
    outputs = allocate(src, is_packed, axis, spec, store_values, store_packed)
    values, scale, codes, block_scales, members = outputs
    rows, columns = src.shape[0], src.shape[1] * (2 if is_packed else 1)
    check_columns(columns)
    key = config_key(is_packed, axis, spec, signs is not None)
    config = CONFIGS[key]
    if key[0].endswith("_rows"):
        count = rows * columns // NVFP4_BLOCK
        rows_kernel[grid_size(triton.cdiv(count, config.tile), src.device, config.programs)](
            src, lookup_of(spec, src.device), amax, rng, layer, values, _words(codes), block_scales, scale, count,
            **constants(spec, slot), STORE_VALUES=store_values, STORE_PACKED=store_packed, BLOCK=config.tile,
            INTERPRET=INTERPRET, num_warps=config.warps, maxnreg=config.registers, enable_fp_fusion=fuses(spec),
        )  # fmt: skip
        return outputs
    lines, contraction = (rows, columns) if axis == 1 else (columns, rows)
    tiles = triton.cdiv(lines, config.tile) * triton.cdiv(contraction, ROTATION_TILE.value)
    dim = _dim(signs)
    matrix, diagonal, parts = rotation_and_signs(signs, src.device)
    table = lookup_of(spec, src.device)
    quantize_kernel[grid_size(tiles, src.device, config.programs)](
        _words(src) if is_packed else src, src_scales, src_global, matrix, diagonal, table, amax, rng,
        layer, values, _words(codes), block_scales, members if members.numel() else None, scale, rows, columns,
        columns // 8, columns // 16, contraction // 8, contraction // 16, dim,
        AXIS=axis, PACKED=is_packed, SQUARE=is_packed and src_scales.shape[0] != rows,
        HAS_SIGNS=diagonal is not None, PARTS=parts,
        **constants(spec, slot), EDEN_GROUPS=eden_groups(spec, signs), SCALED=spec.eden_space == "scaled",
        PAIRS=contraction % 32 == 0, STORE_VALUES=store_values, STORE_PACKED=store_packed,
        EVEN=lines % config.tile == 0 and contraction % ROTATION_TILE.value == 0, TILE=config.tile,
        STAGES=stages_of(config, parts), INTERPRET=INTERPRET, num_warps=config.warps, maxnreg=config.registers,
        enable_fp_fusion=fuses(spec),
    )  # fmt: skip
    return outputs


def stages_of(config: Launch, parts: int) -> int:
    """Tiles in flight: one where both parts of three rounds take shared memory; the smallest chips have 99 KiB."""
    return 1 if parts == 2 else config.stages


def constants(spec: QuantSpec, slot: int) -> dict[str, float | bool | str | int]:
    """Compile-time constants of every kernel that quantizes to NVFP4."""
    return {
        "TARGET": spec.target_max,
        "RANGE": spec.scale_cap * spec.target_max if spec.scaling.has_tensor_scale else 0.0,
        "POW2": spec.tensor_scale == "pow2",
        "SELECT_46": spec.select == "four_over_six",
        "ROUNDING": "sr8" if spec.random_bits == 8 else spec.rounding,
        "STREAM": ROUNDING_STREAM + slot,
        "FORM": form_of(spec),
    }


def fuses(spec: QuantSpec) -> bool:
    """Whether the compiler may fuse products into sums: not into the errors by which candidates compete, nor into a
    block's energy."""
    return len(spec.candidates) == 1 and spec.scale_rule != "rms"


def eden_groups(spec: QuantSpec, signs: Tensor | None) -> int:
    """How many groups of 16 share one MS-EDEN correction."""
    return signs.shape[-1] // NVFP4_BLOCK if spec.eden_block == "rotation" and signs is not None else 1


def _words(codes: Tensor) -> Tensor:
    """uint8 codes as int32 words of 8, without a copy (rows hold a multiple of 16 codes)."""
    return codes.view(torch.int32)


def allocate(src: Tensor, is_packed: bool, axis: int, spec: QuantSpec, store_values: bool, store_packed: bool):
    """The five outputs of a quantizer to blocks; packed ones in the layout of NVFP4Tensor."""
    rows, columns = src.shape[0], src.shape[1] * (2 if is_packed else 1)
    stored_rows, contraction = (rows, columns) if axis == 1 else (columns, rows)
    lines = stored_rows // spec.rows
    members = (lines, triton.cdiv(contraction, 64)) if store_packed and len(spec.family.members) > 2 else (0,)
    return (
        src.new_empty((rows, columns) if store_values else (0,), dtype=torch.bfloat16),
        src.new_empty((), dtype=torch.float32),
        src.new_empty((stored_rows, contraction // 2) if store_packed else (0,), dtype=torch.uint8),
        src.new_empty((lines, *spec.scaling.stored(contraction)) if store_packed else (0,), dtype=torch.uint8),
        src.new_empty(members, dtype=torch.uint8),
    )


def launch_amax(
    src: Tensor,
    src_scales: Tensor | None,
    signs0: Tensor | None,
    signs1: Tensor | None,
    plain: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(amax rotated along axis 1, amax rotated along axis 0), FP32 []; empty for an axis without signs.

    plain: zeroed FP32 [] that receives the amax of src as it is (BF16 sources only).
    """
    is_packed = src_scales is not None
    src = src.contiguous()
    rows, columns = src.shape[0], src.shape[1] * (2 if is_packed else 1)
    check_columns(columns)
    along0, along1 = signs0 is not None, signs1 is not None
    amax0, amax1 = (src.new_zeros(() if along else (0,), dtype=torch.float32) for along in (along0, along1))
    config = CONFIGS["amax_packed" if is_packed else "amax", 2 if along0 and along1 else int(along1)]
    tile_r, tile_c = 128 if along0 else config.tile, 128 if along1 else config.tile
    tiles = triton.cdiv(rows, tile_r) * triton.cdiv(columns, tile_c)
    either = signs0 if along0 else signs1
    dim = _dim(either)
    (matrix0, signs0, parts), (matrix1, signs1, _) = (
        rotation_and_signs(either if signs is None else signs, src.device) for signs in (signs0, signs1)
    )
    amax_kernel[grid_size(tiles, src.device, config.programs)](
        _words(src) if is_packed else src, src_scales, matrix0, matrix1, signs0, signs1, amax0, amax1,
        plain, rows, columns, columns // 8, columns // 16, dim,
        ALONG_0=along0, ALONG_1=along1, PLAIN=plain is not None, PARTS=parts, PACKED=is_packed,
        SQUARE=is_packed and src_scales.shape[0] != rows,
        EVEN=rows % tile_r == 0 and columns % tile_c == 0, TILE=config.tile, STAGES=stages_of(config, parts),
        INTERPRET=INTERPRET, num_warps=config.warps, maxnreg=config.registers,
    )  # fmt: skip
    return amax1, amax0


@torch.library.custom_op("nibble::rht_signs", mutates_args=())
def _rht_signs_op(rng: Tensor, layer: Tensor, gemm: int, dim: int, fixed: bool) -> Tensor:
    signs = torch.empty(dim, dtype=torch.float32, device=rng.device)
    signs_kernel[(1,)](rng, layer, signs, STREAM=gemm, DIM=dim, FIXED=fixed, INTERPRET=INTERPRET, num_warps=1)
    return signs


@_rht_signs_op.register_fake
def _(rng, layer, gemm, dim, fixed):
    return rng.new_empty(dim, dtype=torch.float32)


@torch.library.custom_op("nibble::amax", mutates_args=())
def _amax_op(
    src: Tensor, src_scales: Tensor | None, signs0: Tensor | None, signs1: Tensor | None
) -> tuple[Tensor, Tensor]:
    return launch_amax(src, src_scales, signs0, signs1)


@_amax_op.register_fake
def _(src, src_scales, signs0, signs1):
    shapes = (() if signs is not None else (0,) for signs in (signs1, signs0))
    return tuple(src.new_empty(shape, dtype=torch.float32) for shape in shapes)


# Not a decorator: quantize_both, an operator itself, launches without another operator inside.
_quantize_op = torch.library.custom_op("nibble::quantize", launch_quantize, mutates_args=())


@_quantize_op.register_fake
def _(src, src_scales, src_global, amax, signs, rng, layer, axis, spec, slot, store_values, store_packed):
    return allocate(src, src_scales is not None, axis, from_key(spec), store_values, store_packed)


def _both_amaxes(x: Tensor, signs1: Tensor | None, signs0: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of axis 1 and of axis 0, at least one of them rotated; from one read if only signs differ and both rotations fit
    into shared memory, which those of three rounds don't."""
    if signs1 is None or signs0 is None:
        plain = x.new_zeros((), dtype=torch.float32)
        rotated = launch_amax(x, None, signs0, signs1, plain)
        return (rotated[0], plain) if signs0 is None else (plain, rotated[1])
    if signs1.shape == signs0.shape and signs1.ndim < 3:
        return launch_amax(x, None, signs0, signs1)
    return launch_amax(x, None, None, signs1)[0], launch_amax(x, None, signs0, None)[1]


@torch.library.custom_op("nibble::quantize_both", mutates_args=())
def _quantize_both_op(
    x: Tensor,
    amax1: Tensor | None,
    amax0: Tensor | None,
    signs1: Tensor | None,
    signs0: Tensor | None,
    rng: Tensor,
    layer: Tensor,
    spec1: str,
    spec0: str,
    slots: list[int],
    store_values: list[bool],
    store_packed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if amax1 is None:
        amax1, amax0 = _both_amaxes(x, signs1, signs0)
    results = ()
    for i, (axis, amax, signs, spec) in enumerate(((1, amax1, signs1, spec1), (0, amax0, signs0, spec0))):
        results += launch_quantize(
            x, None, None, amax, signs, rng, layer, axis, spec, slots[i], store_values[i], store_packed[i]
        )
    return results


@_quantize_both_op.register_fake
def _(x, amax1, amax0, signs1, signs0, rng, layer, spec1, spec0, slots, store_values, store_packed):
    return (
        *allocate(x, False, 1, from_key(spec1), store_values[0], store_packed[0]),
        *allocate(x, False, 0, from_key(spec0), store_values[1], store_packed[1]),
    )
