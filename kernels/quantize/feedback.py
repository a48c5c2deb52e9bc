"""What shaped rounding hands on: from the metric in which an operand's rounding error reaches the output.

The output X W^T sees an error D of W as D (X^T X) D^T and an error of X as D (W^T W) D^T, so H = X^T X shapes W and
H = W^T W shapes X. With H^-1 = U^T U, U upper triangular, the error e_i of element i is best made good by the elements
right of it if they are moved by -e_i F_ij, F_ij = U_ij / U_ii: GPTQ's rule (arXiv 2210.17323), there for weights after
training.

F is kept in one of two forms, told apart by their widths (`width`, `parts`):

    whole     [K, K], zero but above the diagonal
    factors   [K, 16 + 2 r] = [F within each block of 16 | G | V]: between blocks F_ij = G_i . V_j, so that a row
              hands its errors on through r sums, 2 r products an element
"""

import torch
from torch import Tensor

from kernels.spec import NVFP4_BLOCK

# Of the subspace: directions next to the last one kept are then told apart well enough. Three products before each
# QR, which takes longer than they do: FP64 holds the cube of what directions differ by.
ROUNDS = 3
CHUNK = 512  # rows whose r x r matrices exist at one time
LEAST = 1e-12  # of the mean of H's diagonal: a direction with no more than the others


def width(size: int, rank: int | None) -> int:
    """Columns of F for K = size: of its factors where they are fewer than the whole form's."""
    return size if rank is None else min(size, NVFP4_BLOCK + 2 * rank)


def parts(feedback: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(F within blocks [K, 16], G, V) of either form; G and V of the whole one are empty."""
    K, columns = feedback.shape
    if columns != K:
        rank = (columns - NVFP4_BLOCK) // 2
        return feedback.split((NVFP4_BLOCK, rank, rank), 1)
    blocks = feedback.view(K // NVFP4_BLOCK, NVFP4_BLOCK, K // NVFP4_BLOCK, NVFP4_BLOCK)
    within = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).reshape(K, NVFP4_BLOCK)
    return within, feedback[:, :0], feedback[:, :0]


def fit(gram: Tensor, damping: float, rank: int | None = None) -> Tensor:
    """F of a Gram matrix H [K, K] in the form that `width` says."""
    if width(len(gram), rank) == len(gram):
        return feedback(gram, damping)
    return factors(gram, damping, rank)


def feedback(gram: Tensor, damping: float) -> Tensor:
    """The whole F of a Gram matrix H [K, K]: bf16 [K, K]. In FP64.

    damping: times the mean of H's diagonal, added to it. Zeros where H is zero; NaN where it isn't positive definite.
    """
    H = _normalized(gram)
    H.diagonal().add_(damping)
    # H = R R^T with R upper triangular is the Cholesky factor of H with rows and columns in reverse; U = R^-1.
    R = torch.linalg.cholesky_ex(H.flip(0, 1)).L.flip(0, 1)
    U = torch.linalg.solve_triangular(R, torch.eye(len(R), dtype=R.dtype, device=R.device), upper=True)
    return (U / U.diagonal().unsqueeze(1)).triu(1).to(torch.bfloat16)


def factors(gram: Tensor, damping: float, rank: int) -> Tensor:
    """The same with all eigenvalues of H but the `rank` largest replaced by their mean, as factors: bf16
    [K, 16 + 2 rank]. In FP64.

    H + damping = l I + V S V^T, so H^-1 = (I - V M V^T) / l with M^-1 = l S^-1 + I. Eliminating element i of a matrix
    of that kind leaves one of that kind: F_ij = G_i . V_j with G_i = -(l S^-1 + sum_(k>i) v_k v_k^T)^-1 v_i.
    """
    H = _normalized(gram)
    V, above, rest = _largest(H, rank)
    inverse = torch.diag((rest + damping) / above.clamp(min=LEAST))
    G = torch.empty_like(V)
    for start in range(0, len(V), CHUNK):
        own, later = V[start : start + CHUNK], V[start + CHUNK :]
        squares = own.unsqueeze(2) * own.unsqueeze(1)
        after = squares.flip(0).cumsum(0).flip(0) - squares
        L = torch.linalg.cholesky_ex(inverse + later.t() @ later + after).L
        G[start : start + CHUNK] = -torch.cholesky_solve(own.unsqueeze(2), L).squeeze(2)
    G = torch.where(H.diagonal().sum() > 0, G, 0.0)
    blocks = (-1, NVFP4_BLOCK, rank)
    within = (G.view(blocks) @ V.view(blocks).transpose(1, 2)).triu(1).view(len(V), NVFP4_BLOCK)
    return torch.cat([within, G, V], dim=1).to(torch.bfloat16)


def _normalized(gram: Tensor) -> Tensor:
    """A copy in FP64 whose diagonal has the mean 1; zeros stay."""
    H = gram.to(torch.float64, copy=True)
    mean = H.diagonal().mean()
    return H / torch.where(mean > 0, mean, 1.0)


def _largest(H: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(V [K, rank], by how much their eigenvalues are above the mean of the others, that mean)."""
    V = H[:, :rank]
    for _ in range(ROUNDS):
        V = torch.linalg.qr(H @ (H @ (H @ V))).Q
    values, turn = torch.linalg.eigh(V.t() @ H @ V)
    rest = (H.diagonal().sum() - values.sum()) / (len(H) - rank)
    return V @ turn, values - rest, rest
