"""The names of a linear layer's three products and six operands. No torch here: a command line is read before it.

GEMM    product                      contraction         operands, in slot order
fprop   Y[M,N]  = X[M,K] W[N,K]^T    K, in features      0 fprop.x   1 fprop.w
dgrad   dX[M,K] = dY[M,N] W[N,K]     N, out features     2 dgrad.dy  3 dgrad.w
wgrad   dW[N,K] = dY^T X             M, tokens           4 wgrad.dy  5 wgrad.x
"""

from collections.abc import Mapping
from typing import Any

OPERANDS = {"fprop": ("x", "w"), "dgrad": ("dy", "w"), "wgrad": ("dy", "x")}
GEMMS = tuple(OPERANDS)
SLOTS = tuple(f"{gemm}.{operand}" for gemm, operands in OPERANDS.items() for operand in operands)
# Slots that may take what fprop used, and where fprop used it.
FPROP_SLOT = {"dgrad.w": "w", "wgrad.x": "x"}


def unquantized(gemm: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """A GEMM that is given as `none` written out: both grids none, each operand's source that of `own`, a mapping of
    the GEMM, else the input (docs/concepts.md#three-gemms-six-slots)."""
    sources = {name: (own.get(name) or {}).get("source", "input") for name in OPERANDS[gemm]}
    return {name: {"grid": "none", "source": source} for name, source in sources.items()}
