"""nGPT: a decoder whose weights and hidden states are unit vectors (arXiv 2410.01131), as arXiv 2605.06067 trains it in
NVFP4, with the inputs of `attn.out` and `mlp.down` normalized, too.

norm(x) = x / |x| over the last dimension, in FP32, rounded once where it feeds a linear. No RMSNorm, no biases:

    h = E[token]
    q, k, v = Wqkv h;   q, k = s_qk norm(RoPE(.)) per head;   y = norm(softmax(sqrt(K) q k^T) v);   a = norm(Wout y)
    h = norm(h + |alpha_attn| (a - h))
    g, u = sqrt(D) s_uv (Wgate_up h);   b = norm(Wdown norm(silu(g) u))
    h = norm(h + |alpha_mlp| (b - h))
    logits = s_z (Whead h)

Learned vectors are stored at another size than they act with, which sets Adam's relative step: alpha as D^-1/2 for
.05, s_qk and s_z as D^-1/2 for 1, s_uv as 1 for 1. After every step the hook `normalize` scales the weights back: rows
(what a row is multiplied with lies in h) of embedding, head, qkv and gate_up; columns (they add up to h) of out and
down. Weight decay would pull on lengths that are set anyway: none.

Shapes: B batch, T positions, D width, H heads, K head dimension (D = H K), F hidden, V vocabulary.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.pointwise.reference_impl import turn
from models.attention import Mask, attend, masks
from models.llama import check_positions, fill_model, generator_for, rope_table
from models.shape import BYTES_BF16, DecoderShape
from models.unit import COLUMNS, ROWS, unit

NORM_EPS = 1e-6  # the released code's, within the root
ALPHA = 0.05  # how far a block moves h towards its branch, at initialization
UNIT_ROWS = ("embed.weight", "lm_head.weight", "blocks.*.attn.qkv.weight", "blocks.*.mlp.gate_up.weight")
UNIT_COLUMNS = ("blocks.*.attn.out.weight", "blocks.*.mlp.down.weight")


@dataclass(frozen=True)
class NgptConfig(DecoderShape):
    """Shape of a model. The stream is FP32: a unit vector that moves by a twentieth."""

    residual_dtype: ClassVar[str] = "float32"
    rope_theta: float = 1e4

    @property
    def parameters_non_embedding(self) -> int:
        """L (4 D^2 + 3 D F + 3 D + 2 F)."""
        d, f = self.width, self.hidden
        return self.layers * (4 * d**2 + 3 * d * f + 3 * d + 2 * f)

    @property
    def parameters(self) -> int:
        """With embedding, head, and a scale for each logit."""
        return super().parameters + self.vocab_size

    def block_bytes(self, residual: float, inputs: float) -> float:
        """A norm needs what it normalized: also q, k, attention's and both branches' outputs as they were."""
        return super().block_bytes(residual, inputs) + BYTES_BF16 * 5 * self.width


def norm(x: Tensor) -> Tensor:
    """x / |x| over the last dimension, FP32."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + NORM_EPS)


