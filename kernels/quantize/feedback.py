"""What shaped rounding hands on: from the metric in which an operand's rounding error reaches the output.

The output X W^T sees an error D of W as D (X^T X) D^T and an error of X as D (W^T W) D^T, so H = X^T X shapes W and
H = W^T W shapes X. With H^-1 = U^T U, U upper triangular, the error e_i of element i is best made good by the elements
right of it if they are moved by -e_i U_ij / U_ii: GPTQ's rule (arXiv 2210.17323), there for weights after training.
"""

import torch
from torch import Tensor


def feedback(gram: Tensor, damping: float) -> Tensor:
    """F of a Gram matrix H [K, K]: bf16 [K, K], U_ij / U_ii above the diagonal, zero elsewhere. In FP64.

    damping: times the mean of H's diagonal, added to it. Zeros where H is zero; NaN where it isn't positive definite.
    """
    H = gram.to(torch.float64)
    mean = H.diagonal().mean()
    H = H / torch.where(mean > 0, mean, 1.0)
    H.diagonal().add_(damping)
    # H = R R^T with R upper triangular is the Cholesky factor of H with rows and columns in reverse; U = R^-1.
    R = torch.linalg.cholesky_ex(H.flip(0, 1)).L.flip(0, 1)
    U = torch.linalg.solve_triangular(R, torch.eye(len(R), dtype=R.dtype, device=R.device), upper=True)
    return (U / U.diagonal().unsqueeze(1)).triu(1).to(torch.bfloat16)
