"""Expected peak memory of a training step on one GPU, before anything is allocated.

States: FP32 weights, gradients and two AdamW moments, 16 bytes a parameter (a share of them under FSDP).
Activations, per token of a micro-batch and block, as autograd keeps them (D width, F hidden, in elements):

    two norm inputs in the residual's dtype  2 D
    q, k, v after RoPE and attention's output, BF16  4 D
    gate and up, BF16  2 F
    inputs of qkv, out, gate_up, down: 3 D + F in BF16, or 4.5 bits each where fprop keeps them packed

Outside of the blocks: embedding's output and the last norm's, the loss's gradient with respect to the hidden states,
and one chunk of logits. At the peak, somewhere in the backward of the last block, its own temporaries come on top: the
gradients of the MLP (3 F + 2 D in BF16, and its operands once more as exact BF16 values when a recipe quantizes).

Under FSDP a rank also holds, whole and in FP32: embedding and lm_head, two blocks' weights (the one at work and the
next), and gradients, which are reduced after the last micro-batch only: all of them where a step has several, else
two blocks'. DDP sums gradients in a copy of them.
"""

from dataclasses import dataclass

from models.llama import LlamaConfig
from quant.plan import Plan
from quant.recipe import Recipe

BYTES_STATE = 16  # per parameter: FP32 weight, gradient, two moments
BYTES_FP32 = 4.0
BYTES_BF16 = 2.0
BYTES_PACKED = 4.5 / 8  # a 4-bit code and its share of an E4M3 scale per 16
LOGITS_CHUNK_BYTES = 512 * 2**20  # the loss works on chunks of about this size
GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """GiB of one GPU. `parts` adds up to `total`."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def estimate(
    config: LlamaConfig,
    micro_tokens: int,
    packed: bool,
    shards: int = 1,
    recompute: bool = False,
    accumulates: bool = False,
    replicated: bool = False,
) -> MemoryEstimate:
    """`packed`: the recipe saves fprop's operands in 4 bits. `shards`: ranks that share the states (1 under DDP).
    `recompute`: only each block's input is kept, and one block's activations at a time. `accumulates`: a rank has
    several micro-batches a step. `replicated`: gradients are summed over ranks by DDP, from a copy of all of them."""
    d, f = config.width, config.hidden
    residual = 4.0 if config.residual_dtype == "float32" else 2.0
    saved_input = BYTES_PACKED if packed else BYTES_BF16
    block = 2 * d * residual + BYTES_BF16 * (4 * d + 2 * f) + saved_input * (3 * d + f)
    kept = config.layers * d * residual + block if recompute else config.layers * block
    ends = d * (2 * residual + 3 * BYTES_BF16)
    temporaries = BYTES_BF16 * (3 * f + 2 * d) * (2 if packed else 1)
    parts = {
        "weights, gradients, moments": BYTES_STATE * config.parameters / shards,
        "activations": micro_tokens * (kept + ends),
        "temporaries": micro_tokens * temporaries + LOGITS_CHUNK_BYTES,
    }
    if replicated:
        parts["gradients on their way"] = BYTES_FP32 * config.parameters
    if shards > 1:
        ends_parameters = 2 * config.vocab_size * config.width
        two_blocks = 2 * (config.parameters - ends_parameters) / config.layers
        gradients = config.parameters if accumulates else two_blocks + ends_parameters
        parts["gathered by FSDP"] = BYTES_FP32 * (ends_parameters + two_blocks + gradients)
    return MemoryEstimate({name: size / GIB for name, size in parts.items()})


def saves_packed(plan: Plan) -> bool:
    """Whether the forward keeps its activations in 4 bits (in the layers that the recipe quantizes)."""
    recipes = [entry.recipe for entry in plan.entries if isinstance(entry.recipe, Recipe)]
    return any(recipe.operand("fprop.x").is_quantized for recipe in recipes)
