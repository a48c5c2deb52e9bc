"""Every quantizer and layer once more, in numpy, from the written contract alone: docs/numerics.md, docs/formats.md and
their papers; nothing of `quant` or `kernels`. numpy's float32 where the contract says FP32, tables for smaller floats.
Operands are [rows, contraction]. Random bits belong to at = (seed, step, micro-batch, layer) and a stream."""

from dataclasses import dataclass
from typing import Any

import numpy as np

F, Array = np.float32, np.ndarray


def minifloat(exponent: int, mantissa: int, bias: int, codes: int) -> Array:
    """The values of the first codes of an unsigned small float with subnormals."""
    e, m = np.divmod(np.arange(codes), 1 << mantissa)
    return np.where(e == 0, m * 2.0 ** (1 - bias), ((1 << mantissa) + m) * 2.0 ** (e - bias)) / (1 << mantissa)


E2M1, E4M3, E5M2 = minifloat(2, 1, 1, 8), minifloat(4, 3, 7, 127), minifloat(5, 2, 15, 124)  # to 6, 448, 57344
UE5M3 = minifloat(5, 3, 15, 248)  # to 61440
E6M2 = (2.0 ** np.arange(-48, 16)[:, None] * (1 + np.arange(4) / 4)).ravel()[:-1]  # 2^-48 to 49152


def nearest(x: Array, values: Array) -> Array:
    """Codes of the nearest of ascending values, ties to the even code; beyond the ends the end."""
    middle = (values[1:] + values[:-1]) / 2
    code = np.searchsorted(middle, np.asarray(x, float))  # a tie goes down
    return code + ((np.append(middle, np.inf)[code] == x) & (code % 2 == 1))


def rne(x: Array, values: Array) -> Array:
    return np.copysign(values[nearest(np.abs(x), values)], x).astype(F)


def bf16(x: Array) -> Array:
    bits = np.ascontiguousarray(x, F).view(np.uint32)
    return (bits + np.uint32(0x7FFF) + (bits >> 16 & 1) & np.uint32(0xFFFF0000)).view(F)


def dither(x: Array, values: Array, words: Array) -> Array:
    """FP32 to the lower or upper neighbour: up iff the word's upper 24 bits are below fraction * 2^24."""
    x = np.clip(x, F(values[0]), F(values[-1]))
    low = np.clip(np.searchsorted(values, x.astype(float), "right") - 1, 0, len(values) - 2)
    below, above = values[low].astype(F), values[low + 1].astype(F)
    return np.where((words >> 8).astype(F) < (x - below) / (above - below) * F(2**24), above, below)


