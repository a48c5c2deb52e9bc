"""init.from=PATH: begin with the weights of a Llama checkpoint in transformers' format, in a local folder.

Read are config.json and safetensors files, nothing that could run code. The model section must describe the very model,
so that a run's configuration says what it trains: a mistake is answered with the overrides to type. q and k rows are
reordered, since transformers' RoPE turns the halves of a head and ours neighbouring pairs.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from base.files import json_hash
from base.fingerprints import sums
from base.words import some
from data.spec import DataSpec
from models.llama import LlamaConfig, permute_from_half_split
from training.config import ModelSection, TrainConfig

# Ours -> theirs, for what is one number on both sides.
SIZES = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "hidden": "intermediate_size",
    "norm_eps": "rms_norm_eps",
}
ENDS = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
# Parts of one block: what our parameter is made of, rows one below the other.
PARTS = {
    "attn_norm": ("input_layernorm",),
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.out": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}
NO_WEIGHT = re.compile(r".*rotary_emb\.inv_freq")  # of old exports; computed here
SHOWN = 5


class Source:
    """A checkpoint folder. `config`: its config.json. ValueError, with what to do, for a folder that is none."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(
                f"init.from={path}: no such folder; it needs config.json and *.safetensors of a Llama model"
            )
        try:
            self.config: dict[str, Any] = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"init.from={path}: config.json can't be read ({error})") from None
        self.files = sorted(self.path.glob("*.safetensors"))
        if not self.files:
            raise ValueError(
                f"init.from={path}: no *.safetensors there; other formats aren't read (a pickle can run code). Convert "
                "it with transformers' save_pretrained"
            )

    def fingerprint(self, root: Path) -> str:
        """SHA-256 over the sums of the weights' files, which are remembered under `root` (base/fingerprints.py)."""
        return hashlib.sha256("".join(sums(self.files, root)).encode()).hexdigest()

    def where(self) -> dict[str, Path]:
        """{tensor: its file}."""
        found = {}
        for file in self.files:
            with safe_open(file, framework="pt") as tensors:
                found |= dict.fromkeys((n for n in tensors.keys() if not NO_WEIGHT.fullmatch(n)), file)  # noqa: SIM118
        return found


