"""Bits that may never change: Philox words, and codes and scales where no sum decides, whatever machine or version.

All else is compared with an earlier commit on the same machine (scripts/check/net.py).
"""

import hashlib

import pytest
import torch
from torch import Tensor

from kernels import philox
from kernels.quantize import reference_impl
from quant.recipe import Recipe

RNG, LAYER = torch.tensor([2**40 + 12345, 678, 9]), torch.tensor(7)
PLAIN, SQUARE = ["tensor fp32", "1x16 e4m3"], ["tensor fp32", "16x16 e4m3"]


def sha(*tensors: Tensor) -> str:
    bits = b"".join(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors)
    return hashlib.sha256(bits).hexdigest()[:16]


def spread() -> Tensor:
    """BF16 [64, 128] with exponents from 2^-15 to 2^0, both signs, all mantissas: the bits are Philox words."""
    words = philox.random_words(RNG, 0, 255, 64 * 128)
    bits = (words >> 31 << 15) | (127 - ((words >> 8) & 15) << 7) | (words & 127)
    return bits.to(torch.int32).to(torch.uint16).view(torch.bfloat16).view(64, 128)


def test_philox_words():
    assert sha(philox.random_words(RNG, LAYER, 3, 1000)) == "4641203918453c6c"
    assert sha(philox.random24(RNG, LAYER, 5, 1000)) == "52f250cedbbc2082"
    assert sha(philox.random_signs(RNG, LAYER, 2, 128)) == "ee7c525166ee9533"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"scales": PLAIN}, "eeacd21c35e9ed63"),
        ({"scales": PLAIN, "tensor_scale": "pow2"}, "e0467541c09ce31d"),
        ({"scales": SQUARE}, "e57970945612cd9d"),
        ({"scales": PLAIN, "rounding": "sr"}, "28479bec58dc59a1"),
        ({"scales": SQUARE, "rounding": "sr"}, "76b75a53a98f563d"),
        ({"grid": "e4m3"}, "6d675d074c11dd61"),
        ({"grid": "e4m3", "scales": ["row fp32"]}, "71de4c3e52afab2f"),
        ({"grid": "e5m2"}, "1a3606a25bdf3f49"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_codes_and_scales(fields, expected):
    recipe = {gemm: "none" for gemm in ("fprop", "dgrad", "wgrad")}
    x, none = {"grid": "e2m1", **fields}, {"grid": "none"}
    spec = Recipe.from_dict(recipe | {"fprop": {"x": x, "w": none}}).operand("fprop.x").spec
    y = spread()
    largest = reference_impl.amax(y, 1, None, spec.per_row)
    want = ("packed",) if x["grid"] == "e2m1" else ("values",)
    made = reference_impl.quantize(y, spec, 1, largest, None, philox.Draw(RNG, LAYER), want)
    parts = (made.packed.codes, made.packed.block_scales, made.scale) if made.packed else (made.values, made.scale)
    assert sha(*parts) == expected
