"""What all decoders of this package have in common before a tensor exists: sizes, their checks, and what they cost."""

from dataclasses import dataclass

import torch

from base.flops import flops_per_token

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BYTES_BF16 = 2.0


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder; each model adds its own fields, `residual_dtype` (a key of DTYPES) among them.

    Raises ValueError, with what to type, for sizes that no decoder can have."""

    layers: int
    width: int
    heads: int
    hidden: int
    vocab_size: int
    max_seq_len: int = 512

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "hidden", "vocab_size", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)}: needs a positive integer")
        if self.width % self.heads or self.head_dim % 2:
            raise ValueError(
                f"model.width={self.width} over model.heads={self.heads}: the head dimension must be even and whole; "
                f"RoPE turns pairs. Set {_other_heads(self.width)}"
            )
        if self.residual_dtype not in DTYPES:
            raise ValueError(f"model.residual_dtype={self.residual_dtype}: needs one of {', '.join(DTYPES)}")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def parameters_non_embedding(self) -> int:
        """Everything but the embedding and lm_head."""
        raise NotImplementedError

    @property
    def parameters_ends(self) -> int:
        """Embedding and lm_head."""
        return 2 * self.vocab_size * self.width

    @property
    def parameters(self) -> int:
        return self.parameters_non_embedding + self.parameters_ends

    def window(self, layer: int) -> int | None:
        """How many earlier positions a layer sees; None: all."""
        return None

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Of all layers."""
        return tuple(map(self.window, range(self.layers)))

    def block_bytes(self, residual: float, inputs: float) -> float:
        """What autograd keeps of one block, bytes a token: two norm inputs in the residual's dtype (`residual` bytes an
        element); q, k, v after RoPE and attention's output, gate and up in BF16; the inputs of qkv, out, gate_up and
        down in the form that the recipe keeps (`inputs` bytes an element). A model that keeps other things says so."""
        d, f = self.width, self.hidden
        return 2 * d * residual + BYTES_BF16 * (4 * d + 2 * f) + inputs * (3 * d + f)

    def mlp_backward_bytes(self) -> float:
        """Gradients of the MLP in BF16, the largest temporaries of a step, bytes a token."""
        return BYTES_BF16 * (3 * self.hidden + 2 * self.width)

    def flops_per_token(self, seq_len: int) -> int:
        """Operations of forward and backward (base/flops.py)."""
        return flops_per_token(self.parameters_non_embedding, self.vocab_size, self.layers, self.width, seq_len)


def _other_heads(width: int) -> str:
    """What to type: heads of about 128 that divide the width into even parts."""
    if width % 2:
        return f"an even width, such as model.width={width + 1}, and model.heads to a divisor of half of it"
    heads = next(n for n in range(max(1, width // 128), 0, -1) if width // 2 % n == 0)
    return f"model.heads={heads} or another divisor of half the width"
