"""The estimate by hand, and the directions in which it must move."""

import pytest

from models.llama import LlamaConfig
from training.memory import GIB, estimate

CONFIG = LlamaConfig(layers=2, width=1000, heads=10, hidden=3000, vocab_size=5000)


def test_states_take_16_bytes_a_parameter():
    states = estimate(CONFIG, 1024, packed=False).parts["weights, gradients, moments"]
    assert states == pytest.approx(16 * CONFIG.parameters / GIB)
    shared = estimate(CONFIG, 1024, packed=False, shards=4).parts["weights, gradients, moments"]
    assert shared == pytest.approx(states / 4)


def test_activations_by_hand():
    """Per token and block: 2 x 4000 (norm inputs) + 2 (4 x 1000 + 2 x 3000) + 2 (3 x 1000 + 3000) = 40,000 bytes;
    at the ends 1000 (2 x 4 + 3 x 2) = 14,000."""
    got = estimate(CONFIG, 1024, packed=False).parts["activations"]
    assert got == pytest.approx(1024 * (2 * 40_000 + 14_000) / GIB)
    packed = estimate(CONFIG, 1024, packed=True).parts["activations"]
    assert packed == pytest.approx(1024 * (2 * (40_000 - 6000 * (2 - 0.5625)) + 14_000) / GIB)
    recomputed = estimate(CONFIG, 1024, packed=False, recompute=True).parts["activations"]
    assert recomputed == pytest.approx(1024 * (2 * 4000 + 40_000 + 14_000) / GIB)


def test_total_is_the_sum_of_its_parts():
    found = estimate(CONFIG, 4096, packed=True)
    assert found.total == pytest.approx(sum(found.parts.values()))


def test_parallel_modes_hold_more_by_hand():
    """FSDP: embedding and lm_head, two blocks, and gradients, 4 bytes each; DDP: a copy of the gradients."""
    ends, blocks = 2 * CONFIG.vocab_size * CONFIG.width, CONFIG.parameters - 2 * CONFIG.vocab_size * CONFIG.width
    two = 2 * blocks / CONFIG.layers
    one = estimate(CONFIG, 1024, packed=False, shards=4).parts["gathered by FSDP"]
    assert one == pytest.approx(4 * (2 * ends + 2 * two) / GIB)
    several = estimate(CONFIG, 1024, packed=False, shards=4, accumulates=True).parts["gathered by FSDP"]
    assert several == pytest.approx(4 * (ends + two + CONFIG.parameters) / GIB)
    copies = estimate(CONFIG, 1024, packed=False, replicated=True).parts["gradients on their way"]
    assert copies == pytest.approx(4 * CONFIG.parameters / GIB)
    assert estimate(CONFIG, 1024, packed=False).parts.keys() == {
        "weights, gradients, moments",
        "activations",
        "temporaries",
    }
