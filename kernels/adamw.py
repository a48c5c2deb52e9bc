"""AdamW over many tensors in one launch, with the factor that clips their gradients.

A gradient is read once and not written: 28 bytes a parameter, where scaling it first takes 36.

The arithmetic is that of torch's fused kernel (aten/native/cuda/fused_adam_utils.cuh, from 2.11 on all of it in FP32)
behind that scaling, and so are the bits. What a compiler fuses there isn't written anywhere, so `has_torchs_bits` tries
it once in a process, on the GPU in use.
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

INTERPRET = bool(triton.knobs.runtime.interpret)
BLOCK, BLOCKS, WARPS = 1024, 16, 4  # elements at a time, times of a program
ALIGNMENT = 16  # bytes, and elements: loads of four neighbours
PROBE, PROBE_STEPS = 2**18, 8


class Settings(NamedTuple):
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


@dataclass(frozen=True)
class Table:
    """Where tensors lie: addresses int64 [tensors, 5] of weight, gradient, two moments and step, sizes int64 [tensors];
    of each program its tensor and first element."""

    addresses: Tensor
    sizes: Tensor
    tensor_of: Tensor
    first_of: Tensor
    aligned: bool

    @classmethod
    def of(cls, pointers: list[tuple[int, ...]], sizes: list[int], device: torch.device) -> "Table":
        share = BLOCK * BLOCKS
        programs = [(i, first) for i, size in enumerate(sizes) for first in range(0, size, share)]
        aligned = all(number % ALIGNMENT == 0 for number in (*sizes, *(p for row in pointers for p in row[:4])))
        columns = (pointers, sizes, [i for i, _ in programs], [first for _, first in programs])
        return cls(*(_on(device, column) for column in columns), aligned)


def _on(device: torch.device, numbers: list) -> Tensor:
    made = torch.tensor(numbers, dtype=torch.int64)
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made


@cache
def has_torchs_bits(device: torch.device) -> bool:
    """Whether some steps on random numbers end where torch's fused AdamW does, bit for bit."""
    generator = torch.Generator(device).manual_seed(0)
    theirs = torch.randn(PROBE, device=device, generator=generator)
    ours, means, squares = theirs.clone(), torch.zeros_like(theirs), torch.zeros_like(theirs)
    settings = Settings(1.3e-3, 0.9, 0.95, 1e-8, 0.1)
    optimizer = torch.optim.AdamW([theirs], settings.lr, settings[1:3], settings.eps, settings.weight_decay, fused=True)
    counter, factor, skip = (torch.full((), value, device=device) for value in (0.0, 0.3371, 0.0))
    for _ in range(PROBE_STEPS):
        gradient = torch.randn(PROBE, device=device, generator=generator)
        theirs.grad = gradient * factor
        optimizer.step()
        counter += 1
        pointers = [tuple(t.data_ptr() for t in (ours, gradient, means, squares, counter))]
        update(Table.of(pointers, [PROBE], device), factor, skip, settings)
    state = optimizer.state[theirs]
    return all(map(torch.equal, (ours, means, squares), (theirs, state["exp_avg"], state["exp_avg_sq"])))


def update(table: Table, factor: Tensor, skip: Tensor, settings: Settings) -> None:
    """One step of every tensor, whose counters are one ahead already. factor, skip: FP32 []; skip 1 changes nothing.

    All of it FP32, contiguous, on the GPU of the table.
    """
    adamw_kernel[(len(table.first_of),)](
        table.addresses, table.sizes, table.tensor_of, table.first_of, factor, skip, *settings, ALIGNED=table.aligned,
        BLOCK=BLOCK, BLOCKS=BLOCKS, INTERPRET=INTERPRET, num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def adamw_kernel(
    address_ptr, size_ptr, tensor_ptr, first_ptr, factor_ptr, skip_ptr, lr, beta1, beta2, eps, decay,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """BLOCKS times BLOCK elements of one tensor a program. The numbers are FP32."""
    if tl.load(skip_ptr) == 1.0:
        return
    program = tl.program_id(0)
    tensor, first = tl.load(tensor_ptr + program), tl.load(first_ptr + program)
    size, factor = tl.load(size_ptr + tensor), tl.load(factor_ptr)
    at = address_ptr + 5 * tensor
    weight, gradient = _pointer(at, ALIGNED), _pointer(at + 1, ALIGNED)
    mean, square = _pointer(at + 2, ALIGNED), _pointer(at + 3, ALIGNED)
    if ALIGNED:
        first, size = tl.multiple_of(first, 16), tl.multiple_of(size, 16)
    step = tl.load(tl.load(at + 4).to(tl.pointer_type(tl.float32)))
    rate = tl.div_rn(lr, 1.0 - _power(beta1, step, INTERPRET))
    correction = tl.sqrt_rn(1.0 - _power(beta2, step, INTERPRET))
    for block in range(BLOCKS):
        index = first + block * BLOCK + tl.arange(0, BLOCK)
        mask = index < size
        w = tl.load(weight + index, mask=mask, other=0.0)
        g = tl.load(gradient + index, mask=mask, other=0.0) * factor
        m = _moment(tl.load(mean + index, mask=mask, other=0.0), g, beta1)
        v = _moment(tl.load(square + index, mask=mask, other=0.0), g * g, beta2)
        if decay != 0.0:
            w = tl.fma(tl.zeros_like(w) - lr * decay, w, w)
        divisor = tl.div_rn(tl.sqrt_rn(v), correction + tl.zeros_like(v)) + eps
        tl.store(weight + index, w - tl.div_rn(rate * m, divisor), mask=mask)
        tl.store(mean + index, m, mask=mask)
        tl.store(square + index, v, mask=mask)


@triton.jit
def _moment(old, new, beta):
    beta += tl.zeros_like(old)
    return tl.fma(beta, old, tl.fma(-beta, new, new))


@triton.jit
def _power(base, exponent, INTERPRET: tl.constexpr):
    """The interpreter has no libdevice."""
    return tl.exp(tl.log(base) * exponent) if INTERPRET else libdevice.pow(base, exponent)


@triton.jit
def _pointer(at, ALIGNED: tl.constexpr):
    pointer = tl.load(at).to(tl.pointer_type(tl.float32))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer
