"""Write a checkpoint as a transformers model: config.json, safetensors weights, tokenizer.

    python scripts/export_hf.py runs/NAME exported/             # newest checkpoint, FP32 master weights
    python scripts/export_hf.py runs/NAME exported/ --step 1000 --dtype bfloat16

Load with transformers.AutoModelForCausalLM.from_pretrained("exported/").
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from training.inference import load_trained, transformers_config, transformers_weights
from training.storage import CheckpointError

TOKENIZER = "tokenizer.json"


def export(run_dir: Path, out: Path, step: int | None, dtype: torch.dtype) -> str:
    """Returns what was written, for a person. Raises FileExistsError rather than mix two models in one folder."""
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; give another folder")
    model, run, at = load_trained(run_dir, step)
    tokens = Path(run["data_path"]) if run.get("data_path") else None
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.to(dtype) for name, tensor in transformers_weights(model).items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    has_tokens = tokens is not None and (tokens / "manifest.json").exists()
    tokenizer = json.loads((tokens / "manifest.json").read_text())["tokenizer"] if has_tokens else {}
    config = transformers_config(model.config, tokenizer.get("bos_id")) | {"dtype": str(dtype).removeprefix("torch.")}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if has_tokens:
        export_tokenizer(tokens / TOKENIZER, out, tokenizer, model.config.max_seq_len)
    lost = "" if has_tokens else f" without a tokenizer ({tokens} is gone)"
    return f"{out}: {run['name']} at step {at}, {sum(w.numel() for w in weights.values()):,} parameters{lost}"


def export_tokenizer(source: Path, out: Path, manifest: dict, max_length: int) -> None:
    """The run's tokenizer, made to put BOS before every text, as each document of the training data had it."""
    tokenizer = Tokenizer.from_file(str(source))
    name = manifest["bos"]
    tokenizer.post_processor = TemplateProcessing(
        single=f"{name} $A", pair=f"{name} $A {name} $B", special_tokens=[(name, manifest["bos_id"])]
    )
    tokenizer.save(str(out / TOKENIZER))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length, "bos_token": name}
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--step", type=int)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    try:
        print(export(arguments.run, arguments.out, arguments.step, getattr(torch, arguments.dtype)))
    except (CheckpointError, OSError, ValueError) as error:
        print(f"export_hf.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
