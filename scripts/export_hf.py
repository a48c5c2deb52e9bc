"""Write a checkpoint as a transformers model: config.json, safetensors weights, tokenizer.

    python scripts/export_hf.py runs/NAME exported/             # newest checkpoint, FP32 master weights
    python scripts/export_hf.py runs/NAME exported/ --step 1000 --dtype bfloat16
    python scripts/export_hf.py runs/NAME exported/ --dtype nvfp4

Load with transformers.AutoModelForCausalLM.from_pretrained("exported/"); nvfp4 (weights as the run's forward multiplies
them, packed) with the compressed-tensors package beside it, or by vLLM. Weights above --shard-gb are several files.
"""

import json
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from base.commands import parser_of
from base.files import write_json
from base.runfolder import CONFIG
from base.terminal import one_line_on_ctrl_c

if __name__ == "__main__":
    one_line_on_ctrl_c("export_hf")

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from data.tokenizer import TextTokenizer
from kernels import backend
from launcher.compose import stored
from quant.phases import phases_of, scored
from quant.plan import Plan, plan_of
from training.checkpoint.storage import CheckpointError
from training.export import (
    check_exportable,
    linear_weights,
    nvfp4_weights,
    plain_weights,
    quantization_config,
    transformers_config,
)
from training.inference import load_trained, run_tokenizer

PADDING = ("<pad>", "<|pad|>", "[PAD]")  # what tokenizers call a token for it


def export(run_dir: Path, out: Path, step: int | None, dtype: str, shard_gb: float) -> str:
    """Returns what was written, for a person. Raises FileExistsError rather than mix two models in one folder."""
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; give another folder")
    model, run, at = load_trained(run_dir, step)
    check_exportable(model)
    tokenizer = run_tokenizer(run)
    config = transformers_config(model.config, tokenizer and tokenizer.bos_id)
    config |= {"dtype": "float32" if dtype == "float32" else "bfloat16"}
    packed = {}
    if dtype == "nvfp4":
        packed = nvfp4_weights(model, plan_at(run_dir, run, model, at))
        config |= {"quantization_config": quantization_config(model, packed)}
    weights = plain_weights(model) | linear_weights(model, packed)
    plain = getattr(torch, config["dtype"])  # of what isn't packed
    weights = {name: w.to(plain) if name.endswith(".weight") else w for name, w in weights.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        whole = Path(temporary) / "whole"  # moved only when everything is in it
        whole.mkdir()
        write_json(whole / "config.json", config)
        save_shards(weights, whole, int(shard_gb * 1e9))
        if tokenizer:
            export_tokenizer(tokenizer, whole, model.config.max_seq_len)
        whole.replace(out)
    lost = "" if tokenizer else f" without a tokenizer ({run.get('data_path')} is gone)"
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{out}: {run['name']} at step {at}, {count:,} parameters{lost}"


def plan_at(run_dir: Path, run: dict[str, Any], model: nn.Module, step: int) -> Plan:
    """The precision plan that the run's evaluation after `step` steps goes by."""
    quant = stored(run_dir / CONFIG).quant
    plan = plan_of(model, quant)
    phases = phases_of(model, quant, plan, run["steps"])
    backend.use("reference", "cpu")
    return [plan, *(phase.plan for phase in phases)][scored(phases, step)]


def save_shards(weights: dict[str, Tensor], folder: Path, limit: int) -> None:
    """model.safetensors or, above `limit` bytes, numbered files of at most that (or of one tensor) and their index."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in weights.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > limit:
            shards.append({})
        shards[-1][name] = tensor
    count = len(shards)
    numbered = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    files = numbered if count > 1 else ["model.safetensors"]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / file)  # written for its owner alone
    if count > 1:
        where = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        size = sum(tensor.nbytes for tensor in weights.values())
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where})


def export_tokenizer(tokenizer: TextTokenizer, out: Path, max_length: int) -> None:
    """Made to put BOS before every text, as each document of the training data had it; BOS ends a text, too. Texts are
    padded on the left, as generation needs it, with the tokenizer's own padding token or with BOS."""
    name, exported = tokenizer.bos, json.loads(Tokenizer.from_file(str(tokenizer.path)).to_str())
    exported["post_processor"] = bos_first(name, tokenizer.bos_id)
    text = Tokenizer.from_str(json.dumps(exported)).to_str(pretty=True)
    (out / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    pad = next((word for word in PADDING if word in tokenizer.vocab), name)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length, "padding_side": "left"}
    write_json(out / "tokenizer_config.json", config | {"bos_token": name, "eos_token": name, "pad_token": pad})
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.vocab[pad]}
    write_json(out / "generation_config.json", ids)


def bos_first(name: str, number: int) -> dict[str, Any]:
    """The template "BOS, text" and "BOS, text, BOS, second text". As JSON: the library's own notation, a string, takes
    spaces and colons of the name for its own."""
    bos = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": part, "type_id": 0}} for part in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, bos, second],
        "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]}},
    }


def main() -> int:
    parser = parser_of(__file__, __doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--step", type=int)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "nvfp4"], default="float32")
    parser.add_argument("--shard-gb", type=float, default=5.0, help="largest file of weights, 1e9 bytes; default 5")
    arguments = parser.parse_args()
    if not arguments.shard_gb > 0:
        parser.error("--shard-gb needs a number above 0")
    try:
        print(export(arguments.run, arguments.out, arguments.step, arguments.dtype, arguments.shard_gb))
    except (CheckpointError, OSError, ValueError) as error:
        print(f"export_hf.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
