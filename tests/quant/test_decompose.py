"""The terms of a quantizer's squared error: by hand, against an independent measurement, and that they add up."""

import pytest
import torch
from torch import nn

from kernels import backend
from kernels.philox import Draw
from kernels.quantize import reference_impl as reference
from kernels.spec import MXFP4_SCALES, NVFP4_SCALES, QuantSpec, default_scales
from quant import audit, library
from quant.decompose import NAMES, TERMS, decompose, stored_parts, terms
from quant.held import Wish
from quant.linear import QuantLinear
from quant.stats import slot_stats


@pytest.fixture(autouse=True)
def use_reference():
    backend.use("reference")


def of(x: torch.Tensor, spec: QuantSpec) -> dict[str, float]:
    y = x.float()
    parts = stored_parts(y, spec, reference.tensor_scale(y.abs().amax(), spec))
    return {name: float(value) for name, value in terms(parts).items()}


def mxfp4(rule: str) -> QuantSpec:
    return QuantSpec.resolve("e2m1", MXFP4_SCALES, scale_rule=rule)


def test_a_block_by_hand():
    """s* = 5/6, ceil takes s = 1. 5 lies between 4 and 6 and goes to the even code, 4; 0.2 is in the dead zone."""
    x = torch.zeros(1, 32)
    x[0, :4] = torch.tensor([5.0, 0.2, 0.22, 2.3], dtype=torch.float64).float()
    got, energy = of(x, mxfp4("ceil")), float(x.double().square().sum())
    by_hand = {"scale": 1.423611, "dead": 0.04, "grid": 0.078678, "scale_grid": -0.363889, "scale_dead": 0.0}
    for name, value in (by_hand | {"mse": 1.1784}).items():
        assert got[name] * energy == pytest.approx(value, abs=1e-6), name
    assert got["align"] * energy == pytest.approx((4 * 5 + 2 * 2.3) - energy, abs=1e-5)
    shares = {"dead_share": 1 / 32, "underflowed": 2 / 32, "clipped": 0.0, "log2_scale": 0.263034}
    for name, value in shares.items():
        assert got[name] == pytest.approx(value, abs=1e-6), name


def test_a_block_that_four_over_six_fits_to_four():
    """8, 8, 8, 6.1 and nothing else: fitted to 4 the scale is 2 without rounding, so no error is of the scale."""
    x = torch.zeros(2, 16)
    x[0, :4] = torch.tensor([8.0, 8.0, 8.0, 6.0])
    x[1, 0] = 2.0 * 6 * 256  # makes the tensor scale 2
    got = of(x, QuantSpec.resolve("e2m1", NVFP4_SCALES, "four_over_six"))
    assert got["mse"] == got["scale"] == 0 and got["log2_scale"] == 0


# Measured by an independent implementation on 2^21 elements: mse, scale, dead, grid, scale_grid, scale_dead (1e-3).
FIGURES = [
    (mxfp4("floor"), audit.gaussian, (13.21, 23.39, 0.273, 9.937, -20.30, -0.088)),
    (mxfp4("ceil"), audit.gaussian, (13.32, 23.60, 0.273, 9.937, -20.49, 0.0)),
    (mxfp4("even"), audit.gaussian, (12.53, 22.36, 0.273, 9.937, -20.00, -0.031)),
    (QuantSpec.resolve("e2m1", NVFP4_SCALES), audit.gaussian, (9.04, 5.64, 0.195, 8.67, -5.44, -0.027)),
]


@pytest.mark.parametrize(("spec", "make", "figures"), FIGURES, ids=lambda value: getattr(value, "scale_rule", ""))
def test_figures_of_a_normal_input(spec, make, figures):
    got = of(make(audit.SHAPE, 7), spec)
    for name, value in zip(("mse", *TERMS[:5]), figures, strict=True):
        assert got[name] * 1e3 == pytest.approx(value, rel=0.01, abs=0.003), name
    if spec.scale_rule == "floor" and spec.scales == MXFP4_SCALES:
        assert got["cos"] == pytest.approx(-0.666, abs=0.002) and got["dead_share"] == pytest.approx(0.0775, rel=0.01)


def every_spec() -> list[QuantSpec]:
    """Those of all recipes, each once."""
    found = {}
    for name in library.names():
        for operand in library.load(name).operands().values():
            if operand.is_quantized:
                found[operand.spec.key] = operand.spec
    return list(found.values())


def test_the_terms_of_every_quantizer_add_up():
    """To 1e-12 of the error, of heavy-tailed data with zeros, behind a rotation and with random bits where it has."""
    x = audit.student_t((128, 256), 1)
    x[:, :40] = 0
    rng, layer = torch.tensor([1, 2, 3]), torch.tensor(0)
    signs = torch.ones(64)
    specs = every_spec()
    assert len(specs) > 20 and any(spec.per_row for spec in specs) and any(spec.prescale != 1 for spec in specs)
    for spec in specs:
        for axis in (1, 0):
            turned = signs if not spec.is_square else None
            wish = Wish(spec, axis, turned, "exact", Draw(rng, layer, 0), False, ("values",))
            got = {name: float(value) for name, value in decompose(x, wish).items()}
            assert tuple(got) == NAMES
            assert sum(got[name] for name in TERMS) == pytest.approx(got["mse"], rel=1e-12), spec
            made = wish.quantize(x)
            y = (made.values if axis == 1 else made.values.t()).double()
            scale = torch.tensor(1.0) if made.scale is None else made.scale
            y = y * (scale.t() if axis == 0 and scale.ndim == 2 else scale).double()
            exact = reference.stored(x, axis, turned).double()
            assert got["mse"] == pytest.approx(float((y - exact).square().sum() / exact.square().sum()), rel=1e-9)
            assert (got["random"] > 0) == spec.draws_random_bits, spec


def test_tables_and_empty_tensors():
    zeros = of(torch.zeros(16, 32), QuantSpec.resolve("po4_gauss", default_scales("po4_gauss")))
    assert zeros["dead_share"] == zeros["underflowed"] == 0


def test_a_layer_is_decomposed_slot_by_slot():
    """As the counters are: by the operands of one step."""
    layer = QuantLinear(nn.Linear(128, 128, bias=False), library.load("quartet2"), 0, torch.tensor([1, 2, 3]))
    x = audit.gaussian((128, 128), 3).requires_grad_()
    found = slot_stats(layer, lambda: layer(x).float().square().mean().backward(), decompose)[""]
    assert set(found) == {"fprop.x", "fprop.w", "dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x"}
    assert found["fprop.x"]["mse"] == pytest.approx(audit.errors(_of_slot("fprop.x"), x.detach())[0], rel=1e-6)
    assert found["fprop.x"]["random"] == 0 < found["dgrad.dy"]["random"]


def _of_slot(slot: str) -> audit.Quantizer:
    return audit.Quantizer(library.load("quartet2").operand(slot).spec, None)
