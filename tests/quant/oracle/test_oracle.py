"""The library against definition.py: every legal quantizer's values, codes, scales and grids bit for bit, and the three
products of every recipe file of six slots within the bound of an FP32 sum."""

from contextlib import suppress
from itertools import product

import numpy as np
import pytest
import torch
from oracle import definition
from oracle.definition import E2M1, FAMILIES, F, bf16
from support import SLOT_RECIPES
from torch import nn

from kernels import backend
from kernels import quantize as ops
from kernels.formats.nibbles import unpack
from kernels.philox import Draw
from quant import library
from quant.recipe import Recipe

AT = (0x1234567890ABCDEF, 5, 3, 7)
RNG, LAYER = torch.tensor(AT[:3]), torch.tensor(AT[3])
SCALES = [["tensor fp32", "1x16 e4m3"], ["tensor fp32", "16x16 e4m3"], ["tensor fp32", "1x16 ue5m3"], ["1x16 ue5m3"]]
CHOICES = product(FAMILIES, ("absmax", "four_over_six", "search"), ("rtn", "sr", "ms_eden"), SCALES)
WRITTEN = [dict(zip(("grid", "select", "rounding", "scales"), choice, strict=True)) for choice in CHOICES]
MX = {"grid": "e2m1", "scales": ["1x32 e8m0"]}
RULES = product(("floor", "even", "ceil", "rms"), ("rtn", "sr"), (1.0, 0.75), (None, 3, 5))
WRITTEN += [MX | dict(zip(("scale_rule", "rounding", "prescale", "macro_bits"), rule, strict=True)) for rule in RULES]
WRITTEN += [{"grid": g, "scales": s} for g in ("e4m3", "e5m2") for s in (["tensor fp32"], ["row fp32"])]
WRITTEN += [{"grid": "hif4"}, *({"grid": g, "rounding": "sr", "random_bits": 8} for g in ("e2m1", "int4", "po2_mix"))]
WRITTEN += [{"grid": "e2m1", "select": "search", "search": [-3, 8]}, {"grid": "e2m1", "scale_cap": 204.8}]
SPECS, NONE = {}, {"grid": "none"}
for slot in WRITTEN:  # those that are refused are left out
    with suppress(ValueError):
        turn = {"dim": 16 if "ms_eden" in slot.values() else None}
        gemms = {"dgrad": {"rotation": turn, "dy": slot, "w": NONE}, "wgrad": {"dy": NONE, "x": NONE}}
        spec = Recipe.from_dict({"name": "one", "fprop": {"x": NONE, "w": NONE}, **gemms}).operand("dgrad.dy").spec
        SPECS[" ".join(map(str, slot.values()))] = slot, spec


def tensors() -> dict[str, np.ndarray]:
    """[16, 128] FP32 that holds BF16."""
    g = np.random.default_rng(0)
    n, t = g.standard_normal((16, 128)), g.standard_t(3, (16, 128))
    made = {"normal": n, "heavy": t, "negative": -abs(n), "tiny": n * 1e-5, "huge": n * 2.0**60, "sparse": t * (n > 1)}
    made |= {"powers": 2.0 ** g.integers(-9, 9, n.shape) * np.sign(n), "zeros": n * 0}
    made["outlier"], made["faint"] = np.where(n == n[7, 7], -3e7, n), np.where(n == n[0, 0], 1536, n / 90)
    made["empty blocks"] = n * np.repeat(g.random((16, 8)) < 0.5, 16, 1) * (np.arange(16) != 5)[:, None]
    made["one in a row"] = n * (np.arange(128) == g.integers(0, 128, (16, 1)))
    made["blocks apart"] = n * np.exp(6 * g.standard_normal((16, 8))).repeat(16, 1)
    made["NaN"], made["infinite"] = (np.where(n == n[3, 3], bad, n) for bad in (np.nan, np.inf))
    ends = [(E2M1, 448), (E2M1, 256), (np.arange(8.0), 448), (np.arange(8.0) / 4, 1)]
    ends += [(FAMILIES[grid][-1].levels, cap) for grid, cap in (("sfp4", 384), ("po2_mix", 448), ("po4_gauss", 448))]
    for levels, cap in ends:  # and what lies halfway, under a scale of the tensor of 1
        ties = g.choice(np.concatenate([levels, (levels[1:] + levels[:-1]) / 2]), n.shape) * np.sign(t)
        ties[:, ::16], ties[0, 0] = levels[-1], max(levels) // 1 * cap
        made[f"ties of {levels[-2:]} {cap}"] = ties
    return {name: np.where(np.isfinite(x), bf16(x), x).astype(F) for name, x in made.items()}


TENSORS = tensors()
assert len(SPECS) == 90  # none is forgotten


@pytest.mark.parametrize("name", SPECS)
def test_quantizer(name):
    backend.use("reference")
    slot, spec = SPECS[name]
    for kind, x in TENSORS.items():
        want, given = definition.operand(x, slot, AT, 18), torch.from_numpy(x).bfloat16()
        amax, draw = ops.amax(given, 1, None, spec.per_row), Draw(RNG, LAYER, 2)
        got = ops.quantize(given, spec, 1, amax, None, draw, ("values", "packed") if spec.is_blocked else ("values",))
        assert np.array_equal(got.scale.ravel(), np.ravel(want.outer), equal_nan=True), kind
        if np.isnan(want.outer).any():
            continue  # codes are unspecified
        pairs, packed = [(got.values, want.value)], got.packed
        if spec.is_blocked:
            pairs += [(unpack(packed.codes), want.code), (packed.values(), want.value)]
            if want.scale is not None:
                pairs += [(spec.scaling.decode(packed.block_scales).abs()[:: spec.rows], want.scale)]
            if len(spec.family.members) > 1:
                pairs += [(packed.block_members(), want.member)]
        assert all(np.array_equal(a.ravel(), b.ravel()) for a, b in pairs), kind


@pytest.mark.parametrize("name", SLOT_RECIPES)
def test_layer(name):
    """Multiples of a power of two: rotating them is exact in FP32."""
    backend.use("reference")
    g = np.random.default_rng(1)
    x, w, dy = (bf16(np.clip(np.rint(g.standard_t(4, s) * 8), -99, 99)) for s in ((128, 128), (256, 128), (128, 256)))
    x[:, 16:48], x[3], w[:, 64:80], dy[:, 32:96] = 0, 0, 0, 0
    w, dy = w / F(512), dy / F(2**20)
    linear = nn.Linear(128, 256, bias=False)
    linear.weight.data.copy_(torch.from_numpy(w))
    leaf = torch.from_numpy(x).bfloat16().requires_grad_()
    y = library.load(name).build(linear, AT[3], RNG)(leaf)
    y.backward(torch.from_numpy(dy).bfloat16())
    made = y, leaf.grad, linear.weight.grad
    for got, (exact, bound) in zip(made, definition.layer(library.mapping(name), x, w, dy, AT), strict=True):
        half = (2.0**-8 if got.dtype == torch.bfloat16 else 2.0**-22) * np.abs(exact)
        assert (np.abs(got.detach().double().numpy() - exact) <= bound + half).all()
