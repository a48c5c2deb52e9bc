"""Train twice from the same start, emulated and through the packed path of 4-bit tensor cores, and compare every bit.

    python scripts/check/check_packed.py --model llama_30m --recipe quartet2 --steps 10   (a GPU; a CPU with llama_tiny)

The packed path is what a Blackwell GPU runs: codes and scales quantized, stored and handed to the GEMM as such; only
the product itself is replaced by dequantize + BF16 matmul (back end gemm=packed_emulated). Exit code 1 if a
loss, a gradient norm or a final weight differs.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this repository first, whatever is installed

from base.terminal import one_line_on_ctrl_c, positive

if __name__ == "__main__":
    one_line_on_ctrl_c("check_packed")

import torch
import yaml

from kernels import backend
from models.llama import Llama, LlamaConfig
from quant import library
from quant.plan import Precision, convert, resolve
from training.loss import LossModel

MODELS = Path(__file__).resolve().parents[2] / "configs" / "model"
VOCABULARY = 4096
SHAPE_KEYS = ("layers", "width", "heads", "hidden")


def train(preset: str, quant: Precision, steps: int, tokens: int, compiled: bool, device: str) -> list[torch.Tensor]:
    """Losses, gradient norms and final weights of `steps` AdamW steps on random tokens."""
    sizes = yaml.safe_load((MODELS / f"{preset}.yaml").read_text())
    seq_len = min(512, tokens)
    shape = LlamaConfig(**{key: sizes[key] for key in SHAPE_KEYS}, vocab_size=VOCABULARY, max_seq_len=seq_len)
    rng = torch.tensor([1, 0, 0], device=device)
    with torch.device(device):
        model = Llama(shape)
    model.init_weights(1)
    convert(model, resolve(model, quant), rng)
    loss = LossModel(model)
    if compiled:
        loss.compile(fullgraph=True, dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(7)
    out = []
    for step in range(steps):
        rng.copy_(torch.tensor([1, step, 0]))
        batch = torch.randint(0, VOCABULARY, (tokens // seq_len, seq_len + 1), generator=generator).to(device)
        value = loss(batch) / tokens
        optimizer.zero_grad()
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        out += [value.detach(), norm.detach()]
    return out + [parameter.detach() for parameter in model.parameters()]


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    presets = sorted(path.stem for path in MODELS.glob("llama_*.yaml"))
    parser.add_argument("--model", default="llama_30m", choices=presets)
    parser.add_argument("--recipe", default="quartet2,nvidia,tetrajet2", help="comma-separated (default: %(default)s)")
    parser.add_argument("--steps", type=positive, default=10)
    parser.add_argument("--tokens", type=positive, default=16384, help="of a step (default: %(default)s)")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    try:
        return compare(options)
    except ValueError as error:  # a recipe or a number of tokens that its blocks don't divide
        parser.error(str(error))


def compare(options: argparse.Namespace) -> int:
    """Train both ways under every recipe; the exit status. ValueError for an unknown recipe, before any training."""
    recipes = {name: Precision(library.load(name)) for name in options.recipe.split(",")}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain = {"gemm": "cublaslt"} if device == "cuda" else {}
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it with deterministic algorithms
    torch.use_deterministic_algorithms(True)
    failed = False
    for name, precision in recipes.items():
        results = []
        for path, gemm in (("emulated", plain), ("packed", {"gemm": "packed_emulated"})):
            print(f"{name} {path}: {backend.use(gemm, device)}", flush=True)
            results.append(train(options.model, precision, options.steps, options.tokens, options.compile, device))
        differ = sum(int((a != b).sum()) for a, b in zip(*results, strict=True))
        failed |= differ > 0
        last = float(results[0][2 * options.steps - 2])
        print(f"{name}: {differ} numbers differ over {options.steps} steps; last loss {last:.6f}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
