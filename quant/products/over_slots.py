"""A product around six slots: it changes what goes into them and comes out, and answers everything else as they do.

Its recipe file has the fields of a recipe of slots beside `scheme` and what fields the class has itself.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from quant.product import Divisor, Kept, Product
from quant.recipe import Gemm, Operand, Recipe


@dataclass(frozen=True)
class OverSlots(Product):
    """scheme: its name in recipe files. about: a line for the start screen."""

    slots: Recipe

    scheme: ClassVar[str]

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> "OverSlots":
        own = set(cls.own())
        slots = {key: value for key, value in mapping.items() if key not in own and key != "scheme"}
        return cls(Recipe.from_dict(slots), **{key: mapping[key] for key in own & mapping.keys()})

    @classmethod
    def own(cls) -> list[str]:
        """The fields of a recipe file that are the class's, not the slots'."""
        return [field.name for field in fields(cls) if field.init and field.name != "slots"]

    @property
    def about(self) -> str:
        raise NotImplementedError

    @property
    def name(self) -> str:
        return self.slots.name

    @property
    def is_quantized(self) -> bool:
        return self.slots.is_quantized

    @property
    def options(self) -> dict[str, Any]:
        """What the class adds to the slots, as the recipe file has it."""
        return {"scheme": self.scheme} | {name: getattr(self, name) for name in self.own()}

    def to_dict(self) -> dict[str, Any]:
        return self.slots.to_dict() | self.options

    def numerics(self) -> dict[str, Any]:
        return self.slots.numerics() | self.options

    def describe(self, label: str) -> list[str]:
        return [*self.slots.describe(label), f"  {self.scheme:9} {self.about}"]

    @property
    def forward_draws(self) -> bool:
        return self.slots.forward_draws

    def exact_backward(self) -> Product:
        return replace(self, slots=self.slots.exact_backward())

    def unsupported(self) -> str | None:
        return self.slots.unsupported()

    def divisors(self) -> Iterator[Divisor]:
        return self.slots.divisors()

    def kept_bytes(self) -> Kept:
        return self.slots.kept_bytes()

    def audited(self) -> Recipe:
        return self.slots

    def operands(self) -> dict[str, Operand]:
        return self.slots.operands()

    def operand(self, slot: str) -> Operand:
        return self.slots.operand(slot)

    def gemm(self, name: str) -> Gemm:
        return self.slots.gemm(name)

    def plain(self) -> Product:
        return self.slots.plain()

    def alone(self) -> dict[str, Product]:
        return {gemm: replace(self, slots=slots) for gemm, slots in self.slots.alone().items()}