def fold(x: Array) -> Array:
    """Sums of rows, the upper half added to the lower one until one number is left."""
    while x.shape[-1] > 1:
        x = x[..., : x.shape[-1] // 2] + x[..., x.shape[-1] // 2 :]
    return x[..., 0]


def random_words(at: tuple, stream: int, count: int, bits: int = 24) -> Array:
    """Philox4x32-10 (Salmon et al., SC 2011): the words of elements 0 .. count - 1. bits 8: byte element % 4 of word
    element // 4, from the lowest, and a half."""
    if bits == 8:
        octets = random_words(at, stream, -(-count // 4)).astype("<u4").view(np.uint8)[:count]
        return octets.astype(np.uint32) << 24 | 1 << 23
    seed, step, micro, layer = at
    mask, half, blocks = np.uint64(2**32 - 1), np.uint64(32), -(-count // 4)
    c = np.full((4, blocks), ((0,), (step,), (micro,), (layer << 8 | stream,)), np.uint64)
    c[0] = np.arange(blocks)
    key = [seed % 2**32, seed >> 32]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [b >> half ^ c[1] ^ np.uint64(key[0]), b & mask, a >> half ^ c[3] ^ np.uint64(key[1]), a & mask]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return np.stack(c, 1).ravel()[:count].astype(np.uint32)


@dataclass(frozen=True)
class Grid:
    """Ascending levels: of E2M1 moved by `shift`; without one the 15 integers, or a table of 16."""

    levels: Array
    shift: float | None = None

    def round(self, u: Array) -> Array:
        if len(self.levels) == 15:
            return np.clip(np.rint(u), -7, 7) if self.shift is None else rne(u - F(self.shift), E2M1) + F(self.shift)
        t = (self.levels[1:] + self.levels[:-1]) / 2  # a tie goes to the smaller magnitude
        return self.levels[np.where(t >= 0, u[..., None] > t, u[..., None] >= t).sum(-1)].astype(F)

    def dither(self, u: Array, words: Array) -> Array:
        """Of a table to the upper neighbour, else to the one further from 0 (E2M1's before its shift)."""
        if len(self.levels) == 16:
            return dither(u, self.levels, words)
        c, magnitudes = F(self.shift or 0), np.arange(8.0) if self.shift is None else E2M1
        return np.copysign(dither(np.abs(u - c), magnitudes, words), u - c) + c

    def codes(self, u: Array, q: Array) -> Array:
        """E2M1's nibbles of level - shift, with the sign of what was rounded; level + 8; a table's numbers."""
        if self.shift is None:
            return np.searchsorted(self.levels, q) if len(self.levels) == 16 else q + 8
        return np.searchsorted(E2M1, np.abs(q - self.shift)) + 8 * np.signbit(u - F(self.shift))


def tables_to_120(text: str, mirror: bool = False) -> tuple[Grid, ...]:
    levels = [np.array(f"-120 {row} 120".split(), float) for row in text.split(",")]
    return tuple(map(Grid, levels + [-levels[0][::-1]] * mirror))


FLOATS = [Grid(np.concatenate([-E2M1[:0:-1], E2M1]) + shift, shift) for shift in (0.0, 0.5, -0.5)]
INTEGERS = Grid(np.arange(-7.0, 8))
FAMILIES = {
    "e2m1": (FLOATS[0],),
    "int4": (INTEGERS,),
    "if4": (FLOATS[0], INTEGERS),
    "sfp4": tuple(FLOATS),
    "po2_gauss": tables_to_120("-88 -72 -56 -40 -26 -13 0 10 20 32 48 64 80 104", mirror=True),
    "po2_mix": tables_to_120("-88 -64 -44 -30 -18 -8 0 6 14 24 36 52 72 96", mirror=True),
    "po4_gauss": tables_to_120(
        "-96 -72 -56 -40 -28 -15 -3 8 18 30 44 56 72 96, -88 -72 -56 -44 -32 -20 -8 3 14 26 40 52 64 88, "
        "-104 -80 -64 -48 -32 -18 -6 6 20 36 48 64 80 104, -80 -64 -48 -36 -24 -12 0 11 22 32 44 60 80 96"
    ),
    "po4_mix": tables_to_120(
        "-88 -60 -44 -30 -18 -10 -2 4 12 22 32 44 64 88, -96 -72 -52 -36 -24 -13 -5 2 9 18 28 40 56 80, "
        "-104 -80 -64 -48 -32 -20 -7 5 18 32 48 64 80 104, -72 -56 -40 -26 -16 -7 0 7 15 24 36 52 72 96"
    ),
}


@dataclass
class Result:
    """value: level * block scale. outer: of the tensor, or [rows, 1]. Of blocks scale and grid, of elements codes."""

    value: Array
    outer: Any
    scale: Array | None = None
    member: Array | None = None
    code: Array | None = None


def cut(x: Array, a: int, b: int) -> Array:
    return x.reshape(x.shape[0] // a, a, x.shape[1] // b, b).transpose(0, 2, 1, 3).reshape(-1, a * b)


def join(x: Array, a: int, b: int, shape: tuple) -> Array:
    return x.reshape(shape[0] // a, shape[1] // b, a, b).transpose(0, 2, 1, 3).reshape(shape)


def tensor_scale(amax: Any, limit: float) -> Any:
    """1 for 0, NaN for what isn't finite, never below the smallest normal FP32."""
    return F(1) if amax == 0 else max(F(amax) / F(limit), F(2.0**-126)) if np.isfinite(amax) else F(np.nan)


def candidates(b: Array, T: Any, family: tuple, select: str, stretch: float, scales: Array, search: tuple) -> list:
    """(number of the grid, block scales; 0 is dead) in the order in which they win ties. b [blocks, elements]."""
    up, down = np.maximum(b.max(-1), F(0)), np.maximum((-b).max(-1), F(0))

    def fitted(p: float, n: float, times: float = 1.0) -> Array:
        """The scale under which a block fits levels -n to p: one quotient where they are equal."""
        r = F(times) * (np.maximum(up, down) / (F(stretch * p) * T))
        r = r if p == n else np.maximum(up / (F(stretch * p) * T), down / (F(stretch * n) * T))
        return scales[nearest(np.minimum(r, F(scales[-1])), scales)].astype(F)

    if select == "search":
        six = nearest(fitted(6, 6), scales)
        steps = [*range(search[1] + 1), *range(-1, search[0] - 1, -1)]
        return [(0, np.where(six == 0, 0, scales[np.clip(six + step, 1, 126)]).astype(F)) for step in steps]
    found = []
    for number, g in enumerate(family):
        found.append((number, fitted(g.levels[-1], -g.levels[0])))
        if select == "four_over_six" and g.shift is not None:
            found.append((number, fitted(4 + g.shift, 4 - g.shift) if g.shift else fitted(6, 6, 1.5)))
    return found


def nvfp4(
    x: Array, at: tuple, stream: int, grid: Any, select: str = "absmax", rounding: str = "rtn", scales: tuple = (),
    amax: float | None = None, scale_cap: float | None = None, search: tuple = (-1, 5), random_bits: int = 24,
    eden_block: Any = 16, eden_space: str = "tensor",
) -> Result:  # fmt: skip
    """Blocks under E4M3 or UE5M3 scales and one FP32 scale of the tensor, or none."""
    family = FAMILIES[grid] if isinstance(grid, str) else tuple(Grid(np.array(row, float)) for row in grid)
    steps, block = UE5M3 if "ue5m3" in str(scales) else E4M3, (16 if "16x16" in str(scales) else 1, 16)
    top, fours, eden = family[0].levels[-1], select == "four_over_six", rounding == "ms_eden"
    v = {"rtn": top, "sr": top * 16 / 17, "ms_eden": top * 16 / 17 / 0.93}[rounding]
    cap = 448 if select == "absmax" and not eden else 256
    if grid == "sfp4" and fours == eden:  # a block's extreme may lie on the short side
        cap = 208 if eden else 384
    T = tensor_scale(amax or np.abs(x).max(), (scale_cap or cap) * v) if scales != ["1x16 ue5m3"] else F(1)
    b = cut(x, *block)
    u, q, alive, member = np.copysign(F(0), b), np.zeros_like(b), np.zeros(len(b), bool), np.zeros(len(b), int)
    s = best = np.ones(len(b), F)
    for number, scale in candidates(b, T, family, select, v / top, steps, search):  # the earlier wins a tie
        one = b / (np.where(scale > 0, scale, F(1)) * T)[:, None]
        level = family[number].round(one)
        error = scale * scale * fold((level - one) ** 2)
        take = (scale > 0) & ((error < best) | ~alive)
        best, member, s = np.where(take, error, best), np.where(take, number, member), np.where(take, scale, s)
        u, q, alive = np.where(take[:, None], one, u), np.where(take[:, None], level, q), alive | take
    if rounding == "sr":
        words = cut(random_words(at, stream, x.size, random_bits).reshape(x.shape), *block)
        for number, g in enumerate(family):
            q = np.where((alive & (member == number))[:, None], g.dither(u, words), q)
    if eden:
        groups = 1 if eden_block == 16 else 8
        weight = F(1) if eden_space == "scaled" or groups == 1 else s * s
        squares, products = ((weight * fold(p)).reshape(-1, groups).sum(-1) for p in (u * u, u * q))
        S = np.repeat(np.where(products == 0, F(1), squares / np.where(products == 0, F(1), products)), groups)
        s = dither(np.minimum(S * s, F(448)), steps, random_words(at, stream, len(b)))
        alive &= s > 0
        s, q = np.where(alive, s, F(1)), np.where(alive[:, None], q, F(0))
    member = np.where(alive, member, next(i for i, g in enumerate(family) if 0 in g.levels))
    code = np.choose(member[:, None], [g.codes(u, q) for g in family])
    value, code = (join(part, *block, x.shape) for part in (q * s[:, None], code))
    return Result(value, T, s, member, code)


def mxfp4(
    x: Array, at: tuple, stream: int, scale_rule: str = "floor", rounding: str = "rtn", prescale: float = 1.0,
    macro_bits: int | None = None, random_bits: int = 24,
) -> Result:  # fmt: skip
    """E2M1 in 1x32 under powers of two, and a factor for each 128 elements."""
    factor = np.ones(x.size // 32, F)
    if macro_bits:
        m = 2 * np.frexp(np.abs(cut(x, 1, 128)).max(-1) / F(6))[0]  # the significand, in [1, 2)
        up = np.ceil(m * 2**macro_bits) / 2**macro_bits
        factor = np.repeat(np.where((up == 0) | (up == 2), 1, up).astype(F), 4)
    b = cut(x, 1, 32) / factor[:, None]
    m, e = np.frexp(np.abs(b).max(-1))  # m in [1/2, 1)
    e = e - 3 + (m >= {"floor": 2, "even": 1.75 / 2, "ceil": np.nextafter(F(0.75), F(1)), "rms": 2}[scale_rule])
    if scale_rule == "rms":
        e = np.rint(np.log2(2.92247856 / 6 * np.sqrt((b.astype(float) ** 2).mean(-1)) + (m == 0)))
    s = np.where(m > 0, 2.0 ** np.clip(e, -126, 127), 1).astype(F)
    u = b * F(prescale) / s[:, None]  # under the scale of what came, so that nothing clips
    words = cut(random_words(at, stream, x.size, random_bits).reshape(x.shape), 1, 32)
    q = rne(u, E2M1) if rounding == "rtn" else FLOATS[0].dither(u, words)
    value, code = (join(part, 1, 32, x.shape) for part in (q * (s * factor)[:, None], FLOATS[0].codes(u, q)))
    return Result(value, F(1 / prescale), s * factor, code=code)


def hif4(x: Array) -> Result:
    """HiFloat4 (arXiv 2602.11287): 64 elements under E6M2, one bit more for each 8 and for each 4."""
    b = cut(x, 1, 64)
    a, each = np.abs(b), np.repeat
    s = E6M2[nearest(np.clip(bf16(a.max(-1) * bf16(F(1) / F(7))), E6M2[0], E6M2[-1]), E6M2)].astype(F)[:, None]
    inverse = bf16(F(1) / s)
    e8 = a.reshape(-1, 8, 8).max(-1) * inverse >= 4
    e4 = a.reshape(-1, 16, 4).max(-1) * inverse / F(2) ** each(e8, 2, 1) >= 2
    step = F(2) ** (each(e8, 8, 1).astype(int) + each(e4, 4, 1))
    m = np.minimum(np.floor(a / step * inverse * F(4) + F(0.5)), 7)
    value, code = (join(part, 1, 64, x.shape) for part in (np.copysign(m / 4 * step * s, b), m + 8 * np.signbit(b)))
    return Result(value.astype(F), F(1), code=code)


def operand(x: Array, slot: dict, at: tuple, stream: int) -> Result:
    """What a recipe file's slot makes of x."""
    o = {key: value for key, value in slot.items() if key != "source"}
    grid, scales = o.get("grid", "none"), o.get("scales")
    if grid == "none":
        return Result(x, F(1))
    if grid in ("e4m3", "e5m2"):
        values = E4M3 if grid == "e4m3" else E5M2
        amax = np.abs(x).max(-1) if scales == ["row fp32"] else [np.abs(x).max()]
        outer = np.array([[tensor_scale(largest, values[-1])] for largest in amax])
        return Result(rne(x / outer, values), outer)
    if not np.isfinite(x).all():
        return Result(x, F(np.nan))
    if scales == ["1x32 e8m0"]:
        return mxfp4(x, at, stream, **{key: o[key] for key in o.keys() - {"grid", "scales"}})
    return hif4(x) if grid == "hif4" else nvfp4(x, at, stream, **o)


def turned(x: Array, turn: dict | None, at: tuple, stream: int) -> Array:
    """x D_0 H D_1 H .. in blocks: sign i of round r is minus where the top bit of word r dim + i is set."""
    if not turn:
        return x
    dim, rounds = turn["dim"], turn.get("rounds", 1)
    H, blocks = np.array([[(-1.0) ** (i & j).bit_count() for j in range(dim)] for i in range(dim)]), x.reshape(-1, dim)
    for diagonal in np.where(random_words(at, stream, rounds * dim) >> 31, -1.0, 1.0).reshape(rounds, dim):
        blocks = blocks * diagonal @ H
    return blocks.reshape(x.shape).astype(F)


def layer(recipe: dict, x: Array, w: Array, dy: Array, at: tuple) -> list[tuple[Array, Array]]:
    """Y, dX and dW of six slots, each in FP64 and with the bound of its FP32 sum. x, w, dy: FP32 that holds BF16."""
    tensors = {"fprop": {"x": x, "w": w}, "dgrad": {"dy": dy, "w": w.T}, "wgrad": {"dy": dy.T, "x": x.T}}
    used, found = {}, []
    for number, gemm in enumerate(tensors):
        turn, pair = recipe[gemm].get("rotation"), []
        for i, (name, tensor) in enumerate(tensors[gemm].items()):
            source = (slot := recipe[gemm].get(name, {})).get("source", "input")
            again = Result(tensor, F(1)) if source == "input" else Result(used[name].value.T, used[name].outer)
            if source != "fprop_transposed":  # what fprop used is quantized without its outer scale
                made = operand(turned(again.value, turn, at, number), slot, at, 16 + 2 * number + i)
                again, made.outer = made, made.outer * again.outer
            pair.append(again)
            used |= {name: again} if gemm == "fprop" else {}
        scales = np.asarray(pair[0].outer, float) * np.asarray(pair[1].outer, float).T
        scales = scales * (float(turn["dim"]) ** -turn.get("rounds", 1) if turn else 1.0)
        left, right = (q.value.astype(float) for q in pair)
        found.append((left @ right.T * scales, len(left.T) * 2.0**-23 * scales * (np.abs(left) @ np.abs(right).T)))
    return found
