"""The decoder of the published nanochat runs (560M and 1.9B parameters; docs/published.md#5-nanochat-protocol).

Differs from models/llama.py in: RMSNorm without parameters, also after the embedding; RoPE, then RMSNorm, on q and k;
ReLU^2 MLP; three of four layers attend to half the context only (the last layer to all of it); the stream entering each
layer is a learned mix of itself and of the normalized embedding; logits soft-capped at 15; residual projections that
start at zero. Linears are named blocks.N.attn.{q,k,v,out} and blocks.N.mlp.{up,down}.

Two liberties, neither of which changes what can be learned: the embedding's master weight is FP32, rounded to BF16 when
read (theirs is stored in BF16), and RoPE turns neighbours where theirs turns halves, a permutation of q's and k's rows.

Shapes: B batch, T positions, D width, H heads, K head dimension (D = H K), F hidden, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import pointwise
from kernels.pointwise.reference_impl import inverse_rms
from models.attention import Mask, attend, masks
from models.llama import check_positions, fill_model, generator_for, rope_table
from models.shape import DTYPES, DecoderShape

WINDOW_PATTERN = "SSSL"  # S: half the context, L: all of it
NORM_EPS = torch.finfo(torch.float32).eps
LM_HEAD_STD = 0.001
SOFTCAP = 15.0


@dataclass(frozen=True)
class NanochatConfig(DecoderShape):
    """Shape of a model. `max_seq_len` is the training context: it sets RoPE's table and the short window."""

    max_seq_len: int = 2048
    rope_theta: float = 1e4
    residual_dtype: str = "bfloat16"

    @property
    def parameters_non_embedding(self) -> int:
        """L (4 D^2 + 2 D F) + 2 L scalars."""
        return self.layers * (4 * self.width**2 + 2 * self.width * self.hidden) + 2 * self.layers

    def window(self, layer: int) -> int | None:
        is_short = WINDOW_PATTERN[layer % len(WINDOW_PATTERN)] == "S" and layer != self.layers - 1
        return self.max_seq_len // 2 if is_short else None


