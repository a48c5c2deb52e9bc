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
"""

from collections.abc import Sequence

import torch
from torch import Tensor

DRAWS_AT_LEAST = 3  # below, the pairs of draws have no spread


class Errors:
    """Of one product: the inner products of its errors, all that the figures need."""

    def __init__(self) -> None:
        self._grams: list[Tensor] = []  # [R, R] of a slice
        self._dots: list[Tensor] = []  # [R]
        self._powers: list[Tensor] = []  # [R]

    def add(self, references: Sequence[Tensor], draws: Sequence[Tensor]) -> Tensor:
        """One slice: R draws, and the reference of all or of each. Returns the mean error, FP32."""
        reference, found = torch.stack([*references]).float(), torch.stack([*draws]).float()
        errors = found - reference
        self._grams.append(errors @ errors.t())
        self._dots.append((errors * reference).sum(1))
        self._powers.append(reference.square().sum(1).expand(len(found)))
        return errors.mean(0)

    def near(self) -> dict[str, float | None]:
        """error, cosine and projection."""
        grams, dots, powers = self._read()
        own = grams.diagonal(dim1=1, dim2=2)
        total = powers.mean(1).sum()
        cosines = (powers + dots) / (powers * (powers + 2 * dots + own)).sqrt()
        found = {"error": own.mean(1).sum() / total, "cosine": cosines.mean()}
        return numbers(found | {"projection": 1 + dots.mean(1).sum() / total})

    def spread(self) -> dict[str, float | None]:
        """variance, bias, bias_se and visible; of at least DRAWS_AT_LEAST draws."""
        grams, _, powers = self._read()
        slices, draws, total = len(grams), grams.shape[1], powers.mean(1).sum()
        pairs = grams[:, *torch.triu_indices(draws, draws, 1)]
        within = (pairs - pairs.mean(1, keepdim=True)).square().sum() / (pairs.numel() - slices)
        found = {
            "variance": variances(grams).sum() / total,
            "bias": biases(grams).sum() / total,
            "bias_se": self._standard_error(grams, powers.mean(1)),
            "visible": 3 * (within / pairs.numel()).sqrt() * slices / total,
        }
        return numbers(found)

    def variance(self) -> float:
        """s^2 of a slice, not relative to anything."""
        return float(variances(self._read()[0]).mean())

    def _standard_error(self, grams: Tensor, powers: Tensor) -> Tensor:
        kept = [[i for i in range(grams.shape[1]) if i != left] for left in range(grams.shape[1])]
        by_draw = torch.stack([biases(grams[:, some][:, :, some]).sum() / powers.sum() for some in kept])
        by_slice = (biases(grams).sum() - biases(grams)) / (powers.sum() - powers)
        return (jackknife(by_draw) + (jackknife(by_slice) if len(powers) > 1 else 0.0)).sqrt()

    def _read(self) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(torch.stack(part).double().cpu() for part in (self._grams, self._dots, self._powers))


def variances(grams: Tensor) -> Tensor:
    """s^2 of each slice from [slices, R, R]."""
    draws = grams.shape[1]
    return (grams.diagonal(dim1=1, dim2=2).sum(1) - grams.sum((1, 2)) / draws) / (draws - 1)


def biases(grams: Tensor) -> Tensor:
    """|mean e|^2 - s^2 / R of each slice: the mean off the diagonal."""
    draws = grams.shape[1]
    return (grams.sum((1, 2)) - grams.diagonal(dim1=1, dim2=2).sum(1)) / (draws * (draws - 1))


def jackknife(left_out: Tensor) -> Tensor:
    """Variance of a figure from its values without one of the sample each."""
    count = len(left_out)
    return (count - 1) / count * (left_out - left_out.mean()).square().sum()


def signal_to_noise(gradients: Tensor, mean_errors: Tensor, variance: float, share: float) -> dict[str, float | None]:
    """Of one weight at a whole batch, from slices [slices, n] that are `share` of it each; `variance` of a slice.

    Signal is the gradient that slices have in common, |g|^2 = mean of <g_a, g_b> over a != b (all is None where that
    isn't positive: so few slices don't tell it from noise); both noises fall as 1 / slices of the batch.
        snr_sampling  |g| over the spread of slices       snr_rounding  |g| over that of the random bits
        rho           snr_rounding / sqrt(3): below 1 quantized training gains little (arXiv 2505.19115)
        common        error that slices have in common, which no batch averages out, relative to |g|^2; may be negative
    """
    gram, errors = ((rows @ rows.t()).double().cpu() for rows in (gradients, mean_errors))
    signal, common = float(biases(gram[None])), float(biases(errors[None]))  # off the diagonal
    sampling = float(gram.diagonal().mean()) - signal
    seen = torch.tensor(signal if signal > 0 else float("nan"), dtype=torch.float64)
    rounding = (seen / (variance * share)).sqrt()
    found = {"snr_sampling": (seen / (sampling * share)).sqrt(), "snr_rounding": rounding, "rho": rounding / 3**0.5}
    return numbers(found | {"common": common / seen})


def numbers(found: dict[str, Tensor]) -> dict[str, float | None]:
    """None for what isn't finite: a gradient of zeros has no relative error, and NaN is no JSON. Six digits."""
    return {name: float(f"{float(value):.6g}") if value.isfinite() else None for name, value in found.items()}