def described(source: Source) -> dict[str, Any]:
    """The model section that the checkpoint needs. ValueError for what a Llama of ours can't be."""
    theirs = source.config
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    heads = theirs.get("num_attention_heads")
    rules = {
        "model_type": (theirs.get("model_type"), ("llama",)),
        "hidden_act": (theirs.get("hidden_act", "silu"), ("silu",)),
        "attention_bias": (theirs.get("attention_bias", False), (False,)),
        "mlp_bias": (theirs.get("mlp_bias", False), (False,)),
        "rope_type": (kind, ("default", "llama3")),
        "head_dim": (theirs.get("head_dim"), (None, theirs.get("hidden_size", 0) // (heads or 1))),
    }
    for key, (value, possible) in rules.items():
        if value not in possible:
            raise ValueError(f"init.from={source.path}: {key}={value} isn't possible here; needs {possible[-1]}")
    missing = [name for name in SIZES.values() if name not in theirs and name != "num_key_value_heads"]
    if missing:
        raise ValueError(f"init.from={source.path}: config.json lacks {', '.join(missing)}")
    sizes = {ours: theirs.get(name, heads) for ours, name in SIZES.items()}
    sizes["kv_heads"] = None if sizes["kv_heads"] == heads else sizes["kv_heads"]
    numbers = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return sizes | {
        "family": "llama",
        "rope_theta": float(rope.get("rope_theta", theirs.get("rope_theta", 1e4))),
        "rope_llama3": [float(rope[name]) for name in numbers] if kind == "llama3" else [],
        "tied": bool(theirs.get("tie_word_embeddings", False)),
    }


def check_model(source: Source, section: ModelSection) -> None:
    """Raise ValueError, with the overrides to type, where the configuration describes another model."""
    needed = described(source)
    differing = {name: value for name, value in needed.items() if getattr(section, name) != value}
    if differing:
        words = " ".join(f"model.{name}={override(value)}" for name, value in differing.items())
        raise ValueError(f"init.from={source.path} is another model than model={section.name}; type {words}")


def override(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(f'{number:g}' for number in value)}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else f"{value:.17g}".rstrip()


def check_data(source: Source, data: DataSpec) -> None:
    """Raise ValueError for text that is still to be prepared, which takes hours, with a tokenizer of its own."""
    is_ready = data.path or data.mix or data.source == "tokens"
    if not is_ready and data.tokenizer is None:
        raise ValueError(f"init.from={source.path} has a tokenizer of its own; type data.tokenizer={source.path}")


def check_tokenizer(source: Source, vocab_size: int, tokenizer_hash: str | None) -> None:
    """Raise ValueError where the text's tokens are not those that the checkpoint was trained on."""
    rows, file = source.config.get("vocab_size"), source.path / "tokenizer.json"
    is_other = file.exists() and tokenizer_hash not in (None, json_hash(json.loads(file.read_text(encoding="utf-8"))))
    if rows != vocab_size or is_other:
        raise ValueError(
            f"init.from={source.path} knows {rows} tokens, and the text has {vocab_size} of another tokenizer; type "
            f"data.tokenizer={source.path}, which needs its tokenizer.json, and data.files=... in place of a data.path"
        )


def parts_of(name: str) -> list[str]:
    """The checkpoint's tensors that our parameter is made of."""
    if name in ENDS:
        return [ENDS[name]]
    _, block, part = name.removesuffix(".weight").split(".", 2)
    return [f"model.layers.{block}.{theirs}.weight" for theirs in PARTS[part]]


class Weights:
    """Our parameters out of a checkpoint of shape `config`: called with a name and a shape, as Llama.fill does.

    ValueError, naming tensor and rule, unless the checkpoint has exactly this model's tensors in its shapes.
    """

    def __init__(self, source: Source, config: LlamaConfig) -> None:
        self._source, self._config, self._where = source, config, source.where()
        names = [*ENDS, *(f"blocks.{i}.{part}.weight" for i in range(config.layers) for part in PARTS)]
        names = [name for name in names if not (config.tied and name == "lm_head.weight")]
        needed = {part for name in names for part in parts_of(name)}
        spare = {"lm_head.weight"} if config.tied else set()  # some exports write the tied weight twice
        faults = [f"{name} is missing" for name in sorted(needed - self._where.keys())]
        faults += [f"{name} has no place in a Llama" for name in sorted(self._where.keys() - needed - spare)]
        if faults:
            raise ValueError(f"init.from={source.path}: {some(faults, SHOWN, '; ')}")

    def check(self, name: str, shape: torch.Size) -> None:
        """ValueError where the parts of our parameter don't make its shape, from the files' headers alone."""
        parts = {part: self._shape(part) for part in parts_of(name)}
        if name.endswith("attn.qkv.weight"):
            needed = (self._config.width, self._config.kv_width, self._config.kv_width)
            for (part, (rows, *_)), right in zip(parts.items(), needed, strict=True):
                if rows != right:
                    raise ValueError(f"init.from={self._source.path}: {part} has {rows} rows, needed are {right}")
        rows, columns = sum(found[0] for found in parts.values()), {tuple(found[1:]) for found in parts.values()}
        if rows != shape[0] or columns != {tuple(shape[1:])}:
            found = ", ".join(f"{part} {found}" for part, found in parts.items())
            raise ValueError(f"init.from={self._source.path}: {found}; {name} is {list(shape)}")

    def __call__(self, name: str, shape: torch.Size) -> Tensor:
        self.check(name, shape)
        parts = [self._read(part) for part in parts_of(name)]
        if name.endswith("attn.qkv.weight"):
            parts[0] = permute_from_half_split(parts[0], self._config.heads)
            parts[1] = permute_from_half_split(parts[1], self._config.kv_heads or self._config.heads)
        whole = torch.cat(parts)
        if not bool(whole.isfinite().all()):
            raise ValueError(
                f"init.from={self._source.path}: {', '.join(parts_of(name))} holds values that are not finite"
            )
        return whole

    def _shape(self, name: str) -> list[int]:
        with safe_open(self._where[name], framework="pt") as file:
            return file.get_slice(name).get_shape()

    def _read(self, name: str) -> Tensor:
        with safe_open(self._where[name], framework="pt") as file:
            return file.get_tensor(name).float()


def source_of(config: TrainConfig) -> Source | None:
    return Source(config.init["from"]) if config.init.get("from") is not None else None


def identity(config: TrainConfig) -> str | None:
    """What the run's hash has of the checkpoint that it begins with; None without one."""
    source = source_of(config)
    return source and source.fingerprint(Path(config.paths.data))
