"""The E2M1 rounding and packing inside the Triton quantizers, alone: on Blackwell it is the conversion instruction."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.formats import minifloat, nibbles
from kernels.selftest.probes import probes
from kernels.selftest.verdicts import Line, judge
from kernels.triton_common import encode_bytes, encode_words, has_e2m1_instruction, round_e2m1

BLOCK = 128  # rows of 16 a program


@triton.jit
def convert_kernel(x_ptr, values_ptr, words_ptr, bytes_ptr, BLOCK: tl.constexpr):
    """FP32 [n, 16] -> E2M1 values FP32 [n, 16], their codes as int32 words [n, 2] and as bytes [n, 8]."""
    row = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None]
    x = tl.load(x_ptr + row * 16 + tl.arange(0, 16)[None, :])
    values = round_e2m1(x)
    tl.store(values_ptr + row * 16 + tl.arange(0, 16)[None, :], values)
    tl.store(words_ptr + row * 2 + tl.arange(0, 2)[None, :], tl.reshape(encode_words(values, x), [BLOCK, 2]))
    tl.store(bytes_ptr + row * 8 + tl.arange(0, 8)[None, :], encode_bytes(values, x).to(tl.uint8))


def convert(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(values FP32, codes from words, codes from bytes: both uint8, two a byte) of x, FP32 [n, 16]; n % 128 == 0."""
    values = torch.empty_like(x)
    words = torch.empty(x.shape[0], 2, dtype=torch.int32, device=x.device)
    packed = torch.empty(x.shape[0], 8, dtype=torch.uint8, device=x.device)
    convert_kernel[(x.shape[0] // BLOCK,)](x, values, words, packed, BLOCK=BLOCK)
    return values, words.view(torch.uint8), packed


def check(device: str, count: int = 1_000_000) -> Line:
    """Values (bit for bit, so zeros positive) and codes (so zeros signed) of all probes, `count` random ones among
    them, against the definition."""
    x = probes(minifloat.E2M1, count)
    x = F.pad(x, (0, -x.numel() % (16 * BLOCK))).view(-1, 16).to(device)
    expected = minifloat.round_nearest(x, minifloat.E2M1)
    codes = nibbles.pack(nibbles.encode(expected, x.signbit()))
    values, from_words, from_bytes = convert(x)
    pairs = {
        "values": (values.view(torch.int32), expected.view(torch.int32)),
        "words of codes": (from_words, codes),
        "bytes of codes": (from_bytes, codes),
    }
    failures = [f"{name}: {n} of {a.numel()} differ" for name, (a, b) in pairs.items() if (n := int((a != b).sum()))]
    how = "the conversion instruction" if has_e2m1_instruction() else "integer and FP32 arithmetic"
    return judge("quantize triton: FP32 to E2M1", failures, f"by {how}: every tie and {x.numel()} numbers, bit for bit")
