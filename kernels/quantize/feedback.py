"""What shaped rounding hands on: from the metric in which an operand's rounding error reaches the output.

The output X W^T sees an error D of W as D (X^T X) D^T and an error of X as D (W^T W) D^T, so H = X^T X shapes W and
H = W^T W shapes X. With H^-1 = U^T U, U upper triangular, the error e_i of element i is best made good by the elements
right of it if they are moved by -e_i U_ij / U_ii: GPTQ's rule (arXiv 2210.17323), there for weights after training.
"""

import torch
from torch import Tensor

ITERATIONS = 8  # of the subspace: directions next to the last one kept are then told apart well enough


def feedback(gram: Tensor, damping: float, rank: int | None = None) -> Tensor:
    """F of a Gram matrix H [K, K]: bf16 [K, K], U_ij / U_ii above the diagonal, zero elsewhere. In FP64.

    damping: times the mean of H's diagonal, added to it. rank: of H only so many directions count (`flattened`).
    Zeros where H is zero; NaN where it isn't positive definite.
    """
    H = gram.to(torch.float64)
    if rank is not None and rank < len(H):
        H = flattened(H, rank)
    mean = H.diagonal().mean()
    H = H / torch.where(mean > 0, mean, 1.0)
    H.diagonal().add_(damping)
    # H = R R^T with R upper triangular is the Cholesky factor of H with rows and columns in reverse; U = R^-1.
    R = torch.linalg.cholesky_ex(H.flip(0, 1)).L.flip(0, 1)
    U = torch.linalg.solve_triangular(R, torch.eye(len(R), dtype=R.dtype, device=R.device), upper=True)
    return (U / U.diagonal().unsqueeze(1)).triu(1).to(torch.bfloat16)


def flattened(H: Tensor, rank: int) -> Tensor:
    """H with all eigenvalues but the `rank` largest replaced by their mean: l I + V S V^T. Errors in such a metric can
    be handed on through `rank` numbers a row, 2 `rank` products an element; here F is still the whole matrix."""
    V = H[:, :rank]
    for _ in range(ITERATIONS):
        V = torch.linalg.qr(H @ V).Q
    values, turn = torch.linalg.eigh(V.t() @ H @ V)
    V = V @ turn
    rest = (H.diagonal().sum() - values.sum()) / (len(H) - rank)
    return (V * (values - rest)) @ V.t() + rest * torch.eye(len(H), dtype=H.dtype, device=H.device)
