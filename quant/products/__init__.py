"""Products that six operand slots can't say: a recipe file with `scheme: NAME` is built by PRODUCTS[NAME].from_dict.

One file each, and a line here. A product answers the questions of quant/product.py. What it may do there:
    mean split      wraps a quant.recipe.Recipe, hands it X - mean, adds rank-one terms to Y and dW, keeps the mean
    trust mask      wraps one, keeps a mask beside what that keeps, and masks dX in the rotated space
    two-term X      multiplies twice in `forward` and `weight_gradient`, by the wrapped recipe's `operand_of`
    shaped slots    is a Recipe whose layer keeps what its quantizers read, as shaped.py does; a hook fits it
    others' layers  `build` another layer, as te.py does, which multiplies itself while it runs under its own recipe
"""

from quant.products.shaped import Shaped
from quant.products.te import Fp8TE

PRODUCTS = {"fp8_te": Fp8TE, "shaped": Shaped}
