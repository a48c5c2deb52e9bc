"""A trained model out of its run folder, for export and for sampling text. One process, no optimizer, no recipe."""

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from base.runfolder import CHECKPOINTS, RUN, read_json
from data.tokenizer import TextTokenizer
from models import FIRST, family
from models.llama import Llama, LlamaConfig, permute_for_half_split, rope_table
from training.checkpoint.manifest import checkpoints, latest_good, problems, step_name, step_of
from training.checkpoint.state import load_model
from training.checkpoint.storage import CheckpointError


def split_step(text: str) -> tuple[Path, int | None]:
    """ "runs/NAME@1000" -> (runs/NAME, 1000); without a step, None."""
    folder, at, step = text.rpartition("@")
    return (Path(folder), int(step)) if at and step.isdigit() else (Path(text), None)


def find_checkpoint(run_dir: Path, step: int | None = None) -> Path:
    """The newest whole checkpoint, or that of `step`. Raises CheckpointError where there is none or it is damaged."""
    if step is None:
        found = latest_good(run_dir)
        if found is None:
            raise CheckpointError(f"{run_dir} has no checkpoint; is it a run folder, such as runs/<name>?")
        return found
    path = run_dir / CHECKPOINTS / step_name(step)
    there = checkpoints(path.parent)
    if path not in there:
        steps = ", ".join(str(step_of(one)) for one in there) or "none"
        raise CheckpointError(f"{run_dir} has no checkpoint of step {step}; it has: {steps}")
    reasons = problems(path)
    if reasons:
        raise CheckpointError(f"{path} can't be used: {'; '.join(reasons[:3])}")
    return path


def load_trained(run_dir: str | Path, step: int | None = None) -> tuple[nn.Module, dict[str, Any], int]:
    """(model on the CPU in FP32 with the master weights, run.json, step). Computes without any recipe."""
    run_dir = Path(run_dir)
    path = find_checkpoint(run_dir, step)
    run = read_json(run_dir / RUN)
    stored = {key.removeprefix("model."): value for key, value in run["numerics"].items() if key.startswith("model.")}
    built = family(stored.get("family", FIRST))
    known = {field.name for field in fields(built.Shape)}
    config = built.Shape(**{name: stored[name] for name in known & stored.keys()}, max_seq_len=run["seq_len"])
    model = built(config, compute_dtype=torch.float32)
    meta = load_model(path, model)
    model.rope.copy_(
        rope_table(config.max_seq_len, config.head_dim, config.rope_theta, getattr(config, "rope_llama3", ()))
    )
    return model.eval(), run, meta["step"]


def run_tokenizer(run: dict[str, Any], given: Path | None = None) -> TextTokenizer | None:
    """The tokenizer of a run (its run.json), with the BOS that its data began documents with; None if the data is gone.

    `given`: a tokenizer.json to read instead. ValueError for one that the run was not trained with: its numbers would
    stand for other text.
    """
    folder = Path(run["data_path"]) if run.get("data_path") else None
    manifest = folder / "manifest.json" if folder else None
    bos = json.loads(manifest.read_text())["tokenizer"]["bos"] if manifest and manifest.exists() else None
    if given is None and bos is None:
        return None
    tokenizer = TextTokenizer(given or folder / "tokenizer.json", bos)
    if tokenizer.hash != run["tokenizer_hash"]:
        raise ValueError(f"{tokenizer.path} is not the tokenizer that {run['name']} was trained with")
    return tokenizer


def check_exportable(model: nn.Module) -> None:
    """Raise ValueError for a model that transformers_config and transformers_weights don't know."""
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


def transformers_weights(model: Llama) -> dict[str, Tensor]:
    """Our weights under transformers' names: q,k,v and gate,up split, rows of q and k permuted (their RoPE turns the
    halves of a head, ours neighbouring pairs)."""
    state = model.state_dict()
    out = {
        "model.embed_tokens.weight": state["embed.weight"],
        "model.norm.weight": state["norm.weight"],
    }
    if not model.config.tied:
        out["lm_head.weight"] = state["lm_head.weight"]
    kv_heads, kv_width = model.config.kv_heads or model.config.heads, model.config.kv_width
    for i in range(model.config.layers):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        q, k, v = state[ours + "attn.qkv.weight"].split((model.config.width, kv_width, kv_width))
        gate, up = state[ours + "mlp.gate_up.weight"].chunk(2)
        out |= {
            theirs + "self_attn.q_proj.weight": permute_for_half_split(q, model.config.heads),
            theirs + "self_attn.k_proj.weight": permute_for_half_split(k, kv_heads),
            theirs + "self_attn.v_proj.weight": v,
            theirs + "self_attn.o_proj.weight": state[ours + "attn.out.weight"],
            theirs + "mlp.gate_proj.weight": gate,
            theirs + "mlp.up_proj.weight": up,
            theirs + "mlp.down_proj.weight": state[ours + "mlp.down.weight"],
            theirs + "input_layernorm.weight": state[ours + "attn_norm.weight"],
            theirs + "post_attention_layernorm.weight": state[ours + "mlp_norm.weight"],
        }
    return {name: tensor.contiguous() for name, tensor in out.items()}


@torch.no_grad()
def sample(
    model: nn.Module, prompt: list[int], count: int, temperature: float, top_k: int, seed: int, stop: int | None = None
) -> Iterator[int]:
    """Yield `count` token ids that follow `prompt`; temperature 0 takes the likeliest. The context is the model's
    training length; older tokens fall out of it. `stop`: the last one to be yielded, if it comes earlier."""
    if not prompt:
        raise ValueError("the prompt needs at least one token; BOS starts a document")
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(count):
        logits = model(torch.tensor([tokens[-model.config.max_seq_len :]]))[0, -1].float()
        if temperature == 0:
            choice = int(logits.argmax())
        else:
            best = logits.double().topk(min(top_k, len(logits)))  # a tiny temperature would be 0 in FP32
            shares = ((best.values - best.values[0]) / temperature).softmax(0)
            choice = int(best.indices[torch.multinomial(shares, 1, generator=generator)])
        tokens.append(choice)
        yield choice
        if choice == stop:
            return
