"""The model against the published shapes and against transformers' independent Llama."""

import math

import pytest
import torch

from kernels.pointwise.reference_impl import turn
from launcher.compose import compose
from models.llama import Llama, LlamaConfig, initial_value, permute_for_half_split, rope_table
from training.config import ModelSection

# (layers, width, heads, hidden, non-embedding parameters), from the published protocol and the table.
PRESETS = {
    "llama_30m": (6, 640, 5, 1792, 30_482_560),
    "llama_50m": (7, 768, 6, 2048, 49_556_736),
    "llama_100m": (8, 1024, 8, 2816, 102_777_856),
    "llama_200m": (10, 1280, 10, 3584, 203_188_480),
    "llama_430m": (13, 1664, 13, 4608, 443_068_288),
    "llama_800m": (16, 2048, 16, 5632, 822_151_168),
    "llama_1b6": (20, 2560, 20, 6912, 1_586_076_160),
    "llama_1b9": (24, 2560, 20, 6912, 1_903_290_880),
}
TINY = LlamaConfig(layers=2, width=64, heads=4, hidden=128, vocab_size=97, max_seq_len=32)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_exactly_the_published_parameters(name):
    section = compose([f"model={name}"]).config.model
    layers, width, heads, hidden, count = PRESETS[name]
    assert (section.layers, section.width, section.heads, section.hidden) == (layers, width, heads, hidden)
    assert section.lr == pytest.approx(1.2e-3 * min(1, 768 / width), rel=1e-12)
    config = LlamaConfig(layers, width, heads, hidden, vocab_size=32000)
    with torch.device("meta"):
        model = Llama(config)
    total = sum(p.numel() for p in model.parameters())
    assert config.parameters_non_embedding == count
    assert total - 2 * 32000 * width == count
    assert config.parameters == total


def test_llama_tiny_fits_a_cpu():
    section = compose(["model=llama_tiny"]).config.model
    assert section.layers <= 4 and section.width <= 256
    assert section.width // section.heads == 64
    assert section.hidden % 128 == 0


def ours(config: LlamaConfig = TINY, seed: int = 3) -> Llama:
    model = Llama(config, compute_dtype=torch.float32)
    model.init_weights(seed)
    return model


def theirs(model: Llama):
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    c = model.config
    hf = LlamaForCausalLM(
        HFConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.width,
            intermediate_size=c.hidden,
            num_hidden_layers=c.layers,
            num_attention_heads=c.heads,
            num_key_value_heads=c.heads,
            max_position_embeddings=c.max_seq_len,
            rms_norm_eps=c.norm_eps,
            rope_theta=c.rope_theta,
            tie_word_embeddings=False,
        )
    )
    hf.load_state_dict(hf_weights(model))
    return hf.eval()


def hf_weights(model: Llama) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    out = {"model.embed_tokens.weight": state["embed.weight"], "model.norm.weight": state["norm.weight"]}
    out["lm_head.weight"] = state["lm_head.weight"]
    for i in range(model.config.layers):
        mine, hf = f"blocks.{i}.", f"model.layers.{i}."
        q, k, v = state[mine + "attn.qkv.weight"].chunk(3)
        gate, up = state[mine + "mlp.gate_up.weight"].chunk(2)
        out[hf + "self_attn.q_proj.weight"] = permute_for_half_split(q, model.config.heads)
        out[hf + "self_attn.k_proj.weight"] = permute_for_half_split(k, model.config.heads)
        out[hf + "self_attn.v_proj.weight"] = v
        out[hf + "self_attn.o_proj.weight"] = state[mine + "attn.out.weight"]
        out[hf + "mlp.gate_proj.weight"], out[hf + "mlp.up_proj.weight"] = gate, up
        out[hf + "mlp.down_proj.weight"] = state[mine + "mlp.down.weight"]
        out[hf + "input_layernorm.weight"] = state[mine + "attn_norm.weight"]
        out[hf + "post_attention_layernorm.weight"] = state[mine + "mlp_norm.weight"]
    return out


