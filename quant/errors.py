"""How far products are from their reference, over draws of the random bits and slices of text: bias beside noise.

With f the reference of a slice, q_r the product of draw r and e_r = q_r - f; sums run over slices, and all but the
cosine is relative to the sum of |f|^2:

    error       mean of |e_r|^2 over draws          cosine   mean of <q_r, f> / |q_r||f|
    projection  mean of <q_r, f> / |f|^2: below 1 where the product is shrunk
    variance    s^2 = (sum |e_r|^2 - |sum e_r|^2 / R) / (R - 1)
    bias        |mean e|^2 - s^2 / R, which is the mean of <e_r, e_t> over r != t: unbiased, so it may be negative
    bias_se     its standard error: jackknives over draws and over slices, added. Elements share signs and scales, so
                that they are no independent sample
    visible     three standard errors of the bias where there is none, from the spread of those <e_r, e_t>

All of it follows from inner products: `moments` takes those where the products are, `Errors` reads those of many
products at once, on the host.
"""

import math

import torch
from torch import Tensor

DRAWS_AT_LEAST = 3  # below, the pairs of draws have no spread


def moments(references: Tensor, errors: Tensor) -> Tensor:
    """FP32 [R, R + 2] of one product of a slice: <e_r, e_t>, <e_r, f>, |f|^2. references: FP32
    [1 or R, n], of all draws or of each; errors: FP32 [R, n]."""
    dots = (errors * references).sum(1, keepdim=True)
    powers = references.square().sum(1, keepdim=True).expand(len(errors), 1)
    return torch.cat((errors @ errors.t(), dots, powers), dim=1)


class Errors:
    """Figures of products from their moments, [products, slices, R, R + 2]; each figure is FP64 [products]."""

    def __init__(self, found: Tensor):
        draws, found = found.shape[2], found.double()
        self.grams, self.dots, self.powers = found[..., :draws], found[..., draws], found[..., draws + 1]

    def near(self) -> dict[str, Tensor]:
        """error, cosine and projection."""
        own = self.grams.diagonal(dim1=2, dim2=3)
        total = self.powers.mean(2).sum(1)
        cosines = (self.powers + self.dots) / (self.powers * (self.powers + 2 * self.dots + own)).sqrt()
        found = {"error": own.mean(2).sum(1) / total, "cosine": cosines.mean((1, 2))}
        return found | {"projection": 1 + self.dots.mean(2).sum(1) / total}

    def spread(self) -> dict[str, Tensor]:
        """variance, bias, bias_se and visible; of at least DRAWS_AT_LEAST draws."""
        slices, draws, total = *self.grams.shape[1:3], self.powers.mean(2).sum(1)
        pairs = self.grams[..., *torch.triu_indices(draws, draws, 1)]
        count = pairs[0].numel()
        within = (pairs - pairs.mean(2, keepdim=True)).square().sum((1, 2)) / (count - slices)
        return {
            "variance": variances(self.grams).sum(1) / total,
            "bias": biases(self.grams).sum(1) / total,
            "bias_se": self._standard_error(),
            "visible": 3 * (within / count).sqrt() * slices / total,
        }

    def variance(self) -> Tensor:
        """s^2 of a slice, not relative to anything."""
        return variances(self.grams).mean(1)

    def _standard_error(self) -> Tensor:
        slices, draws, powers = *self.grams.shape[1:3], self.powers.mean(2)
        kept = [[i for i in range(draws) if i != left] for left in range(draws)]
        by_draw = [biases(self.grams[:, :, some][..., some]).sum(1) / powers.sum(1) for some in kept]
        whole, each, total = biases(self.grams).sum(1, keepdim=True), biases(self.grams), powers.sum(1, keepdim=True)
        by_slice = (whole - each) / (total - powers)
        return (jackknife(torch.stack(by_draw, 1)) + (jackknife(by_slice) if slices > 1 else 0.0)).sqrt()


def variances(grams: Tensor) -> Tensor:
    """s^2 of each from [..., R, R]."""
    draws = grams.shape[-1]
    own = grams.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (own - grams.sum((-2, -1)) / draws) / (draws - 1)


def biases(grams: Tensor) -> Tensor:
    """|mean e|^2 - s^2 / R of each from [..., R, R]: the mean off the diagonal."""
    draws = grams.shape[-1]
    return (grams.sum((-2, -1)) - grams.diagonal(dim1=-2, dim2=-1).sum(-1)) / (draws * (draws - 1))


def jackknife(left_out: Tensor) -> Tensor:
    """Variance of a figure from its values [..., n] without one of the sample each."""
    count = left_out.shape[-1]
    return (count - 1) / count * (left_out - left_out.mean(-1, keepdim=True)).square().sum(-1)


def signal_to_noise(gram: Tensor, errors: Tensor, variance: Tensor, share: float) -> dict[str, Tensor]:
    """Of one weight at a whole batch, from slices that are `share` of it each. gram, errors: inner products of the
    slices' gradients and of their mean errors, [..., slices, slices]; variance: of a slice, [...].

    Signal is the gradient that slices have in common, |g|^2 = mean of <g_a, g_b> over a != b (all is NaN where that
    isn't positive: so few slices don't tell it from noise); both noises fall as 1 / slices of the batch.
        snr_sampling  |g| over the spread of slices       snr_rounding  |g| over that of the random bits
        rho           snr_rounding / sqrt(3): below 1 quantized training gains little (arXiv 2505.19115)
        common        error that slices have in common, which no batch averages out, relative to |g|^2; may be negative
    """
    gram, errors, variance = gram.double(), errors.double(), variance.double()
    signal, common = biases(gram), biases(errors)
    sampling = gram.diagonal(dim1=-2, dim2=-1).mean(-1) - signal
    seen = torch.where(signal > 0, signal, float("nan"))
    rounding = (seen / (variance * share)).sqrt()
    found = {"snr_sampling": (seen / (sampling * share)).sqrt(), "snr_rounding": rounding, "rho": rounding / 3**0.5}
    return found | {"common": common / seen}


def numbers(found: dict[str, Tensor]) -> list[dict[str, float | None]]:
    """Of each product its figures [products], on the host: None for what isn't finite (a gradient of zeros has no
    relative error, and NaN is no JSON), six digits."""
    columns = [[number(value) for value in values.tolist()] for values in found.values()]
    return [dict(zip(found, row, strict=True)) for row in zip(*columns, strict=True)]


def number(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
