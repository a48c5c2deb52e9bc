"""Write a checkpoint as a transformers model: config.json, safetensors weights, tokenizer.

    python scripts/export_hf.py runs/NAME exported/             # newest checkpoint, FP32 master weights
    python scripts/export_hf.py runs/NAME exported/ --step 1000 --dtype bfloat16

Load with transformers.AutoModelForCausalLM.from_pretrained("exported/").
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
from base.terminal import one_line_on_ctrl_c

if __name__ == "__main__":
    one_line_on_ctrl_c("export_hf")

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from data.tokenizer import TextTokenizer
from training.checkpoint.storage import CheckpointError
from training.inference import check_exportable, load_trained, run_tokenizer, transformers_config, transformers_weights

PADDING = ("<pad>", "<|pad|>", "[PAD]")  # what tokenizers call a token for it


def export(run_dir: Path, out: Path, step: int | None, dtype: torch.dtype) -> str:
    """Returns what was written, for a person. Raises FileExistsError rather than mix two models in one folder."""
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; give another folder")
    model, run, at = load_trained(run_dir, step)
    check_exportable(model)
    tokenizer = run_tokenizer(run)
    weights = {name: tensor.to(dtype) for name, tensor in transformers_weights(model).items()}
    config = transformers_config(model.config, tokenizer and tokenizer.bos_id)
    config |= {"dtype": str(dtype).removeprefix("torch.")}
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        whole = Path(temporary) / "whole"  # moved only when everything is in it
        whole.mkdir()
        save_file(weights, whole / "model.safetensors", metadata={"format": "pt"})
        write_json(whole / "config.json", config)
        shutil.copymode(whole / "config.json", whole / "model.safetensors")  # written for its owner alone
        if tokenizer:
            export_tokenizer(tokenizer, whole, model.config.max_seq_len)
        whole.replace(out)
    lost = "" if tokenizer else f" without a tokenizer ({run.get('data_path')} is gone)"
    return f"{out}: {run['name']} at step {at}, {sum(w.numel() for w in weights.values()):,} parameters{lost}"


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
