"""The product of six operand slots: what a recipe file without `scheme` computes (quant/recipe.py).

Kept from forward to backward, and nothing else: for dgrad.w and wgrad.x what their `source` names.
    fprop, fprop_transposed   what fprop multiplied: 4-bit codes and scales, FP8 bytes and scale, or the tensor itself
    input, dgrad.w            nothing: the FP32 master weight is there anyway
    input, wgrad.x            the operand of wgrad itself, quantized in the forward where it is quantized (random bits
                              are counters, so it is the same operand), else x in BF16
The gradient of the quantizers is the straight-through one: dX and dW are those of the quantized product.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kernels import backend
from kernels import gemm as gemms
from kernels import quantize as ops
from kernels.formats.nvfp4 import NVFP4Tensor
from kernels.philox import Draw
from kernels.quantize import Quantized
from kernels.rotation import is_heavy, partner
from kernels.spec import LATER_FIELDS
from quant.held import Held, Plain, Wish, hold
from quant.linear import Call
from quant.names import FPROP_SLOT, GEMMS, SLOTS
from quant.product import BYTES_BF16, Divisor, Kept, Product

BYTES_FP8 = 1.0
# Contraction axis of each operand in its natural layout.
AXES = {"fprop.x": 1, "fprop.w": 1, "dgrad.dy": 1, "dgrad.w": 0, "wgrad.dy": 0, "wgrad.x": 0}


class Slots(Product):
    """The behaviour of quant.recipe.Recipe, whose data are `gemm(name)`, with its rotation, and `operand(slot)`."""

    def audited(self) -> "Slots":
        return self

    def operands(self) -> dict[str, Any]:
        return {slot: self.operand(slot) for slot in SLOTS}

    @property
    def is_quantized(self) -> bool:
        return any(self.gemm(name).is_quantized for name in GEMMS)

    def numerics(self) -> dict[str, Any]:
        """Without rotations that don't run: no operand of theirs is quantized."""
        fields = super().numerics()
        for name in GEMMS:
            if not self.gemm(name).is_quantized:
                fields[name] = fields[name] | {"rotation": asdict(type(self.gemm(name).rotation)())}
        return fields

    @classmethod
    @cache
    def bf16(cls) -> "Slots":
        """What configs/quant/bf16.yaml says."""
        return cls.from_dict({"name": "bf16", **dict.fromkeys(GEMMS, "none")})

    def plain(self) -> Product:
        return self.bf16()

    def nvfp4_weight(self, weight: Tensor) -> NVFP4Tensor | None:
        operand, rotation = self.operand("fprop.w"), self.gemm("fprop").rotation_dim
        spec = operand.spec
        if not operand.is_quantized:
            return None
        if not spec.tensor_core:
            raise ValueError(f"fprop.w is {spec.label} under {', '.join(map(str, spec.scales))}")
        if rotation:
            raise ValueError(f"fprop turns weights and activations by {rotation}, and the format has no rotation")
        if spec.draws_random_bits:
            raise ValueError(f"fprop.w rounds by {spec.rounding}: every step has codes of its own")
        wish = Wish(spec, AXES["fprop.w"], None, operand.amax, None, False, ("packed",))
        return Plain(weight).quantize(wish).packed

    def alone(self) -> dict[str, Product]:
        return {gemm: self._alone(gemm) for gemm in GEMMS}

    def _alone(self, gemm: str) -> Product:
        """Codes of fprop that `gemm` reuses are made from its input."""
        fields = self.to_dict()
        own = dict(fields[gemm])
        for slot, name in FPROP_SLOT.items():
            of, operand = slot.split(".")
            used = self.operand(slot)
            if gemm == of and used.is_quantized and used.source == "fprop_transposed":
                own[operand] = fields["fprop"][name] | {"source": "input"}
        return self.from_dict({"name": self.name, **dict.fromkeys(GEMMS, "none"), gemm: own})

    @property
    def forward_draws(self) -> bool:
        gemm = self.gemm("fprop")
        return gemm.rotation_dim is not None or any(operand.spec.draws_random_bits for operand in gemm.operands)

    def exact_backward(self) -> Product:
        return replace(self, dgrad=self.gemm("dgrad").unquantized, wgrad=self.gemm("wgrad").unquantized)

    def unsupported(self) -> str | None:
        """4-bit tensor cores need two 4-bit operands: emulating one is a choice to be made, not a fallback."""
        if not backend.IMPL or gemms.wants() != "packed":
            return None
        for name in GEMMS:
            if sum(operand.spec.tensor_core for operand in self.gemm(name).operands) == 1:
                return (
                    f"one operand of {name} is NVFP4 and the other is not; 4-bit tensor cores need both. "
                    f"Quantize both or neither (quant.{name}=none), or emulate: backend=triton"
                )
        return None

    def divisors(self) -> Iterator[Divisor]:
        """A GEMM's contraction is divided by its rotation or blocks, the operands' other sides by square blocks."""
        for gemm, size, others in (
            ("fprop", "in_features", ("tokens", "out_features")),
            ("dgrad", "out_features", ("tokens", "in_features")),
            ("wgrad", "tokens", ("out_features", "in_features")),
        ):
            operands = self.gemm(gemm).operands
            block = max(operand.spec.multiple for operand in operands)  # all are powers of two
            forward = gemm == "fprop"
            yield Divisor(size, max(self.gemm(gemm).rotation_dim or 1, block), f"rotation or block of {gemm}", forward)
            for other, operand, slot in zip(others, operands, _slots(gemm), strict=True):
                if operand.spec.rows > 1:
                    yield Divisor(other, operand.spec.rows, f"rotation or block of {slot}", forward)

    def kept_bytes(self) -> Kept:
        """As `forward` decides it: fprop's operand, the backward's own, or the tensor (a weight: the master)."""
        wgrad_x = self.operand("wgrad.x")
        if self.keeps_fprop("wgrad.x"):
            inputs = bytes_of(self.operand("fprop.x"))
        else:
            inputs = bytes_of(wgrad_x) if wgrad_x.source == "input" else BYTES_BF16
        return Kept(inputs, bytes_of(self.operand("fprop.w")) if self.keeps_fprop("dgrad.w") else 0.0)

    def describe(self, label: str) -> list[str]:
        if not self.is_quantized:
            return [f"{label}: all six operands unquantized"]
        return [f"{label}:", *(f"  {slot:9} {self._described(slot)}" for slot in SLOTS)]

    def _described(self, slot: str) -> str:
        operand, spec = self.operand(slot), self.operand(slot).spec
        if not operand.is_quantized:
            return f"bf16, source {operand.source}"
        if operand.source == "fprop_transposed":
            return f"codes of fprop.{FPROP_SLOT[slot]}"
        rotation = self.gemm(slot.split(".")[0]).rotation
        rounds = f" {rotation.rounds} rounds" if rotation.rounds != 1 else ""
        turned = f", rotation {rotation.dim} {rotation.signs}{rounds}" if rotation.dim else ""
        eden = f" per {spec.eden_block}" if spec.rounding == "ms_eden" else ""
        how = f"{spec.label} {str(spec.scales[-1]).split()[0]} {spec.select} {spec.rounding}{eden}"
        limits = f"max {spec.target_max:g} cap {spec.scale_cap:g}"
        reason = ops.supports(spec, _most_rounds(rotation)) if backend.IMPL else None
        slow = f"; runs the reference: {reason}" if reason else ""
        return f"{how}, {limits}, source {operand.source}{turned}{_unusual(operand)}{slow}"

    # --- the three products ---------------------------------------------------------------------------------------

    def forward(self, call: Call, x: Tensor, weight: Tensor, keep: bool) -> tuple[Tensor, Sequence[Held]]:
        signs = self.signs(call, "fprop", Plain(x), Plain(weight))
        qx, kept_x = self.input_operands(call, Plain(x), signs, keep)
        qw, kept_w = self.weight_operand(call, Plain(weight), self.partner("fprop", signs), keep)
        y = self.multiply(qx, qw, "fprop", torch.bfloat16)
        return y, (kept_w, kept_x) if keep else ()

    def gradients(self, call: Call, dy: Tensor, needed: tuple[bool, bool], kept: Sequence[Held]) -> tuple:
        """(operand, signs of its GEMM) twice. From one call where both are quantized: then dY is read less often."""
        slots = ("dgrad.dy", "wgrad.dy")
        signs = self.signs(call, "dgrad", Plain(dy), kept[0]), self.signs(call, "wgrad", Plain(dy), kept[1])
        if all(needed) and self._together(call, slots):
            made = self._both_axes(call, dy, slots, signs, tuple(map(self.wants, slots)))
            return tuple(zip(made, signs, strict=True))
        return tuple(
            (self.operand_of(call, Plain(dy), slot, sign), sign) if need else None
            for slot, sign, need in zip(slots, signs, needed, strict=True)
        )

    def input_gradient(self, call: Call, dy: tuple, kept: Sequence[Held]) -> Tensor:
        a, signs = dy
        b = self.operand_of(call, kept[0], "dgrad.w", self.partner("dgrad", signs))
        return self.multiply(a, b, "dgrad", torch.bfloat16)

    def weight_gradient(self, call: Call, dy: tuple, kept: Sequence[Held]) -> Tensor:
        a, signs = dy
        b = self.operand_of(call, kept[1], "wgrad.x", self.partner("wgrad", signs))
        return self.multiply(a, b, "wgrad", torch.float32)

    def multiply(self, a: Quantized, b: Quantized, name: str, out_dtype: torch.dtype) -> Tensor:
        """One GEMM; what undoes the unnormalised rotation goes into the scalar on the FP32 accumulator."""
        return gemms.gemm(a, b, name, self.gemm(name).alpha, out_dtype)

    def input_operands(self, call: Call, x: Plain, signs: Tensor | None, keep: bool) -> tuple[Quantized, Held]:
        """X as operand of fprop, and what is kept of it; made together where wgrad quantizes x itself."""
        slots, wants = ("fprop.x", "wgrad.x"), self.wants("fprop.x")
        if keep and self.keeps_fprop("wgrad.x"):
            qx = self.operand_of(call, x, "fprop.x", signs, _union(wants, self.stored("fprop.x")))
            return qx, hold(qx, self.operand("fprop.x").spec)
        wgrad_x = self.operand("wgrad.x")
        if not keep or wgrad_x.source != "input" or not wgrad_x.is_quantized:
            return self.operand_of(call, x, "fprop.x", signs, wants), x
        turned = self.signs(call, "wgrad")
        if self._together(call, slots):
            qx, made = self._both_axes(call, x.values(), slots, (signs, turned), (wants, self.stored("wgrad.x")))
        else:
            qx = self.operand_of(call, x, "fprop.x", signs, wants)
            made = self.operand_of(call, x, "wgrad.x", turned, self.stored("wgrad.x"))
        return qx, hold(made, wgrad_x.spec)

    def weight_operand(self, call: Call, weight: Plain, signs: Tensor | None, keep: bool) -> tuple[Quantized, Held]:
        """W as operand of fprop, and what is kept of it: the master weight itself where dgrad starts from that."""
        wants = self.wants("fprop.w")
        if not (keep and self.keeps_fprop("dgrad.w")):
            return self.operand_of(call, weight, "fprop.w", signs, wants), weight
        qw = self.operand_of(call, weight, "fprop.w", signs, _union(wants, self.stored("fprop.w")))
        return qw, hold(qw, self.operand("fprop.w").spec)

    def operand_of(
        self, call: Call, held: Held, slot: str, signs: Tensor | None, want: tuple[str, ...] | None = None
    ) -> Quantized:
        """The operand of a slot from what is there; `want`: other than what its GEMM multiplies."""
        operand = self.operand(slot)
        want = self.wants(slot) if want is None else want
        turned = operand.source != "input"
        shaped = self.feedback(call, slot)
        wish = Wish(operand.spec, AXES[slot], signs, operand.amax, _draw(call, slot), turned, want, shaped)
        # Quantized for this slot, or fprop's codes as they are. Behind a rotation only an unquantized operand has
        # source fprop_transposed: it is turned, as its partner is.
        is_made = operand.source == "input" or (operand.source == "fprop_transposed" and signs is None)
        if held.is_quantized and is_made:
            return held.operand(wish)
        if call.watch is not None:
            call.watch.count(slot, held, wish)
        return held.quantize(wish)

    def feedback(self, call: Call, slot: str) -> Tensor | None:
        """Of shaped rounding in this slot (quant/products/shaped.py); None where each element is rounded by itself."""
        return None

    def signs(self, call: Call, name: str, *operands: Held) -> Tensor | None:
        """The rotation of the GEMM's first operand (ops.rotation), or None without one; `partner` is the second's.

        operands: what they are made from, in slot order; where the rounds depend on them."""
        gemm = self.gemm(name)
        if gemm.rotation_dim is None:
            return None
        place = call.rng, call.layer, GEMMS.index(name), gemm.rotation_dim
        if gemm.rotation.rounds != "auto":
            return ops.rotation(*place, gemm.rotation.rounds, gemm.rotation.signs)
        checked = zip(operands, _slots(name), strict=True)
        heavy = [is_heavy(held.values(), AXES[slot], gemm.rotation_dim) for held, slot in checked]
        return ops.rotation_by_need(*place, gemm.rotation.signs, heavy[0] | heavy[1])

    def partner(self, name: str, signs: Tensor | None) -> Tensor | None:
        """The second operand's rotation: the same, but for a power of two where the rounds depend on the operands."""
        return partner(signs) if signs is not None and self.gemm(name).rotation.rounds == "auto" else signs

    def wants(self, slot: str) -> tuple[str, ...]:
        """Packed codes for a GEMM that multiplies those, if both its operands have them; else values."""
        operands = self.gemm(slot.split(".")[0]).operands
        return (gemms.wants() if all(operand.spec.tensor_core for operand in operands) else "values",)

    def stored(self, slot: str) -> tuple[str, ...]:
        """What `hold` needs of an operand."""
        return ("packed",) if self.operand(slot).spec.is_blocked else ("values",)

    def keeps_fprop(self, slot: str) -> bool:
        """Whether the backward's operand `slot` is made from what fprop multiplied (else from the tensor itself)."""
        return self.operand(slot).source != "input" and self.operand(f"fprop.{FPROP_SLOT[slot]}").is_quantized

    def _together(self, call: Call, slots: tuple[str, str]) -> bool:
        """Whether two operands of one tensor can come from one call: quantized, by the exact amax, each element by
        itself, nobody counting."""
        operands = [self.operand(slot) for slot in slots]
        plain = call.watch is None and all(self.feedback(call, slot) is None for slot in slots)
        return plain and all(o.is_quantized and o.amax == "exact" for o in operands)

    def _both_axes(
        self, call: Call, x: Tensor, slots: tuple[str, str], signs: tuple, wants: tuple
    ) -> tuple[Quantized, Quantized]:
        """The operands of two slots from x: the first along axis 1, the second along axis 0."""
        specs = tuple(self.operand(slot).spec for slot in slots)
        return ops.quantize_both(x, specs, signs, tuple(_draw(call, slot) for slot in slots), wants)


def _most_rounds(rotation: Any) -> int:
    return 0 if rotation.dim is None else 2 if rotation.rounds == "auto" else rotation.rounds


def _draw(call: Call, slot: str) -> Draw:
    return Draw(call.rng, call.layer, SLOTS.index(slot))


def _slots(gemm: str) -> list[str]:
    return [slot for slot in SLOTS if slot.startswith(gemm)]


def _union(*wants: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word for want in wants for word in want))


def bytes_of(operand: Any) -> float:
    """Bytes of an element as it is kept: BF16, FP8, or packed with its scales."""
    return operand.spec.bits / 8


def _unusual(operand: Any) -> str:
    """The fields that a slot's line names only where they have another value than almost everywhere."""
    usual = {"eden_space": "tensor", "scale_rounding": "rtn", "tensor_scale": "fp32", **LATER_FIELDS}
    found = {key: getattr(operand.spec, key) for key in usual if getattr(operand.spec, key) != usual[key]}
    found |= {"amax": operand.amax} if operand.amax != "exact" else {}
    return "".join(f", {key} {value}" for key, value in found.items())
