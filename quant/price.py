"""What a precision plan costs: FLOPs by the operands' bits, bytes that its quantizers move. Counts, no speeds.

A GEMM is in 4 bits where both its operands are. Counted are the three GEMMs of every linear layer of the blocks, and
what a product multiplies beside them (Product.more_flops).
"""

from collections import Counter
from dataclasses import dataclass

from quant.names import FPROP_SLOT, GEMMS, OPERANDS
from quant.plan import HEAD, Entry, Plan
from quant.product import Product
from quant.recipe import Operand

CAST_BYTES = 4 + 2  # of an FP32 master weight to BF16, which every recipe reads
AMAX_BYTES = READ_BYTES = 2  # a pass over BF16 for the largest magnitude, and one to quantize
SWIZZLE_BYTES = 2 / 16  # row-major block scales read and written in the layout of the tensor cores
STORED_BYTES = {4: 0.5 + 1 / 16, 8: 1.0}  # of an element: codes and block scales


@dataclass(frozen=True)
class Kind:
    """How a GEMM multiplies: `bits` of its wider operand, `native` where Blackwell's tensor cores take its codes as
    they are; else it is emulated in BF16."""

    bits: int
    native: bool = True


def bits_of(operand: Operand) -> int:
    if not operand.is_quantized:
        return 16
    return 8 if operand.spec.grid in ("e4m3", "e5m2") else 4


def kind_of(recipe: Product, gemm: str) -> Kind:
    """ValueError for a product that doesn't say the bits of its GEMMs."""
    operands = [operand for slot, operand in recipe.operands().items() if slot.startswith(gemm)]
    if not operands and recipe.gemm_bits is None:
        raise ValueError(f"no price is known of {recipe.name}: it has neither operand slots nor gemm_bits")
    if not operands:
        return Kind(recipe.gemm_bits)
    bits = max(map(bits_of, operands))
    return Kind(bits, bits > 4 or all(operand.spec.tensor_core for operand in operands))


def block_flops(plan: Plan, tokens: int) -> Counter[Kind]:
    """{kind: FLOPs} of the blocks' GEMMs, forward and backward, of so many tokens: 2 M N K each; and of what else
    their recipes multiply."""
    found: Counter[Kind] = Counter()
    for entry in blocks(plan):
        rows, columns = entry.shape
        for gemm in GEMMS:
            found[kind_of(entry.recipe, gemm)] += 2 * tokens * rows * columns
        if more := entry.recipe.more_flops(entry.shape, tokens):
            found[Kind(16)] += more
    return found


def head_flops(plan: Plan, tokens: int) -> int:
    """Forward and backward of lm_head: three products in BF16."""
    return sum(6 * tokens * entry.shape[0] * entry.shape[1] for entry in plan.entries if entry.name == HEAD)


def quantizer_bytes(plan: Plan, tokens: int) -> float:
    """Bytes read and written to make all operands of the blocks from BF16, once for so many tokens."""
    return sum(_entry_bytes(entry, tokens) for entry in blocks(plan))


def blocks(plan: Plan) -> list[Entry]:
    return [entry for entry in plan.entries if entry.name != HEAD]


def _entry_bytes(entry: Entry, tokens: int) -> float:
    rows, columns = entry.shape
    elements = {"x": tokens * columns, "w": rows * columns, "dy": tokens * rows}
    moved = elements["w"] * CAST_BYTES
    if not entry.recipe.operands():  # both directions of each tensor, from one pass for the amax
        return moved + sum(elements.values()) * (AMAX_BYTES + READ_BYTES + 2 * STORED_BYTES[entry.recipe.gemm_bits])
    for gemm in GEMMS:
        for name in OPERANDS[gemm]:
            moved += elements[name] * operand_bytes(entry.recipe, f"{gemm}.{name}")
    return moved


def operand_bytes(recipe: Product, slot: str) -> float:
    """Of one element of a slot."""
    operands = recipe.operands()
    operand = operands[slot]
    if not operand.is_quantized:
        return 0.0
    stored = STORED_BYTES[bits_of(operand)]
    swizzle = SWIZZLE_BYTES if operand.spec.is_blocked else 0.0
    made = operands[f"fprop.{FPROP_SLOT[slot]}"] if slot in FPROP_SLOT else None
    if operand.source != "input" and made.is_quantized:
        used = STORED_BYTES[bits_of(made)]
        if operand.source == "fprop_transposed":
            return 2 * used + swizzle  # its codes, turned
        amax, read = used, used
    else:
        amax, read = AMAX_BYTES, READ_BYTES
    return (amax if operand.amax == "exact" else 0.0) + read + stored + swizzle
