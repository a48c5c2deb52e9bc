"""The same operations with hand-written backwards; the forwards are the definition's, which Inductor fuses well (but
turn_norm's, where it loads single elements around the `flip` as in RoPE's backward).

What Inductor's backwards lose (H100, llama_100m, 65,536 tokens): SwiGLU's reads dh and gate twice, since it writes the
two halves as one masked output; RoPE's loads single elements around a `flip` and selects among three sources; the
norm's leaves the BF16 copy of the stream's gradient, which the next GEMMs read, to a kernel of its own.
Results equal autograd's up to the order of FP32 operations; of the gain's gradient, FP32 sums over tokens in a fixed
order that depends on the shape alone.

What these kernels write is the dY of the linear layer before, and a per-tensor quantizer asks for its largest magnitude
first. Each has a second operator, *_measured, that gives the maxima of its programs beside what the first one gives;
measured.py puts it where a compiled graph would read a tensor again for its maximum.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.pointwise import reference_impl
from kernels.triton_common import max_nan

BF16 = torch.bfloat16
# Programs that share the rows of a norm's backward: one wave on an H100; fixed, so that sums don't follow the GPU.
NORM_PROGRAMS = 1024
NORM_TILE = 2048  # on an H200 66 % of a copy's speed with 4096 and 89 with it for rows of 2,048; 77 and 91 for 640
SWIGLU_ROWS, SWIGLU_COLUMNS = 8, 256
ROPE_WARPS = 4


def unavailable() -> str | None:
    """Why this can't run here, or None."""
    return None if torch.cuda.is_available() else "needs a CUDA GPU"


def swiglu(gate_up: Tensor) -> Tensor:
    return _SwiGLU.apply(gate_up) if gate_up.dtype == BF16 else reference_impl.swiglu(gate_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return reference_impl.swiglu(gate_up)

    @staticmethod
    def backward(ctx, dh: Tensor):
        (gate_up,) = ctx.saved_tensors
        return swiglu_backward(dh.contiguous(), gate_up.contiguous())


@torch.library.custom_op("nibble::swiglu_backward", mutates_args=())
def swiglu_backward(dh: Tensor, gate_up: Tensor) -> Tensor:
    """dh [..., F] and gate_up [..., 2 F], contiguous BF16 -> the gradient of gate_up."""
    return _swiglu_backward(dh, gate_up, None)


@torch.library.custom_op("nibble::swiglu_backward_measured", mutates_args=())
def swiglu_backward_measured(dh: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    largest = dh.new_empty(math.prod(_swiglu_grid(dh)))
    return _swiglu_backward(dh, gate_up, largest), largest


def _swiglu_backward(dh: Tensor, gate_up: Tensor, largest: Tensor | None) -> Tensor:
    out = torch.empty_like(gate_up)
    hidden, rows = dh.shape[-1], dh.numel() // dh.shape[-1]
    swiglu_kernel[_swiglu_grid(dh)](dh, gate_up, out, largest, rows, hidden, ROWS=SWIGLU_ROWS, COLUMNS=SWIGLU_COLUMNS)
    return out


def _swiglu_grid(dh: Tensor) -> tuple[int, int]:
    hidden, rows = dh.shape[-1], dh.numel() // dh.shape[-1]
    return triton.cdiv(rows, SWIGLU_ROWS), triton.cdiv(hidden, SWIGLU_COLUMNS)


@swiglu_backward.register_fake
def _(dh: Tensor, gate_up: Tensor) -> Tensor:
    return torch.empty_like(gate_up)


@swiglu_backward_measured.register_fake
def _(dh: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate_up), dh.new_empty(math.prod(_swiglu_grid(dh)))


@triton.jit
def swiglu_kernel(
    dh_ptr, gate_up_ptr, out_ptr, largest_ptr, rows, hidden, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """One program per tile [ROWS, COLUMNS] of dh. largest_ptr: BF16, one a program, or None."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows) & (column < hidden)
    at = 2 * row * hidden + column
    dh = tl.load(dh_ptr + row * hidden + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_up_ptr + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + at + hidden, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    d_gate = dh * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    d_up = dh * gate * sigmoid
    tl.store(out_ptr + at, d_gate.to(tl.bfloat16), mask=mask)
    tl.store(out_ptr + at + hidden, d_up.to(tl.bfloat16), mask=mask)
    if largest_ptr is not None:
        larger = tl.maximum(tl.abs(d_gate), tl.abs(d_up), propagate_nan=tl.PropagateNan.ALL)
        _store_largest(largest_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), larger)


@triton.jit
def _store_largest(at, magnitudes):
    """Of FP32 [rows, columns], rounded as its elements were: rounding keeps their order."""
    tl.store(at, tl.reduce(tl.reduce(magnitudes, 1, max_nan), 0, max_nan).to(tl.bfloat16))


def rope_heads(qkv: Tensor, table: Tensor, heads: int, kv_heads: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    is_ours = qkv.dtype == BF16 and kv_heads in (None, heads) and _is_power_of_two(qkv.shape[-1] // (3 * heads))
    return _RopeHeads.apply(qkv, table, heads) if is_ours else reference_impl.rope_heads(qkv, table, heads, kv_heads)


class _RopeHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor, table: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(table)
        return reference_impl.rope_heads(qkv, table, heads)

    @staticmethod
    def backward(ctx, dq: Tensor, dk: Tensor, dv: Tensor):
        (table,) = ctx.saved_tensors
        return rope_backward(dq, dk, dv, table), None, None


@torch.library.custom_op("nibble::rope_backward", mutates_args=())
def rope_backward(dq: Tensor, dk: Tensor, dv: Tensor, table: Tensor) -> Tensor:
    """Gradients of q, k, v [B, H, T, K], BF16 -> that of qkv [B, T, 3 H K]: q and k turned back."""
    return _rope_backward(dq, dk, dv, table, None)


@torch.library.custom_op("nibble::rope_backward_measured", mutates_args=())
def rope_backward_measured(dq: Tensor, dk: Tensor, dv: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    largest = dq.new_empty(dq.shape[0] * dq.shape[2])
    return _rope_backward(dq, dk, dv, table, largest), largest


def _rope_backward(dq: Tensor, dk: Tensor, dv: Tensor, table: Tensor, largest: Tensor | None) -> Tensor:
    batch, heads, length, head_dim = dq.shape
    dq, dk, dv = (_pairs(d) for d in (dq, dk, dv))
    out = torch.empty(batch, length, 3 * heads * head_dim, dtype=BF16, device=dq.device)
    rope_kernel[(batch * length,)](
        dq, dk, dv, table, out.view(torch.int32), largest, length, heads, table.stride(0), *dq.stride()[:3],
        *dk.stride()[:3], *dv.stride()[:3], PAIRS=head_dim // 2, HEADS=triton.next_power_of_2(heads),
        num_warps=ROPE_WARPS,
    )  # fmt: skip
    return out


def _pairs(x: Tensor) -> Tensor:
    """BF16 [..., K] as words of two: int32 [..., K / 2], without a copy where strides allow."""
    aligned = x.stride(-1) == 1 and all(s % 2 == 0 for s in x.stride()[:-1]) and x.storage_offset() % 2 == 0
    return (x if aligned else x.contiguous()).view(torch.int32)


@rope_backward.register_fake
def _(dq: Tensor, dk: Tensor, dv: Tensor, table: Tensor) -> Tensor:
    batch, heads, length, head_dim = dq.shape
    return dq.new_empty(batch, length, 3 * heads * head_dim)


@rope_backward_measured.register_fake
def _(dq: Tensor, dk: Tensor, dv: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, length, head_dim = dq.shape
    return dq.new_empty(batch, length, 3 * heads * head_dim), dq.new_empty(batch * length)


@triton.jit
def rope_kernel(
    dq_ptr, dk_ptr, dv_ptr, table_ptr, out_ptr, largest_ptr, length, heads, sin_offset,
    q_batch, q_head, q_step, k_batch, k_head, k_step, v_batch, v_head, v_step,
    PAIRS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One program per token. A pair is one word, so that its two values stay in one thread. largest_ptr: BF16, one a
    program, or None."""
    token = tl.program_id(0)
    step, sequence = token % length, (token // length).to(tl.int64)
    head, pair = tl.arange(0, HEADS)[:, None], tl.arange(0, PAIRS)[None, :]
    inside = head < heads
    # Each angle is in the table twice, its sine negated at even elements: read the odd ones.
    angle = table_ptr + step * (2 * PAIRS) + 2 * pair + 1
    cos, sin = tl.load(angle), tl.load(angle + sin_offset)
    dq = tl.load(dq_ptr + sequence * q_batch + step * q_step + head * q_head + pair, mask=inside, other=0)
    dk = tl.load(dk_ptr + sequence * k_batch + step * k_step + head * k_head + pair, mask=inside, other=0)
    dv = tl.load(dv_ptr + sequence * v_batch + step * v_step + head * v_head + pair, mask=inside, other=0)
    out = out_ptr + token.to(tl.int64) * (3 * heads * PAIRS) + head * PAIRS + pair
    dq, dk = _turned_back(dq, cos, sin), _turned_back(dk, cos, sin)
    tl.store(out, dq, mask=inside)
    tl.store(out + heads * PAIRS, dk, mask=inside)
    tl.store(out + 2 * heads * PAIRS, dv, mask=inside)
    if largest_ptr is not None:
        # Magnitudes of BF16 are ordered as their bits are, NaN last.
        bits = tl.max(tl.max(tl.maximum(tl.maximum(_larger(dq), _larger(dk)), _larger(dv)), 1), 0)
        tl.store(largest_ptr + token, (bits << 16).to(tl.float32, bitcast=True).to(tl.bfloat16))


@triton.jit
def _larger(word):
    return tl.maximum(word & 0x7FFF, (word >> 16) & 0x7FFF)


@triton.jit
def _turned_back(word, cos, sin):
    even, odd = _halves(word)
    return _words(even * cos + odd * sin, odd * cos - even * sin)


@triton.jit
def _halves(word):
    """The two BF16 of int32 words, FP32."""
    return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _words(low, high):
    """Two FP32 tensors as BF16 in the halves of int32 words."""
    low = low.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.int32)
    return low | (high.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.int32) << 16)


def turn_norm(x_BTHK: Tensor, table: Tensor, eps: float) -> Tensor:
    is_ours = x_BTHK.dtype == BF16 and _is_power_of_two(x_BTHK.shape[-1])
    return _TurnNorm.apply(x_BTHK, table, eps) if is_ours else reference_impl.turn_norm(x_BTHK, table, eps)


class _TurnNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTHK: Tensor, table: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x_BTHK, table)
        ctx.eps = eps
        return turn_norm_forward(x_BTHK.contiguous(), table, eps)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x_BTHK, table = ctx.saved_tensors
        return turn_norm_backward(dy, x_BTHK.contiguous(), table, ctx.eps), None, None


@torch.library.custom_op("nibble::turn_norm_forward", mutates_args=())
def turn_norm_forward(x_BTHK: Tensor, table: Tensor, eps: float) -> Tensor:
    """Contiguous BF16 [B, T, H, K] -> the same."""
    batch, length, heads, head_dim = x_BTHK.shape
    out = torch.empty_like(x_BTHK)
    turn_norm_kernel[(batch * length,)](
        x_BTHK.view(torch.int32), table, out.view(torch.int32), length, heads, table.stride(0), eps,
        PAIRS=head_dim // 2, HEADS=triton.next_power_of_2(heads), num_warps=ROPE_WARPS,
    )  # fmt: skip
    return out


@turn_norm_forward.register_fake
def _(x_BTHK: Tensor, table: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x_BTHK)


@torch.library.custom_op("nibble::turn_norm_backward", mutates_args=())
def turn_norm_backward(dy_BTHK: Tensor, x_BTHK: Tensor, table: Tensor, eps: float) -> Tensor:
    """dy, and x contiguous, BF16 [B, T, H, K] -> the gradient of x."""
    batch, length, heads, head_dim = x_BTHK.shape
    dy, x, out = _pairs(dy_BTHK), x_BTHK.view(torch.int32), torch.empty_like(x_BTHK)
    turn_norm_backward_kernel[(batch * length,)](
        dy, x, table, out.view(torch.int32), length, heads, table.stride(0), *dy.stride()[:3], eps,
        PAIRS=head_dim // 2, HEADS=triton.next_power_of_2(heads), num_warps=ROPE_WARPS,
    )  # fmt: skip
    return out


@turn_norm_backward.register_fake
def _(dy_BTHK: Tensor, x_BTHK: Tensor, table: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x_BTHK)


@triton.jit
def turn_norm_kernel(
    x_ptr, table_ptr, out_ptr, length, heads, sin_offset, eps, PAIRS: tl.constexpr, HEADS: tl.constexpr
):
    """One program per token."""
    token = tl.program_id(0)
    head, pair = tl.arange(0, HEADS)[:, None], tl.arange(0, PAIRS)[None, :]
    angle = table_ptr + token % length * (2 * PAIRS) + 2 * pair + 1
    cos, sin = tl.load(angle), tl.load(angle + sin_offset)
    at = token.to(tl.int64) * (heads * PAIRS) + head * PAIRS + pair
    low, high, inverse = _turned_inverse(tl.load(x_ptr + at, mask=head < heads, other=0), cos, sin, eps, PAIRS)
    tl.store(out_ptr + at, _words(low * inverse, high * inverse), mask=head < heads)


@triton.jit
def turn_norm_backward_kernel(
    dy_ptr, x_ptr, table_ptr, out_ptr, length, heads, sin_offset, d_batch, d_step, d_head, eps,
    PAIRS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One program per token: x is turned and normalized once more."""
    token = tl.program_id(0)
    step, sequence = token % length, (token // length).to(tl.int64)
    head, pair = tl.arange(0, HEADS)[:, None], tl.arange(0, PAIRS)[None, :]
    inside = head < heads
    angle = table_ptr + step * (2 * PAIRS) + 2 * pair + 1
    cos, sin = tl.load(angle), tl.load(angle + sin_offset)
    at = token.to(tl.int64) * (heads * PAIRS) + head * PAIRS + pair
    low, high, inverse = _turned_inverse(tl.load(x_ptr + at, mask=inside, other=0), cos, sin, eps, PAIRS)
    low, high = low * inverse, high * inverse
    dy = tl.load(dy_ptr + sequence * d_batch + step * d_step + head * d_head + pair, mask=inside, other=0)
    d_low, d_high = _halves(dy)
    mean = tl.sum(d_low * low + d_high * high, axis=1)[:, None] / (2 * PAIRS)
    d_low, d_high = inverse * (d_low - low * mean), inverse * (d_high - high * mean)
    tl.store(out_ptr + at, _words(d_low * cos + d_high * sin, d_high * cos - d_low * sin), mask=inside)


@triton.jit
def _turned_inverse(word, cos, sin, eps, PAIRS: tl.constexpr):
    """Both of each pair turned, rounded to BF16, and 1 / rms of each row."""
    even, odd = _halves(word)
    low = (even * cos - odd * sin).to(tl.bfloat16).to(tl.float32)
    high = (odd * cos + even * sin).to(tl.bfloat16).to(tl.float32)
    square = tl.sum(low * low + high * high, axis=1)[:, None]
    return low, high, tl.rsqrt(square / (2 * PAIRS) + eps)


def add_norm(residual: Tensor, branch: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if branch.dtype != BF16 or dtype != BF16:
        return reference_impl.add_norm(residual, branch, weight, eps, dtype)
    return _AddNorm.apply(residual, branch, weight, eps)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = residual + branch.to(residual.dtype)
        # Not .float() on what is FP32 already: Dynamo (torch 2.11) then cuts the gradient of `total`, silently.
        x = total if total.dtype == torch.float32 else total.float()
        inverse = reference_impl.inverse_rms(x, eps)
        ctx.save_for_backward(total, inverse, weight)
        return total, (x * inverse * weight).to(BF16)

    @staticmethod
    def backward(ctx, d_total: Tensor, dy: Tensor):
        total, inverse, weight = ctx.saved_tensors
        d_residual, d_branch, parts = norm_backward(total, inverse, weight, d_total.contiguous(), dy.contiguous())
        return d_residual, d_branch, parts.sum(0), None


@torch.library.custom_op("nibble::norm_backward", mutates_args=())
def norm_backward(
    total: Tensor, inverse: Tensor, weight: Tensor, d_total: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of add_norm over rows of D: total and d_total [..., D] FP32 or BF16, inverse [..., 1] FP32, dy [..., D]
    BF16 -> (gradient of the stream in its dtype, the same in BF16, partial sums [programs, D] of the gain's)."""
    return _norm_backward(total, inverse, weight, d_total, dy, None)


@torch.library.custom_op("nibble::norm_backward_measured", mutates_args=())
def norm_backward_measured(
    total: Tensor, inverse: Tensor, weight: Tensor, d_total: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    largest = dy.new_empty(_norm_programs(total.numel() // total.shape[-1]))
    return *_norm_backward(total, inverse, weight, d_total, dy, largest), largest


def _norm_backward(
    total: Tensor, inverse: Tensor, weight: Tensor, d_total: Tensor, dy: Tensor, largest: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    width, rows = total.shape[-1], total.numel() // total.shape[-1]
    padded = triton.next_power_of_2(width)
    tile = max(1, NORM_TILE // padded)
    programs = _norm_programs(rows)
    d_residual, d_branch = torch.empty_like(total), torch.empty_like(dy)
    parts = torch.empty(programs, width, dtype=torch.float32, device=total.device)
    norm_kernel[(programs,)](
        total, inverse, weight, d_total, dy, d_residual, d_branch, parts, largest, rows, triton.cdiv(rows, programs),
        width, PADDED=padded, ROWS=tile, num_warps=8,
    )  # fmt: skip
    return d_residual, d_branch, parts


@norm_backward.register_fake
def _(total: Tensor, inverse: Tensor, weight: Tensor, d_total: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    programs = _norm_programs(total.numel() // total.shape[-1])
    return torch.empty_like(total), torch.empty_like(dy), weight.new_empty(programs, total.shape[-1])


@norm_backward_measured.register_fake
def _(
    total: Tensor, inverse: Tensor, weight: Tensor, d_total: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    programs = _norm_programs(total.numel() // total.shape[-1])
    parts = weight.new_empty(programs, total.shape[-1])
    return torch.empty_like(total), torch.empty_like(dy), parts, dy.new_empty(programs)


def _norm_programs(rows: int) -> int:
    return min(NORM_PROGRAMS, rows)


@triton.jit
def norm_kernel(
    total_ptr, inverse_ptr, weight_ptr, d_total_ptr, dy_ptr, d_residual_ptr, d_branch_ptr, parts_ptr,
    largest_ptr, rows, share, width, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program per `share` consecutive rows, ROWS of them at a time. largest_ptr: BF16, one a program, or None."""
    program = tl.program_id(0)
    column = tl.arange(0, PADDED)[None, :]
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0)
    d_weight = tl.zeros([ROWS, PADDED], tl.float32)
    largest = tl.zeros([ROWS, PADDED], tl.float32)
    last = tl.minimum((program + 1) * share, rows)
    for first in range(program * share, last, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        mask = (row < last) & (column < width)
        at = row.to(tl.int64) * width + column
        inverse = tl.load(inverse_ptr + row, mask=row < last, other=0.0)
        x = tl.load(total_ptr + at, mask=mask, other=0.0).to(tl.float32) * inverse
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        d_total = tl.load(d_total_ptr + at, mask=mask, other=0.0).to(tl.float32)
        d_weight += dy * x
        dy *= weight
        mean = tl.sum(dy * x, axis=1)[:, None] / width
        gradient = d_total + inverse * (dy - x * mean)
        tl.store(d_residual_ptr + at, gradient.to(d_residual_ptr.dtype.element_ty), mask=mask)
        tl.store(d_branch_ptr + at, gradient.to(tl.bfloat16), mask=mask)
        if largest_ptr is not None:
            largest = tl.maximum(largest, tl.abs(gradient), propagate_nan=tl.PropagateNan.ALL)
    if largest_ptr is not None:
        _store_largest(largest_ptr + program, largest)
    tl.store(parts_ptr + program * width + column, tl.sum(d_weight, axis=0)[None, :], mask=column < width)


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0
