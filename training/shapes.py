"""Whether a plan's quantizers fit the layers and the micro-batch, checked before anything is allocated."""

from quant.plan import Entry, Plan
from quant.recipe import GEMMS, Recipe
from training.derive import Numbers


def check_shapes(plan: Plan, numbers: Numbers) -> None:
    """Raise ValueError, with what to type, where a contraction or a square block doesn't divide."""
    for entry in plan.entries:
        outputs, inputs = entry.shape
        for gemm, size in (("fprop", inputs), ("dgrad", outputs)):
            need, why = needed_multiple(entry.recipe, gemm)
            if size % need:
                raise ValueError(_layer_error(entry, gemm, size, need, why))
        if entry.recipe.fprop.operands[1].spec.is_square and outputs % 16:
            raise ValueError(_layer_error(entry, "fprop", outputs, 16, "16x16 blocks"))
        need, why = needed_multiple(entry.recipe, "wgrad")
        if numbers.micro_tokens % need:
            raise ValueError(
                f"{entry.name}: wgrad contracts over the {numbers.micro_tokens} tokens of a micro-batch "
                f"(batch.micro={numbers.micro} x batch.seq_len={numbers.seq_len}), not a multiple of {need} ({why}); "
                f"set batch.seq_len={-(-numbers.seq_len // need) * need}, another batch.micro, or quant.wgrad=none"
            )


def needed_multiple(recipe: Recipe, gemm: str) -> tuple[int, str]:
    """(what the contraction must be a multiple of, why) for one GEMM of a recipe."""
    assert gemm in GEMMS
    product = recipe.gemm(gemm)
    if product.rotation_dim:
        return product.rotation_dim, f"quant.{gemm}.rotation.dim={product.rotation_dim}"
    if any(operand.spec.is_nvfp4 for operand in product.operands):
        return 16, "NVFP4 blocks of 16"
    return 1, ""


def saves_packed(plan: Plan) -> bool:
    """Whether the forward keeps its activations in 4 bits (the head aside)."""
    return any(entry.recipe.operand("fprop.x").spec.is_nvfp4 for entry in plan.entries)


def _layer_error(entry: Entry, gemm: str, size: int, need: int, why: str) -> str:
    return (
        f"{entry.name}: {gemm} needs a multiple of {need} ({why}), and its dimension is {size}; set quant.{gemm}=none, "
        f"a smaller rotation, another model.width or model.hidden, or keep the layer out: "
        f"quant.rules='[{{match: \"{entry.name}\", recipe: bf16}}]'"
    )
