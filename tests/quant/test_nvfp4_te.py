"""Recipe nvfp4_te against tests/quant/fake_te.py: nothing here meets Transformer Engine; it needs a Blackwell GPU."""

import fake_te
import pytest
import torch
from torch import nn

from quant import library
from quant.price import kind_of
from quant.products.te import Nvfp4TE, TELinear


@pytest.fixture
def te(monkeypatch):
    fake_te.install(monkeypatch)


def test_the_recipe_file_is_transformer_engines_default(te):
    recipe = library.load("nvfp4_te")
    assert recipe == Nvfp4TE() and library.label(recipe) == "nvfp4_te" and kind_of(recipe, "wgrad").bits == 4
    made = recipe.te_recipe()
    off = made.disable_rht, made.disable_stochastic_rounding, made.disable_2d_quantization, made.row_scaled_activation
    assert off == (False,) * 4 and made.backward_override is None and made.nvfp4_4over6 == "none"


def test_options_reach_transformer_engine_whatever_the_environment(te, monkeypatch):
    monkeypatch.setenv("NVTE_NVFP4_DISABLE_RHT", "0")
    assert library.label(Nvfp4TE(rht=False)) == "nvfp4_te rht=False"
    made = Nvfp4TE(rht=False, weights_2d=False, four_over_six="all", backward="dequantized").te_recipe()
    assert made.disable_rht and made.disable_2d_quantization and not made.disable_stochastic_rounding
    assert (made.nvfp4_4over6, made.nvfp4_4over6_err_mode, made.backward_override) == ("all", "MSE", "dequantized")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rht": "no"}, r"quant\.rht='no'; use true or false"),
        ({"four_over_six": "x"}, "use one of none, weights, activations, all"),
        ({"backward": "bf16"}, "use one of quantized, dequantized, high_precision"),
        ({"four_over_six": "all"}, r"set quant\.rht=false, or quant\.four_over_six=weights"),
        ({"rth": False}, "unknown field 'rth' of recipe nvfp4_te; did you mean rht"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Nvfp4TE.from_dict({"scheme": "nvfp4_te"} | options)


def test_a_machine_that_cant_run_it_says_why(te, monkeypatch):
    with pytest.raises(RuntimeError, match="recipe nvfp4_te: Transformer Engine needs a CUDA GPU"):
        Nvfp4TE().require()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match=r"recipe nvfp4_te: Device compute capability 10\.0 or higher"):
        Nvfp4TE().require()
    monkeypatch.delattr("transformer_engine.pytorch.is_nvfp4_available")
    with pytest.raises(RuntimeError, match=r"needs 2\.19 or newer: .*pip install"):
        Nvfp4TE().require()


def test_a_layer_multiplies_under_it_and_keeps_no_state(te):
    linear = nn.Linear(32, 64, bias=False)
    layer = Nvfp4TE().build(linear, 0, torch.zeros(3, dtype=torch.int64))
    assert isinstance(layer, TELinear) and set(layer.state_dict()) == {"weight"}
    x = torch.randn(32, 32).bfloat16().requires_grad_()
    layer(x).backward(torch.randn(32, 64).bfloat16())
    assert isinstance(layer.engine.recipe, fake_te.NVFP4BlockScaling)
    assert x.grad.isfinite().all() and layer.weight.grad.isfinite().all()
    assert {d.size: d.number for d in Nvfp4TE().divisors()} == {"in_features": 32, "out_features": 32, "tokens": 32}