class Attention(nn.Module):
    """Causal multi-head attention. Rows of `qkv`: all of q, then k, then v; heads in order within each."""

    def __init__(self, config: NgptConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.qk_scale = nn.Parameter(torch.empty(config.width))

    def forward(self, x_BTD: Tensor, rope: Tensor, mask: Mask) -> Tensor:
        q, k, v = self.qkv(x_BTD).unflatten(-1, (3, self.heads, -1)).unbind(2)
        scale_HK = (self.qk_scale * math.sqrt(x_BTD.shape[-1])).view(self.heads, -1)
        q, k = ((norm(turn(t.float(), rope)) * scale_HK).to(v.dtype) for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y_BHTK = attend(q, k, v, mask, scale=math.sqrt(q.shape[-1]))
        return self.out(norm(y_BHTK.transpose(1, 2).flatten(2)).to(x_BTD.dtype))


class SwiGLU(nn.Module):
    """down(norm(silu(gate) * up)). Rows of `gate_up` and entries of `uv_scale`: gate first, then up."""

    def __init__(self, config: NgptConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)
        self.uv_scale = nn.Parameter(torch.empty(2 * config.hidden))

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate, up = (self.gate_up(x_BTD).float() * (self.uv_scale * math.sqrt(x_BTD.shape[-1]))).chunk(2, dim=-1)
        return self.down(norm(F.silu(gate) * up).to(x_BTD.dtype))


class Block(nn.Module):
    def __init__(self, config: NgptConfig, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.attn = Attention(config)
        self.mlp = SwiGLU(config)
        self.attn_alpha = nn.Parameter(torch.empty(config.width))
        self.mlp_alpha = nn.Parameter(torch.empty(config.width))

    def forward(self, h_BTD: Tensor, rope: Tensor, mask: Mask = None) -> Tensor:
        """FP32 unit vectors to FP32 unit vectors."""
        h_BTD = towards(h_BTD, self.attn(h_BTD.to(self.dtype), rope, mask), self.attn_alpha)
        return towards(h_BTD, self.mlp(h_BTD.to(self.dtype)), self.mlp_alpha)


def towards(h_BTD: Tensor, branch_BTD: Tensor, alpha: Tensor) -> Tensor:
    """h moved a part of the way to the branch's direction, and back onto the sphere."""
    share = (alpha * (ALPHA * math.sqrt(h_BTD.shape[-1]))).abs()
    return norm(h_BTD + share * (norm(branch_BTD) - h_BTD))


class Ngpt(nn.Module):
    """The model; weights are uninitialized until `init_weights`, so that it can be built on the meta device."""

    Shape = NgptConfig
    optimizer = "adamw"
    scalar_rates: Mapping[str, float] = {}
    hooks: Mapping[str, Mapping[str, Any]] = {"normalize": {"rows": UNIT_ROWS, "columns": UNIT_COLUMNS}}
    refuses: Mapping[str, str] = {
        "muon": "its rows and columns are scaled to length one after each step, by which the rates of AdamW were "
        "chosen; for Muon's orthogonal updates none is known",
        "export": "transformers has no model with nGPT's norms and scales",
    }
    softcap: float | None = None
    document_start: int | None = None  # the token that begins a document; None: a row is one text
    blockwise = False  # masks as FlexAttention takes them

    def __init__(self, config: NgptConfig, compute_dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.config = config
        self.dtype = compute_dtype
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, compute_dtype) for _ in range(config.layers))
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(config.vocab_size))
        self.register_buffer("rope", torch.empty(2, config.max_seq_len, config.head_dim), persistent=False)

    @property
    def head_weight(self) -> Tensor:
        """FP32 [V, D]: the head with its scales, for the loss."""
        return self.lm_head.weight * (self.logit_scale * math.sqrt(self.config.width))[:, None]

    @staticmethod
    def decays(name: str) -> bool:
        """Nothing."""
        return False

    def regions(self) -> list[tuple[nn.Module, str]]:
        """(module, method): the parts to compile, each without a graph break; as in models/llama.py."""
        return [(self, "first"), *((block, "forward") for block in self.blocks), (self, "last")]

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """tokens int [B, T] -> what the head reads: unit vectors, [B, T, D] in the compute dtype."""
        check_positions(tokens_BT, self.config)
        h_BTD = self.first(tokens_BT)
        mask = masks(tokens_BT, self.document_start, (None,), self.blockwise)[None]
        for block in self.blocks:
            h_BTD = block(h_BTD, self.rope, mask)
        return self.last(h_BTD)

    def first(self, tokens_BT: Tensor) -> Tensor:
        return self.embed(tokens_BT)

    def last(self, h_BTD: Tensor) -> Tensor:
        return h_BTD.to(self.dtype)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """tokens int [B, T] -> logits [B, T, V] in the compute dtype."""
        return F.linear(self.hidden(tokens_BT), self.head_weight.to(self.dtype))

    def init_weights(self, seed: int) -> str:
        """Fill every parameter and the RoPE table; returns the init hash (hex, 16 digits), of normalized weights.

        Drawn on the CPU with a generator per parameter, keyed by (seed, name), as models/llama.py does.
        """
        rope = rope_table(self.config.max_seq_len, self.config.head_dim, self.config.rope_theta)
        return fill_model(self, lambda name, shape: initial_value(name, shape, self.config.width, seed), rope)


def initial_value(name: str, shape: torch.Size, width: int, seed: int) -> Tensor:
    """FP32 CPU tensor: vectors at their stored sizes, matrices N(0, D^-1/2), then rows or columns of length one."""
    if len(shape) == 1:
        return torch.full(shape, 1.0 if name.endswith("uv_scale") else width**-0.5, device="cpu")
    value = torch.empty(shape, device="cpu").normal_(0.0, width**-0.5, generator=generator_for(seed, name))
    return unit(value, COLUMNS if any(fnmatchcase(name, glob) for glob in UNIT_COLUMNS) else ROWS)
