"""Causal attention, also within documents and within windows.

What a position sees is said once, by `sight`. The definition makes a bool mask [.., T, T] of it for
scaled_dot_product_attention. Compiled models on a GPU (`blockwise`) give it to FlexAttention (arXiv
2412.05496): one fused kernel that passes over the blocks of scores in which nothing is seen, has no
mask in memory, and adds up in a fixed order. Attention to everything before needs neither.

Shapes: B batch, T positions, H heads, K head dimension.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128  # positions a block; FlexAttention's own

Mask = Tensor | BlockMask | None


def sight(documents_BT: Tensor | None, window: int | None) -> Callable[..., Tensor]:
    """see(b, h, i, j): whether position i sees j: iff j <= i, at most `window` before it (None: however
    far), and of the same document (None: a row is one text)."""

    def see(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = j <= i
        if window is not None:
            seen = seen & (i - j <= window)
        if documents_BT is not None:
            seen = seen & (documents_BT[b, i] == documents_BT[b, j])
        return seen

    return see


def masks(
    tokens_BT: Tensor, start: int | None, windows: tuple[int | None, ...], blockwise: bool
) -> dict[int | None, Mask]:
    """What each of `windows` makes a row see; None where that is everything before, for PyTorch's own kernels.

    `start`: the token that begins a document; None: a row is one text. RoPE knows distances alone, so
    a document's place in the row doesn't count (but in nGPT, which scales single elements after it).
    """
    length = tokens_BT.shape[1]
    documents = None if start is None else (tokens_BT == start).cumsum(1, dtype=torch.int32)

    acting = {window: None if window is None or window >= length - 1 else window for window in windows}
    # PyTorch's backward that repeats its bits takes 1.4 times FlexAttention's (H200, T 2048, K 128): a model with
    # windows then uses the latter in all layers. Without windows nothing changes.
    windowed = any(window is not None for window in acting.values())
    everywhere = blockwise and windowed and torch.are_deterministic_algorithms_enabled()

    def mask(window: int | None) -> Mask:
        if window is None and documents is None and not everywhere:
            return None
        if blockwise:
            return blocks(documents, window, length, tokens_BT.device)
        return dense(sight(documents, window), *tokens_BT.shape, tokens_BT.device)

    made = {window: mask(window) for window in dict.fromkeys(acting.values())}
    return {window: made[acts] for window, acts in acting.items()}


def dense(see: Callable[..., Tensor], batch: int, length: int, device: torch.device) -> Tensor:
    """bool: [T, T], or [B, 1, T, T] where documents are told apart."""
    at = torch.arange(length, device=device)
    return see(torch.arange(batch, device=device)[:, None, None, None], None, at[:, None], at)


def blocks(documents_BT: Tensor | None, window: int | None, length: int, device: torch.device) -> BlockMask:
    """The same for FlexAttention: which blocks of scores hold something that is seen, and which are seen whole.

    Documents are numbered upwards along a row. So of the pairs (i, j) of a block below the diagonal the
    first i with the last j are nearest, in position and in document, and the last i with the first j farthest.
    """
    first = torch.arange(0, length, BLOCK, device=device)
    last = (first + BLOCK - 1).clamp(max=length - 1)
    some, whole = first[:, None] >= first, first[:, None] > first
    whole = whole & (first + BLOCK <= length)[:, None]
    if window is not None:
        some = some & (first[:, None] - last <= window)
        whole = whole & (last[:, None] - first <= window)
    some, whole = some[None], whole[None]
    if documents_BT is not None:
        first_Bn, last_Bn = documents_BT[:, first], documents_BT[:, last]
        some = some & (first_Bn[:, :, None] <= last_Bn[:, None])
        whole = whole & (last_Bn[:, :, None] == first_Bn[:, None])
    some, whole = (some & ~whole)[:, None], whole[:, None]
    return BlockMask(
        (length, length),
        *listed(some),
        *listed(whole),
        *listed(some.mT),
        *listed(whole.mT),
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=sight(documents_BT, window),
    )


def listed(some: Tensor) -> tuple[Tensor, Tensor]:
    """Of a bool [.., rows, columns]: how many are true in each row, and their columns, ascending, first."""
    order = some.int().argsort(dim=-1, descending=True, stable=True)
    return some.sum(-1, dtype=torch.int32), order.int().contiguous()


def attend(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, mask: Mask, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v of what is seen, [B, H, T, K]; with fewer heads of k and v, neighbouring heads of q share
    one. `scale`: None for K^-1/2."""
    how = {"scale": scale, "enable_gqa": q_BHTK.shape[1] != k_BHTK.shape[1]}
    if isinstance(mask, BlockMask):
        if torch.compiler.is_compiling():
            return flex_attention(q_BHTK, k_BHTK, v_BHTK, block_mask=mask, **how)
        # Looked at eagerly (probes, a diagnosis): FlexAttention would make all scores of all heads.
        mask = dense(mask.mask_mod, len(q_BHTK), q_BHTK.shape[2], q_BHTK.device)
    return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, attn_mask=mask, is_causal=mask is None, **how)