def test_logits_equal_those_of_transformers():
    model = ours()
    # Larger weights and gains away from one: with the initial 0.02 attention is nearly uniform and hides RoPE mistakes.
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            parameter.copy_(1 + 0.3 * noise if parameter.ndim == 1 else 0.3 * noise)
    tokens = torch.randint(0, TINY.vocab_size, (3, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mine, reference = model(tokens), theirs(model)(tokens).logits
    # FP32 sums in another order: a few hundred roundings of 2^-24 relative to the largest logit.
    assert (mine - reference).abs().max() < 1e-5 * reference.abs().max()


def test_rope_turns_neighbouring_pairs_by_position():
    table = rope_table(8, 4, 1e4)
    x = torch.tensor([1.0, 0.0, 0.0, 1.0]).expand(1, 8, 1, 4)
    turned = turn(x, table)[0, :, 0]
    for position in range(8):
        slow = position * 1e4**-0.5
        expected = [math.cos(position), math.sin(position), -math.sin(slow), math.cos(slow)]
        assert turned[position].tolist() == pytest.approx(expected, abs=1e-6)


def test_initialization_depends_on_seed_and_names_alone():
    first, again, other = Llama(TINY), Llama(TINY), Llama(TINY)
    torch.manual_seed(99)
    hash_first = first.init_weights(5)
    torch.manual_seed(1)
    assert again.init_weights(5) == hash_first
    assert other.init_weights(6) != hash_first
    deeper = Llama(LlamaConfig(layers=3, width=64, heads=4, hidden=128, vocab_size=97, max_seq_len=32))
    assert deeper.init_weights(5) != hash_first
    same = deeper.state_dict()["blocks.1.attn.qkv.weight"], first.state_dict()["blocks.1.attn.qkv.weight"]
    assert torch.equal(*same)
    drawn = initial_value("blocks.1.attn.qkv.weight", same[0].shape, deeper.config, 5)
    assert torch.equal(same[0], drawn)
    # That of every run so far: a run's init_hash must go on meaning the same.
    assert deeper.init_weights(5) == "8e8675094e1b8fd0"


def test_initial_standard_deviations():
    config = LlamaConfig(layers=2, width=256, heads=4, hidden=512, vocab_size=1000)
    model = Llama(config)
    model.init_weights(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        residual = name.endswith(("out.weight", "down.weight"))
        expected = 0.02 / math.sqrt(4) if residual else 0.02
        # At least 65,536 draws: the standard deviation is known to 1 / sqrt(2 n) = 0.28 %; five of those.
        assert parameter.std().item() == pytest.approx(expected, rel=0.014), name


def test_residual_stream_stays_fp32_around_bf16_layers():
    model = Llama(TINY)
    model.init_weights(0)
    seen = []
    model.blocks[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    for block in model.blocks:
        for linear in (block.attn.qkv, block.attn.out, block.mlp.gate_up, block.mlp.down):
            linear.to(torch.bfloat16)
    hidden = model.hidden(torch.zeros(1, 4, dtype=torch.int64))
    assert seen == [torch.float32]
    assert hidden.dtype == torch.bfloat16


def test_too_long_a_sequence_is_an_error():
    with pytest.raises(ValueError, match="33 positions; the model was built for 32"):
        ours()(torch.zeros(1, 33, dtype=torch.int64))


def test_odd_head_dimension_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"Set model\.heads=1"):
        LlamaConfig(layers=1, width=100, heads=7, hidden=128, vocab_size=10)


def test_flops_per_token_counts_lm_head_but_not_the_embedding():
    config = LlamaConfig(layers=6, width=640, heads=5, hidden=1792, vocab_size=32000)
    assert config.flops_per_token(512) == 6 * (30_482_560 + 32000 * 640) + 12 * 6 * 640 * 512


def test_norms_have_the_configurations_epsilon():
    shape = {"layers": 1, "width": 64, "heads": 1, "hidden": 64, "vocab_size": 16}
    assert LlamaConfig(**shape).norm_eps == ModelSection().norm_eps == 1e-5
    model = Llama(LlamaConfig(**shape, norm_eps=1.0), compute_dtype=torch.float32)
    model.init_weights(0)
    _, y = model.norm(torch.full((1, 64), 0.5))
    assert torch.allclose(y, torch.full((1, 64), 0.5 / 1.25**0.5))
