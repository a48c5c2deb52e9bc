"""A trained Llama as transformers has it: its configuration and its weights, plain or as packed NVFP4.

transformers has q,k,v and gate,up apart and turns the halves of a head where ours turns neighbours, so rows are split
and permuted, whatever lies in them: weights, codes, block scales.
"""

from typing import Any

import torch
from torch import Tensor, nn

from kernels.formats.nvfp4 import NVFP4Tensor
from kernels.spec import NVFP4_BLOCK
from models.llama import Llama, LlamaConfig, permute_for_half_split
from quant.plan import Plan

FORMAT = "nvfp4-pack-quantized"  # of the compressed-tensors library, which transformers and vLLM read by


def check_exportable(model: nn.Module) -> None:
    """Raise ValueError for a model that transformers doesn't have."""
    if not isinstance(model, Llama):
        why = f": {reason}" if (reason := model.refuses.get("export")) else ""
        raise ValueError(f"{type(model).__name__} can't be exported to transformers; only the llama family can{why}")


def transformers_config(config: LlamaConfig, bos_id: int | None) -> dict[str, Any]:
    """config.json of transformers' LlamaForCausalLM. A document ends where the next one's BOS follows, so that is the
    end of text, too. No padding token here: transformers would never train its row of the embedding again."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_llama3:
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        rope |= {"rope_type": "llama3", **dict(zip(names, config.rope_llama3, strict=True))}
        rope[names[-1]] = int(rope[names[-1]])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads or config.heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        # transformers 5 reads rope_parameters, earlier ones rope_theta and rope_scaling
        "rope_theta": config.rope_theta,
        "rope_parameters": rope,
        **({"rope_scaling": rope} if config.rope_llama3 else {}),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tied,
        "bos_token_id": bos_id,
        "eos_token_id": bos_id,
    }


def plain_weights(model: Llama) -> dict[str, Tensor]:
    """Those of no linear layer within the blocks."""
    state = model.state_dict()
    out = {"model.embed_tokens.weight": state["embed.weight"], "model.norm.weight": state["norm.weight"]}
    if not model.config.tied:
        out["lm_head.weight"] = state["lm_head.weight"]
    for i in range(model.config.layers):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        out |= {
            theirs + "input_layernorm.weight": state[ours + "attn_norm.weight"],
            theirs + "post_attention_layernorm.weight": state[ours + "mlp_norm.weight"],
        }
    return out


def linear_weights(model: Llama, packed: dict[str, NVFP4Tensor]) -> dict[str, Tensor]:
    """The linear layers of the blocks: those in `packed` by the three tensors of FORMAT, the others by their weight."""
    out = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("blocks."):
            kinds = packed_tensors(packed[name]) if name in packed else {"weight": module.weight.detach()}
            for kind, tensor in kinds.items():
                parts = split_rows(name, tensor, model.config)
                out |= {f"{theirs}.{kind}": part.contiguous() for theirs, part in parts.items()}
    return out


def split_rows(name: str, rows: Tensor, config: LlamaConfig) -> dict[str, Tensor]:
    """{transformers' module: its rows} of one of our linear layers; a tensor of one element is everybody's."""
    _, number, kind = name.split(".", 2)
    prefix, kv_heads = f"model.layers.{number}.", config.kv_heads or config.heads
    modules = {
        "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attn.out": ("self_attn.o_proj",),
        "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down": ("mlp.down_proj",),
    }[kind]
    if rows.ndim == 1:
        return {prefix + module: rows.clone() for module in modules}
    if kind == "attn.qkv":
        q, k, v = rows.split((config.width, config.kv_width, config.kv_width))
        parts = permute_for_half_split(q, config.heads), permute_for_half_split(k, kv_heads), v
    else:
        parts = rows.chunk(len(modules))
    return {prefix + module: part for module, part in zip(modules, parts, strict=True)}


def packed_tensors(weight: NVFP4Tensor) -> dict[str, Tensor]:
    """The tensors of one linear layer under FORMAT.

    weight_packed: uint8 [N, K/2], the even element in the low nibble. weight_scale: float8_e4m3fn [N, K/16]; one scale
    of a 16x16 block is written 16 times. weight_global_scale: float32 [1], what block scales are divided by: the
    reciprocal of our tensor scale, rounded once, and exact where that is a power of two.
    """
    scales = weight.block_scales.view(torch.uint8)
    if weight.is_square:
        scales = scales.repeat_interleave(NVFP4_BLOCK, dim=0)
    return {
        "weight_packed": weight.codes,
        "weight_scale": scales.view(torch.float8_e4m3fn),
        "weight_global_scale": (1.0 / weight.global_scale).reshape(1),
    }


def nvfp4_weights(model: Llama, plan: Plan) -> dict[str, NVFP4Tensor]:
    """{layer: its weight as the forward multiplies it}, of the layers that the plan quantizes.

    ValueError, with the layer and the reason, for a forward whose weights are no NVFP4 codes, and where no layer's are.
    """
    found = {}
    for entry in plan.entries:
        try:
            weight = entry.recipe.nvfp4_weight(model.get_submodule(entry.name).weight.detach())
        except ValueError as error:
            raise ValueError(f"{entry.name} can't be exported as NVFP4: {error}; use --dtype bfloat16") from None
        if weight is not None:
            found[entry.name] = weight
    if not found:
        raise ValueError(f"recipe {plan.label} multiplies no NVFP4 weight; use --dtype bfloat16")
    return found


def quantization_config(model: Llama, packed: dict[str, NVFP4Tensor]) -> dict[str, Any]:
    """quantization_config of config.json: weights alone, so activations stay in BF16."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    ours = [name for name in linears if name.startswith("blocks.") and name not in packed]
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": NVFP4_BLOCK}
    weights |= {"symmetric": True, "dynamic": False}
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme | {"format": FORMAT}},
        "ignore": ["lm_head", *(theirs for name in ours for theirs in split_rows(name, torch.ones(1), model.config))],
    }
