"""Llama-2-like decoder of the published 4-bit runs (Quartet II, section c of its protocol).

Pre-norm RMSNorm with a learned gain, interleaved RoPE in FP32, fused q,k,v and gate,up projections, SwiGLU, no biases,
embedding and lm_head not tied. Models that came later may group queries over fewer keys and values, tie the embedding
and lm_head, and slow RoPE down (all off by default). The residual stream is FP32 by default; every nn.Linear is fed
`compute_dtype`.

RoPE, SwiGLU and residual + norm are kernels/pointwise, whose definition is plain PyTorch: a GPU run chooses fused
backwards for them (kernels/backend.py). The linears here hold FP32 master weights. A plain model therefore runs in
float32 (`compute_dtype=torch.float32`); for BF16 training `quant.plan.convert` replaces each nn.Linear by one that
rounds its weight itself, the BF16 baseline too.

Shapes: B batch, T positions, D width, H heads, K head dimension (D = H K), F hidden, V vocabulary.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernels import pointwise
from kernels.pointwise import reference_impl
from models.attention import Mask, attend, masks
from models.shape import BYTES_BF16, DTYPES, DecoderShape

DRAW_THREADS = 8  # a generator is serial: one thread per parameter, or llama_1b9 takes half a minute on every start
INIT_STD = 0.02  # all weight matrices and the embedding; residual projections are scaled by 1 / sqrt(2 layers)


@dataclass(frozen=True)
class LlamaConfig(DecoderShape):
    """Shape of a model. `max_seq_len` only sizes the RoPE table; it holds no parameter."""

    norm_eps: float = 1e-5
    rope_theta: float = 1e4
    residual_dtype: str = "float32"
    kv_heads: int | None = None  # grouped-query attention (arXiv 2305.13245); None: as many as heads
    tied: bool = False  # lm_head's weight is the embedding's
    rope_llama3: tuple[float, ...] = ()  # factor, low and high frequency factor, original context of Llama 3

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "rope_llama3", tuple(self.rope_llama3))
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(f"model.kv_heads={self.kv_heads}: needs a divisor of model.heads={self.heads}, or null")
        numbers = self.rope_llama3
        if numbers and not (len(numbers) == 4 and min(numbers) > 0 and numbers[1] < numbers[2]):
            raise ValueError(
                f"model.rope_llama3={list(numbers)}: needs factor, low and high frequency factor (the larger) and "
                "original context, such as [32,1,4,8192], or [] for none"
            )

    @property
    def kv_width(self) -> int:
        """Width of k, and of v."""
        return (self.kv_heads or self.heads) * self.head_dim

    @property
    def parameters_non_embedding(self) -> int:
        """L (2 D^2 + 2 D D_kv + 3 D F) + (2 L + 1) D; without groups D_kv = D."""
        per_layer = 2 * self.width**2 + 2 * self.width * self.kv_width + 3 * self.width * self.hidden
        return self.layers * per_layer + (2 * self.layers + 1) * self.width

    @property
    def parameters_ends(self) -> int:
        return super().parameters_ends // (2 if self.tied else 1)

    def rope_table(self) -> Tensor:
        return rope_table(self.max_seq_len, self.head_dim, self.rope_theta, self.rope_llama3)

    def block_bytes(self, residual: float, inputs: float) -> float:
        return super().block_bytes(residual, inputs) - BYTES_BF16 * 2 * (self.width - self.kv_width)


class RMSNorm(nn.Module):
    """y = x / rms(x) * gain over the last dimension, in FP32, rounded once to `dtype`; with a branch, of x + branch."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps
        self.dtype = dtype

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(x + branch, y)"""
        if branch is None:
            return x, reference_impl.rms_norm(x, self.weight, self.eps, self.dtype)
        return pointwise.add_norm(x, branch, self.weight, self.eps, self.dtype)


def rope_table(max_seq_len: int, head_dim: int, theta: float, llama3: tuple[float, ...] = ()) -> Tensor:
    """cos and signed sin of every position's angles, each value twice: FP32 [2, T, K].

    sin is negated at even elements, so that a turn is x * cos + swapped(x) * sin with the two of each pair swapped
    (kernels/pointwise).
    Computed in FP64 so that no device changes them. `llama3`: LlamaConfig.rope_llama3.
    """
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)
    if llama3:
        frequencies = slowed(frequencies, *llama3)
    angles = torch.arange(max_seq_len, dtype=torch.float64, device="cpu")[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.stack((cos, cos), -1), torch.stack((-sin, sin), -1))).flatten(-2).float()


def slowed(frequencies: Tensor, factor: float, low: float, high: float, context: float) -> Tensor:
    """Llama 3's frequencies: divided by `factor` where a turn takes more than context / low positions, as they are
    where it takes less than context / high, and a linear blend between (transformers, rope_type "llama3")."""
    turns = context * frequencies / (2 * math.pi)  # within the original context
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / factor)


class Attention(nn.Module):
    """Causal attention. Rows of `qkv`: all of q, then k, then v; heads in order within each. With fewer heads of k and
    v, neighbouring heads of q share one."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.heads = config.heads
        self.kv_heads = config.kv_heads or config.heads
        self.qkv = nn.Linear(config.width, config.width + 2 * config.kv_width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x_BTD: Tensor, rope: Tensor, mask: Mask = None) -> Tensor:
        q, k, v = pointwise.rope_heads(self.qkv(x_BTD), rope, self.heads, self.kv_heads)
        y_BHTK = attend(q, k, v, mask)
        return self.out(y_BHTK.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """down(silu(gate) * up). Rows of `gate_up`: gate first, then up. silu and product in FP32, rounded once."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(pointwise.swiglu(self.gate_up(x_BTD)))


class Block(nn.Module):
    """Takes the stream and the branch that is still to be added to it (None before the first block), returns the same:
    a sum is made together with the norm that reads it."""

    def __init__(self, config: LlamaConfig, dtype: torch.dtype):
        super().__init__()
        self.attn_norm = RMSNorm(config.width, config.norm_eps, dtype)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps, dtype)
        self.mlp = SwiGLU(config)

    def forward(
        self, x_BTD: Tensor, branch_BTD: Tensor | None, rope: Tensor, mask: Mask = None
    ) -> tuple[Tensor, Tensor]:
        x_BTD, y_BTD = self.attn_norm(x_BTD, branch_BTD)
        x_BTD, y_BTD = self.mlp_norm(x_BTD, self.attn(y_BTD, rope, mask))
        return x_BTD, self.mlp(y_BTD)


class Llama(nn.Module):
    """The model; weights are uninitialized until `init_weights`, so that it can be built on the meta device."""

    Shape = LlamaConfig
    optimizer = "adamw"
    scalar_rates: Mapping[str, float] = {}
    hooks: Mapping[str, Mapping[str, Any]] = {}
    refuses: Mapping[str, str] = {}
    softcap: float | None = None  # of the logits; the loss reads it
    document_start: int | None = None  # the token that begins a document; None: a row is one text
    blockwise = False  # masks as FlexAttention takes them

    def __init__(self, config: LlamaConfig, compute_dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.config = config
        self.residual_dtype = DTYPES[config.residual_dtype]
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, compute_dtype) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps, compute_dtype)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.embed.weight
        self.register_buffer("rope", torch.empty(2, config.max_seq_len, config.head_dim), persistent=False)

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """tokens int [B, T] -> what lm_head reads: the final norm's output, [B, T, D] in the compute dtype."""
        check_positions(tokens_BT, self.config)
        x_BTD, branch_BTD = self.first(tokens_BT), None
        mask = masks(tokens_BT, self.document_start, (None,), self.blockwise)[None]
        for block in self.blocks:
            x_BTD, branch_BTD = block(x_BTD, branch_BTD, self.rope, mask)
        return self.last(x_BTD, branch_BTD)

    def first(self, tokens_BT: Tensor) -> Tensor:
        return self.embed(tokens_BT).to(self.residual_dtype)

    def last(self, x_BTD: Tensor, branch_BTD: Tensor) -> Tensor:
        """The final norm. Nothing else reads its sum: no gradient to add, so no operation of its own."""
        return self.norm(x_BTD + branch_BTD.to(x_BTD.dtype))[1]

    @property
    def head_weight(self) -> Tensor:
        return self.lm_head.weight

    @staticmethod
    def decays(name: str) -> bool:
        """Weight decay applies to the linear weights of the blocks: not to the embedding, lm_head and norms."""
        return name.startswith("blocks.") and name.endswith(".weight") and "norm" not in name

    def stacked_rows(self, name: str) -> tuple[int, ...]:
        """Of a weight that holds several matrices one below the other: the rows of each; else ()."""
        shape = self.config
        kinds = {"attn.qkv": (shape.width, shape.kv_width, shape.kv_width), "mlp.gate_up": (shape.hidden, shape.hidden)}
        return kinds.get(".".join(name.split(".")[2:4]), ())

    def regions(self) -> list[tuple[nn.Module, str]]:
        """(module, method): the parts to compile, each without a graph break. Blocks share their code, so that a deep
        model compiles as fast as a shallow one; between them there is nothing left to fuse."""
        return [(self, "first"), *((block, "forward") for block in self.blocks), (self, "last")]

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """tokens int [B, T] -> logits [B, T, V] in the compute dtype."""
        return self.lm_head(self.hidden(tokens_BT))

    def init_weights(self, seed: int) -> str:
        """Fill every parameter and the RoPE table; returns the init hash (hex, 16 digits).

        Each parameter has its own generator, keyed by (seed, its name), and is drawn on the CPU: the values depend
        neither on the device, nor on the recipe, nor on the order or number of other parameters.
        """
        return self.fill(lambda name, shape: initial_value(name, shape, self.config, seed))

    def fill(self, value: Callable[[str, torch.Size], Tensor]) -> str:
        """Copy value(name, shape) into every parameter and make the RoPE table; returns the init hash."""
        return fill_model(self, value, self.config.rope_table())


def check_positions(tokens_BT: Tensor, config: DecoderShape) -> None:
    """ValueError for more positions than the RoPE table has."""
    if tokens_BT.shape[1] > config.max_seq_len:
        raise ValueError(f"{tokens_BT.shape[1]} positions; the model was built for {config.max_seq_len}")


@torch.no_grad()
def fill_model(model: nn.Module, draw: Callable[[str, torch.Size], Tensor], rope: Tensor) -> str:
    """Copy draw(name, shape), made on the CPU, into every parameter, and the RoPE table; returns a hash of the
    parameters' names and values, 16 digits."""
    model.rope.copy_(rope)
    digest, named = hashlib.sha256(), list(model.named_parameters())
    with ThreadPoolExecutor(DRAW_THREADS) as pool:
        for begin in range(0, len(named), DRAW_THREADS):  # few at a time: the host need not hold a second model
            some = named[begin : begin + DRAW_THREADS]
            values = pool.map(lambda entry: draw(entry[0], entry[1].shape), some)
            for (name, parameter), value in zip(some, values, strict=True):
                digest.update(name.encode())
                digest.update(value.numpy().ravel())
                parameter.copy_(value)
    return digest.hexdigest()[:16]


def initial_value(name: str, shape: torch.Size, config: LlamaConfig, seed: int) -> Tensor:
    """FP32 CPU tensor: ones for gains, else N(0, 0.02), residual projections N(0, 0.02 / sqrt(2 L))."""
    if len(shape) == 1:
        return torch.ones(shape, device="cpu")
    std = INIT_STD
    if name.endswith(("attn.out.weight", "mlp.down.weight")):
        std /= math.sqrt(2 * config.layers)
    return torch.empty(shape, device="cpu").normal_(0.0, std, generator=generator_for(seed, name))


def generator_for(seed: int, name: str) -> torch.Generator:
    """A parameter's own, on the CPU."""
    key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(key[:8], "little", signed=True))


def permute_from_half_split(rows: Tensor, heads: int) -> Tensor:
    """The inverse of permute_for_half_split."""
    by_half = rows.unflatten(0, (heads, 2, rows.shape[0] // heads // 2))
    return by_half.transpose(1, 2).flatten(0, 2)


def permute_for_half_split(rows: Tensor, heads: int) -> Tensor:
    """Reorder q or k rows [D, ...] of each head, even rows first: interleaved RoPE becomes transformers' half-split."""
    by_pair = rows.unflatten(0, (heads, rows.shape[0] // heads // 2, 2))
    return by_pair.transpose(1, 2).flatten(0, 2)
