"""The estimate by hand, against measured peaks, and what each recipe keeps."""

from dataclasses import replace

import pytest
import torch

from launcher.compose import compose
from models.llama import Llama, LlamaConfig
from quant.plan import plan_of
from quant.product import Kept
from training.start.memory import GIB, estimate, kept_of
from training.start.shapes import shape_of

CONFIG = LlamaConfig(layers=2, width=1000, heads=10, hidden=3000, vocab_size=5000)
ENDS, BLOCK = 2 * 5000 * 1000, 4 * 1000**2 + 3 * 1000 * 3000 + 2 * 1000 + 500  # the last norm is dealt to the blocks
BYTES_PACKED = 4.5 / 8  # a 4-bit code and its share of an E4M3 scale per 16
BF16, PACKED = Kept(), Kept(BYTES_PACKED, BYTES_PACKED)


def parts(tokens: int = 1024, kept: Kept = BF16, **options) -> dict[str, float]:
    return {name: size * GIB for name, size in estimate(CONFIG, tokens, kept, **options).parts.items()}


def test_states_take_12_bytes_a_parameter():
    assert parts()["weights, moments"] == pytest.approx(12 * CONFIG.parameters)
    assert parts(shards=4)["weights, moments"] == pytest.approx(3 * CONFIG.parameters)
    with_muon = 8 * 2 * BLOCK + 12 * ENDS  # one moment less for the blocks' matrices
    assert parts(optimizer="muon")["weights, moments"] == pytest.approx(with_muon, rel=1e-4)


def test_activations_by_hand():
    """Per token and block: 2 x 4000 (norm inputs) + 2 (4 x 1000 + 2 x 3000) + 2 (3 x 1000 + 3000) = 40,000 bytes;
    at the ends 1000 (2 x 4 + 3 x 2) = 14,000. Packed operands of weights come once a block."""
    assert parts()["activations"] == pytest.approx(1024 * (2 * 40_000 + 14_000))
    packed = 1024 * (2 * (40_000 - 6000 * (2 - 0.5625)) + 14_000) + 2 * BLOCK * 0.5625
    assert parts(kept=PACKED)["activations"] == pytest.approx(packed)
    assert parts(recompute=True)["activations"] == pytest.approx(1024 * (2 * 4000 + 40_000 + 14_000))


def test_gradients_take_the_place_of_activations():
    """One micro-batch: lm_head's, unless all of them need more than the activations leave. Several: all of the earlier
    ones. DDP's copy comes when the activations are gone."""
    whole, head = 4 * CONFIG.parameters, 4 * ENDS / 2
    assert parts(tokens=4096)["gradients"] == pytest.approx(head)
    few = parts(tokens=1024)
    assert few["gradients"] == pytest.approx(head + whole - few["activations"])
    assert parts(tokens=4096, accumulates=True)["gradients"] == pytest.approx(whole)
    copied = parts(tokens=1024, accumulates=True, replicated=True)
    assert copied["gradients"] == pytest.approx(3 * whole - copied["activations"])


def test_fsdp_gathers_by_hand():
    """All weights, or embedding, lm_head and two blocks, 4 bytes each; gradients of these, or all where a step has
    several micro-batches."""
    one, several = parts(shards=4), parts(shards=4, accumulates=True)
    assert one["gathered by FSDP"] == several["gathered by FSDP"] == pytest.approx(4 * CONFIG.parameters)
    assert one["gradients"] == pytest.approx(4 * (ENDS + 2 * BLOCK))
    assert several["gradients"] == pytest.approx(4 * CONFIG.parameters)
    assert "gathered by FSDP" not in parts()
    deeper = estimate(replace(CONFIG, layers=3), 1024, BF16, shards=4, recompute=True).parts["gathered by FSDP"] * GIB
    assert deeper == pytest.approx(4 * (ENDS + 2 * BLOCK), rel=1e-4)


def test_total_is_the_sum_of_its_parts():
    found = estimate(CONFIG, 4096, PACKED)
    assert found.total == pytest.approx(sum(found.parts.values()))


@pytest.mark.parametrize(
    ("model", "recipe", "measured"),
    [("llama_30m", "bf16", 11.9), ("llama_100m", "bf16", 24.1), ("llama_30m", "quartet2", 10.4)],
)
def test_within_15_percent_of_the_peaks_measured_on_one_h100(model, recipe, measured):
    """128 x 512 tokens, vocabulary 32,000, one micro-batch a step (README, the speed table)."""
    config = compose([f"model={model}", f"quant={recipe}"]).config
    found = estimate(shape_of(config, 32000), 65536, kept(config)).total
    assert found == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("bf16", Kept(2.0, 0.0)),
        ("quartet2", Kept(0.5625, 0.5625)),
        ("sr", Kept(0.5625, 0.5625)),
        ("nvfp4_rtn", Kept(0.5625, 0.0)),  # dgrad.w is made from the master again
        ("nvidia", Kept(0.5625, 0.50390625)),  # one scale for 16x16 weights
        ("fp8", Kept(1.0, 1.0)),
    ],
)
def test_what_a_recipe_keeps(recipe, expected):
    assert kept(compose([f"quant={recipe}"]).config) == expected


def test_forward_only_keeps_what_fprop_used():
    assert kept(compose(["quant=quartet2", "quant.dgrad=none", "quant.wgrad=none"]).config) == Kept(0.5625, 0.5625)


def kept(config) -> Kept:
    with torch.device("meta"):
        return kept_of(plan_of(Llama(LlamaConfig(1, 256, 2, 256, vocab_size=64)), config.quant))


def test_an_epsilon_that_nanochat_would_not_use_is_refused():
    with pytest.raises(ValueError, match=r"model\.norm_eps=0\.001: model.family=nanochat has none"):
        shape_of(compose(["model=nanochat_560m", "optim=muon", "schedule=wsd", "model.norm_eps=1e-3"]).config, 65_536)