def rms_norm(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x / rms(x) over the last dimension, in FP32, rounded once to `dtype`."""
    x = x.float()
    return (x * inverse_rms(x, NORM_EPS)).to(dtype)


class Attention(nn.Module):
    def __init__(self, config: NanochatConfig):
        super().__init__()
        self.heads = config.heads
        self.q, self.k, self.v, self.out = (nn.Linear(config.width, config.width, bias=False) for _ in range(4))

    def forward(self, x_BTD: Tensor, rope: Tensor, mask: Mask) -> Tensor:
        q, k, v = (linear(x_BTD).unflatten(-1, (self.heads, -1)) for linear in (self.q, self.k, self.v))
        q, k = (pointwise.turn_norm(t, rope, NORM_EPS) for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y_BHTK = attend(q, k, v, mask)
        return self.out(y_BHTK.transpose(1, 2).flatten(2))


class SquaredReLU(nn.Module):
    """down(relu(up x)^2), the square in FP32, rounded once."""

    def __init__(self, config: NanochatConfig):
        super().__init__()
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x_BTD)).float().square().to(x_BTD.dtype))


class Block(nn.Module):
    def __init__(self, config: NanochatConfig, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.attn = Attention(config)
        self.mlp = SquaredReLU(config)

    def forward(
        self, x_BTD: Tensor, first_BTD: Tensor, x_scale: Tensor, first_scale: Tensor, rope: Tensor, mask: Mask
    ) -> Tensor:
        """`first_BTD`: the normalized embedding, which every layer sees; both scales are []."""
        x_BTD = (x_scale * x_BTD.float() + first_scale * first_BTD.float()).to(x_BTD.dtype)
        x_BTD = x_BTD + self.attn(rms_norm(x_BTD, self.dtype), rope, mask).to(x_BTD.dtype)
        return x_BTD + self.mlp(rms_norm(x_BTD, self.dtype)).to(x_BTD.dtype)


class Nanochat(nn.Module):
    """The model; weights are uninitialized until `init_weights`, so that it can be built on the meta device."""

    Shape = NanochatConfig
    optimizer = "muon"
    # The stream's scales act on everything after them and get a hundredth of the other scalars' rate.
    scalar_rates: Mapping[str, float] = {"residual_scales": 0.01, "embedding_scales": 1.0}
    hooks: Mapping[str, Mapping[str, Any]] = {}
    refuses: Mapping[str, str] = {
        "export": "transformers' NanoChat has neither the short windows nor the mixed residual stream of this one",
    }
    softcap = SOFTCAP
    document_start: int | None = None  # the token that begins a document; None: a row is one text
    blockwise = False  # masks as FlexAttention takes them

    def __init__(self, config: NanochatConfig, compute_dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.config = config
        self.dtype = compute_dtype
        self.residual_dtype = DTYPES[config.residual_dtype] if compute_dtype != torch.float32 else torch.float32
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, compute_dtype) for _ in range(config.layers))
        self.residual_scales = nn.Parameter(torch.empty(config.layers))
        self.embedding_scales = nn.Parameter(torch.empty(config.layers))
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.register_buffer("rope", torch.empty(2, config.max_seq_len, config.head_dim), persistent=False)

    @property
    def head_weight(self) -> Tensor:
        return self.lm_head.weight

    @staticmethod
    def decays(name: str) -> bool:
        """As in models/llama.py; under Muon the matrices of the blocks have its own decay."""
        return name.startswith("blocks.") and name.endswith(".weight")

    def regions(self) -> list[tuple[nn.Module, str]]:
        """(module, method): the parts to compile, each without a graph break; as in models/llama.py."""
        return [(self, "first"), *((block, "forward") for block in self.blocks), (self, "last")]

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """tokens int [B, T] -> what lm_head reads: the final norm's output, [B, T, D] in the compute dtype."""
        check_positions(tokens_BT, self.config)
        x_BTD = first_BTD = self.first(tokens_BT)
        windows = self.config.windows
        seen = masks(tokens_BT, self.document_start, windows, self.blockwise)
        for layer, block in enumerate(self.blocks):
            scales = self.residual_scales[layer], self.embedding_scales[layer]
            x_BTD = block(x_BTD, first_BTD, *scales, self.rope, seen[windows[layer]])
        return self.last(x_BTD)

    def first(self, tokens_BT: Tensor) -> Tensor:
        return rms_norm(self.embed(tokens_BT).to(self.dtype), self.residual_dtype)

    def last(self, x_BTD: Tensor) -> Tensor:
        return rms_norm(x_BTD, self.dtype)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """tokens int [B, T] -> soft-capped logits [B, T, V], FP32."""
        return self.softcap * torch.tanh(self.lm_head(self.hidden(tokens_BT)).float() / self.softcap)

    def init_weights(self, seed: int) -> str:
        """Fill every parameter and the RoPE table; returns the init hash (hex, 16 digits).

        Drawn on the CPU with a generator per parameter, keyed by (seed, name), as models/llama.py does.
        """
        rope = rope_table(self.config.max_seq_len, self.config.head_dim, self.config.rope_theta)
        return fill_model(self, lambda name, shape: initial_value(name, shape, self.config.width, seed), rope)


def initial_value(name: str, shape: torch.Size, width: int, seed: int) -> Tensor:
    """FP32 CPU tensor: embedding N(0, 1), lm_head N(0, 0.001), residual projections 0, others uniform of std D^-1/2."""
    value = torch.zeros(shape, device="cpu")
    if name == "residual_scales":
        return value + 1.0
    if name == "embedding_scales" or name.endswith(("attn.out.weight", "mlp.down.weight")):
        return value
    generator = generator_for(seed, name)
    if name.startswith("blocks."):
        bound = (3.0 / width) ** 0.5
        return value.uniform_(-bound, bound, generator=generator)
    return value.normal_(0.0, LM_HEAD_STD if name == "lm_head.weight" else 1.0, generator=generator)
