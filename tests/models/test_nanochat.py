"""The nanochat model against a plain FP64 reimplementation, its counts, its windows, its initialization."""

import math

import pytest
import torch
from torch import Tensor

from models.attention import dense, sight
from models.nanochat import Nanochat, NanochatConfig

TINY = NanochatConfig(layers=4, width=32, heads=2, hidden=64, vocab_size=50, max_seq_len=16)


def tiny_model(seed: int = 3) -> Nanochat:
    """FP32, with residual projections and scales away from their neutral start."""
    model = Nanochat(TINY, compute_dtype=torch.float32)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                parameter.normal_(0, 0.2, generator=generator)
        model.residual_scales.uniform_(0.7, 1.3, generator=generator)
        model.embedding_scales.uniform_(-0.3, 0.3, generator=generator)
        model.lm_head.weight.normal_(0, 3.0, generator=generator)  # large enough for the soft cap to bend
    return model


def norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


def plain_forward(w: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """One sequence [T] -> logits [T, V], position by position, in FP64."""
    length, half = len(tokens), TINY.head_dim // 2
    angle = torch.arange(length)[:, None] * 1e4 ** -(torch.arange(half, dtype=torch.float64) / half)

    def turn(x: Tensor) -> Tensor:
        z = torch.view_as_complex(x.unflatten(-1, (half, 2)).contiguous()) * torch.polar(torch.ones_like(angle), angle)
        return torch.view_as_real(z).flatten(-2)

    first = x = norm(w["embed.weight"][tokens])
    for layer in range(TINY.layers):
        x = w["residual_scales"][layer] * x + w["embedding_scales"][layer] * first
        p = f"blocks.{layer}."
        h, heads = norm(x), []
        for head in range(TINY.heads):
            rows = slice(head * TINY.head_dim, (head + 1) * TINY.head_dim)
            q, k, v = (h @ w[f"{p}attn.{name}.weight"][rows].T for name in "qkv")
            q, k, out = norm(turn(q)), norm(turn(k)), []
            for i in range(length):
                start = max(0, i - 8) if layer in (0, 1, 2) else 0  # SSSL, half of 16
                scores = (k[start : i + 1] @ q[i]) / math.sqrt(TINY.head_dim)
                out.append(scores.softmax(0) @ v[start : i + 1])
            heads.append(torch.stack(out))
        x = x + torch.cat(heads, -1) @ w[f"{p}attn.out.weight"].T
        x = x + (norm(x) @ w[f"{p}mlp.up.weight"].T).relu().square() @ w[f"{p}mlp.down.weight"].T
    return 15 * torch.tanh(norm(x) @ w["lm_head.weight"].T / 15)


def test_forward_agrees_with_a_plain_fp64_reimplementation():
    model = tiny_model()
    tokens = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(0))
    weights = {name: value.double() for name, value in model.state_dict().items()}
    expected = torch.stack([plain_forward(weights, row) for row in tokens])
    logits = model(tokens)
    assert logits.abs().max() > 12  # the cap matters here
    # FP32 against FP64 through 4 layers: some thousand roundings of 6e-8 on values up to 15.
    torch.testing.assert_close(logits.double(), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [((20, 1280, 10, 5120), 560_988_200), ((32, 2048, 16, 8192), 1_879_048_256)],
)
def test_parameter_counts_and_lengths_of_the_published_runs(shape, parameters):
    config = NanochatConfig(*shape, vocab_size=65536)
    with torch.device("meta"):
        model = Nanochat(config)
    assert config.parameters == sum(p.numel() for p in model.parameters()) == parameters
    assert round(20 * parameters / 524288, -1) == {560_988_200: 21400, 1_879_048_256: 71680}[parameters]


def test_windows_are_half_the_context_but_in_every_fourth_and_the_last_layer():
    assert NanochatConfig(6, 32, 2, 64, 50, 2048).windows == (1024, 1024, 1024, None, 1024, None)
    mask = dense(sight(None, 2), 1, 5, torch.device("cpu"))
    assert mask.int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]


def test_initial_weights_have_their_published_spread_and_the_model_starts_as_its_embedding():
    config = NanochatConfig(2, 256, 2, 1024, 500, 16)
    model = Nanochat(config, compute_dtype=torch.float32)
    assert model.init_weights(0) == Nanochat(config).init_weights(0) != model.init_weights(1)
    q, embed, head = (w.detach() for w in (model.blocks[0].attn.q.weight, model.embed.weight, model.lm_head.weight))
    assert q.abs().max() <= math.sqrt(3 / 256) and q.std() == pytest.approx(1 / 16, rel=0.02)
    assert embed.std() == pytest.approx(1, rel=0.02)
    assert head.std() == pytest.approx(1e-3, rel=0.02)
    tokens = torch.arange(10)[None]
    torch.testing.assert_close(model.hidden(tokens), norm(norm(model.embed(tokens))), atol=1e-6, rtol=1e-5)


def test_too_long_a_sequence_and_odd_heads_are_refused():
    with pytest.raises(ValueError, match="17 positions; the model was built for 16"):
        tiny_model().hidden(torch.zeros(1, 17, dtype=torch.int64))
    with pytest.raises(ValueError, match="head dimension must be even"):
        NanochatConfig(1, 30, 2, 64, 50)
