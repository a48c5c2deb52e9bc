"""Schemes that six operand slots can't say. A recipe file with `scheme: NAME` is built by SCHEMES[NAME].from_dict.

A scheme is frozen plain data with the part of Recipe that the precision plan needs (name, label, is_quantized, to_dict)
and: fullgraph (False: compile with graph breaks), require() (RuntimeError where this machine can't run it),
check(layer, in_features, out_features) (ValueError) and build(linear, index, rng) -> nn.Module with the same `weight`.
"""

from quant.schemes.fp8_te import Fp8TE

SCHEMES = {"fp8_te": Fp8TE}
