"""Products that six operand slots can't say: a recipe file with `scheme: NAME` is built by PRODUCTS[NAME].from_dict.

One file each, and a line here. A product answers the questions of quant/product.py. What it may do there:
    mean split      over_slots.py: hands six slots X - mean, adds rank-one terms to the products, keeps the mean
    trust mask      over_slots.py: keeps masks beside what the slots keep, and masks gradients in the rotated space
    two-term X      multiplies twice in `forward` and `weight_gradient`, by the wrapped recipe's `operand_of`
    shaped slots    is a Recipe whose layer keeps what its quantizers read, as shaped.py does; a hook fits it
    others' layers  `build` another layer, as te.py does, which multiplies itself while it runs under its own recipe
"""

from quant.products.mean_split import MeanSplit
from quant.products.shaped import Shaped
from quant.products.te import Fp8TE, Nvfp4TE
from quant.products.trust_mask import TrustMask

PRODUCTS = {"fp8_te": Fp8TE, "mean_split": MeanSplit, "nvfp4_te": Nvfp4TE, "shaped": Shaped, "trust_mask": TrustMask}
