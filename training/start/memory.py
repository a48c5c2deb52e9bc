"""Expected peak memory of a training step on one GPU, before anything is allocated.

States: FP32 weights and two AdamW moments, 12 bytes a parameter (a share of them under FSDP); Muon has one for the
matrices of the blocks.
Activations, per token of a micro-batch and block, as autograd keeps them (D width, F hidden, in elements):

    two norm inputs in the residual's dtype  2 D
    q, k, v after RoPE and attention's output, BF16  4 D
    gate and up, BF16  2 F
    inputs of qkv, out, gate_up, down: 3 D + F in the form that the recipe keeps (quant.product.Kept)

A recipe may keep fprop's weights too, from a forward to its backward. Outside of the blocks: embedding's output and the
last norm's, the loss's gradient with respect to the hidden states, and one chunk of logits. At the peak, somewhere in
the backward of the last block, its own temporaries come on top: the gradients of the MLP (3 F + 2 D in BF16, and its
operands once more as exact BF16 values when a recipe quantizes).

A dense mask of documents takes a byte a pair of positions, and attention keeps it in BF16 for the backward of every
block.

Gradients, 4 bytes a parameter: where a step has several micro-batches, those of the earlier ones are there at the peak.
Those of the micro-batch itself take the place of the activations that its backward frees; only lm_head's is made in the
forward. DDP sums gradients in a copy of them. Under FSDP a rank holds, whole and in FP32: all weights, or under
`recompute` embedding, lm_head and two blocks (the one at work and the next); and gradients, which are reduced after the
last micro-batch only: all of them where a step has several, else two blocks' and those of the ends.
"""

from dataclasses import dataclass

from models.shape import DecoderShape
from quant.plan import Plan
from quant.product import BYTES_BF16, Kept

BYTES_STATE = 12  # per parameter: FP32 weight, two moments
BYTES_FP32 = 4.0
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
    config: DecoderShape,
    micro_tokens: int,
    kept: Kept,
    shards: int = 1,
    recompute: bool = False,
    accumulates: bool = False,
    replicated: bool = False,
    optimizer: str = "adamw",
    mask_length: int = 0,
    hooks: float = 0.0,
) -> MemoryEstimate:
    """`shards`: ranks that share the states (1 under DDP). `recompute`: only each block's input is kept, and one
    block's activations at a time. `accumulates`: a rank has several micro-batches a step. `replicated`: gradients are
    summed over ranks by DDP, from a copy of all of them. `mask_length`: positions of a row under a dense mask of its
    documents; 0: none. `hooks`: bytes a parameter of the hooks' state."""
    activations = activation_bytes(config, micro_tokens, kept, recompute)
    backward = micro_tokens * config.mlp_backward_bytes() * (2 if kept.is_quantized else 1)
    sizes = {
        "weights, moments": state_bytes(config, optimizer) / shards,
        "gradients": gradient_bytes(config, activations, shards, accumulates, replicated),
        "activations": activations,
        "temporaries": backward + LOGITS_CHUNK_BYTES,  # of an MLP, and a chunk of logits
    }
    if mask_length:
        kept_in = 1 if recompute else config.layers
        sizes["masks"] = micro_tokens * mask_length * (1 + BYTES_BF16 * kept_in)
    if hooks:
        sizes["hooks"] = hooks * config.parameters / shards
    if shards > 1:
        blocks = 2 if recompute else config.layers
        gathered = config.parameters_ends + blocks * block_parameters(config)
        sizes["gathered by FSDP"] = BYTES_FP32 * gathered
    return MemoryEstimate({name: size / GIB for name, size in sizes.items()})


def state_bytes(config: DecoderShape, optimizer: str) -> float:
    """Weights and moments of all ranks together; a checkpoint's size too."""
    single = config.layers * block_parameters(config) if optimizer.startswith("muon") else 0.0
    return BYTES_STATE * config.parameters - BYTES_FP32 * single


def block_parameters(config: DecoderShape) -> float:
    """Parameters of one block, the final norm's share included."""
    return config.parameters_non_embedding / config.layers


def activation_bytes(config: DecoderShape, micro_tokens: int, kept: Kept, recompute: bool) -> float:
    """What autograd keeps of one micro-batch, operands made of weights included."""
    d = config.width
    residual = BYTES_FP32 if config.residual_dtype == "float32" else BYTES_BF16
    block = micro_tokens * config.block_bytes(residual, kept.inputs)
    block += kept.weights * block_parameters(config)
    ends = micro_tokens * d * (2 * residual + 3 * BYTES_BF16)
    return ends + (config.layers * micro_tokens * d * residual + block if recompute else config.layers * block)


def gradient_bytes(config: DecoderShape, activations: float, shards: int, accumulates: bool, replicated: bool) -> float:
    """Gradients at the peak, and what they need beyond the activations' place when these are gone."""
    whole, head = BYTES_FP32 * config.parameters, BYTES_FP32 * config.vocab_size * config.width
    if shards > 1 and not accumulates:
        return BYTES_FP32 * (config.parameters_ends + 2 * block_parameters(config))
    after = whole * (2 if replicated else 1) / shards
    return (whole if accumulates else head) + max(0.0, after - activations)


def kept_of(plan: Plan) -> Kept:
    """What the quantized layers of a plan keep; of several recipes the one that keeps most."""
    kept = [recipe.kept_bytes() for recipe in plan.recipes if recipe.is_quantized]
    return max(kept, key=lambda k: (k.inputs, k.weights), default=Kept())
