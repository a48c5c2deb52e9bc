"""Captured tensors: what the linear layers of one step multiply, in files that any recipe can be judged on
(scripts/quant_audit.py --captured).

Of each captured layer its weight (rounded to BF16, as quantizers read it), its input X and the gradient dY of its
output, of summed nats, in BF16. They come from one forward and backward over TOKENS tokens of the validation text,
whole sequences spread evenly over it. What fits into BYTES is kept, by this rule:

- as many blocks as leave room for at least LEAST tokens, spread evenly with the first and the last among them (one:
  the middle one), all linear layers of each; if not even one fits, one block with LEAST tokens all the same;
- as many tokens as fit, TOKENS at most, in runs of RUN neighbours (as many as the longest rotation takes), spread over
  sequences and over the places within them; the same tokens in every layer.

    index.json         run, step, recipe, which tokens, every linear layer of the model, the files of captured ones
    0.safetensors ...  <layer>.w [N, K], <layer>.x [tokens, K], <layer>.dy [tokens, N]; at most FILE_BYTES each, unless
                       one tensor has more
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as as_bytes
from torch import Tensor, nn

from base.commands import spelled
from base.files import atomic_write, write_json
from base.runfolder import read_json
from data.evalset import EvalSet
from quant.linear import QuantLinear
from quant.plan import BLOCK, quant_linears

INDEX = "index.json"
TENSORS = ("w", "x", "dy")
TOKENS, LEAST, RUN = 4096, 512, 128
BYTES, FILE_BYTES = 64 * 2**20, 16 * 2**20
HEADER = 16 * 2**10  # room for the names and places of a file's tensors
BYTES_BF16 = 2
OF_RUN = ("name", "hash", "model", "recipe_label", "seed", "data_fingerprint", "tokenizer_hash")


class CaptureError(ValueError):
    """A folder of captured tensors that can't be used; the message says what to do."""


@dataclass(frozen=True)
class Chosen:
    """The layers that are captured, and which of the forward's tokens."""

    layers: dict[str, QuantLinear]
    runs: tuple[int, ...]  # numbers of runs of RUN tokens

    @property
    def tokens(self) -> int:
        return RUN * len(self.runs)

    def rows(self, x: Tensor) -> Tensor:
        """The chosen tokens of [..., C], on the CPU."""
        flat = x.detach().flatten(0, -2)
        return torch.cat([flat[i * RUN : (i + 1) * RUN] for i in self.runs]).to("cpu", torch.bfloat16)


def choose(model: nn.Module, tokens: int) -> Chosen:
    """What is kept of a forward over so many `tokens`, a multiple of RUN; see above."""
    blocks: dict[int, dict[str, QuantLinear]] = {}
    for name, layer in quant_linears(model).items():
        if found := BLOCK.search(name):
            blocks.setdefault(int(found[1]), {})[name] = layer
    for count in range(len(blocks), 0, -1):
        layers = {name: layer for number in spread(sorted(blocks), count) for name, layer in blocks[number].items()}
        shapes = [(layer.in_features, layer.out_features) for layer in layers.values()]
        weights, token = (BYTES_BF16 * sum(map(of, shapes)) for of in (math.prod, sum))
        room = (BYTES - weights - HEADER * len(layers)) // token
        if room >= LEAST:
            break
    kept = min(tokens, max(room, LEAST)) // RUN
    step = tokens // RUN // kept
    return Chosen(layers, tuple(i * step + i % step for i in range(kept)))


def spread(numbers: list[int], count: int) -> list[int]:
    """`count` of them, evenly, both ends among them; the middle one where it is one."""
    if count == 1:
        return [numbers[len(numbers) // 2]]
    return [numbers[i * (len(numbers) - 1) // (count - 1)] for i in range(count)]


def text_of(evalset: EvalSet, micro: int) -> Tensor:
    """int64 [sequences, T + 1]: TOKENS tokens, spread over the list; where sequences don't fit into that number, micro-
    batches (`micro` sequences, which the recipe can take) of LEAST tokens or more. Sequences repeat where there are too
    few."""
    count, length = max(1, TOKENS // evalset.seq_len), evalset.seq_len
    if count * length % RUN:
        count = micro * -(-LEAST // (micro * length))
    return torch.cat([evalset.samples(i * evalset.sequences // count, 1) for i in range(count)])


def capture(
    model: nn.Module, evalset: EvalSet, micro: int, step_fn: Callable[[Tensor], Any]
) -> tuple[Chosen, dict[str, Tensor]]:
    """What was chosen, and {"<layer>.w", ".x", ".dy": BF16 on the CPU} of step_fn(tokens), a forward and its backward,
    run eagerly.

    The caller sets the random state and drops the gradients. On every rank alike: sharded weights are gathered.
    """
    tokens = text_of(evalset, micro)
    found: dict[str, Tensor] = {}
    chosen = choose(model, tokens.shape[0] * evalset.seq_len)
    hooks = [layer.register_forward_hook(keep(found, name, chosen)) for name, layer in chosen.layers.items()]
    try:
        with torch.compiler.set_stance("force_eager"):
            step_fn(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    for name, layer in chosen.layers.items():
        weight = layer.weight.detach()
        whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        found[f"{name}.w"] = whole.to("cpu", torch.bfloat16)
    return chosen, found


def keep(found: dict[str, Tensor], name: str, chosen: Chosen) -> Callable:
    """A hook of one layer. With recompute=true a block's forward runs twice, and gradients belong to the second."""

    def see(layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        found[f"{name}.x"] = chosen.rows(inputs[0])
        if y.requires_grad:
            y.register_hook(lambda dy: found.update({f"{name}.dy": chosen.rows(dy)}))

    return see


def save(
    folder: Path, run: Mapping[str, Any], step: int, model: nn.Module, chosen: Chosen, tensors: dict[str, Tensor]
) -> Path:
    """Write the files and, last, the index; returns the folder. `run`: its run.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in (folder / INDEX, *folder.glob("*.safetensors")):
        old.unlink(missing_ok=True)
    layers: dict[str, dict[str, Any]] = {
        name: {"kind": BLOCK.sub("", name), "index": int(layer.layer), "files": {}}
        for name, layer in chosen.layers.items()
    }
    for number, keys in enumerate(in_files({key: tensors[key] for name in layers for key in keys_of(name)})):
        file = f"{number}.safetensors"
        with atomic_write(folder / file) as handle:
            handle.write(as_bytes({key: tensors[key].contiguous() for key in keys}))
        for layer, _, part in (key.rpartition(".") for key in keys):
            layers[layer]["files"][part] = file
    index = {key: run[key] for key in OF_RUN} | {
        "step": step,
        "text": "validation",
        "tokens": {"kept": chosen.tokens, "in_runs_of": RUN, "runs": chosen.runs},
        "linears": {name: [layer.out_features, layer.in_features] for name, layer in quant_linears(model).items()},
        "layers": layers,
    }
    write_json(folder / INDEX, index)
    return folder


def keys_of(layer: str) -> list[str]:
    return [f"{layer}.{name}" for name in TENSORS]


def in_files(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Names of tensors in their order, as many to a file as FILE_BYTES hold."""
    files: list[list[str]] = []
    room = 0
    for name, tensor in tensors.items():
        if not files or tensor.nbytes > room:
            files.append([])
            room = FILE_BYTES - HEADER
        files[-1].append(name)
        room -= tensor.nbytes
    return files


@dataclass(frozen=True)
class Captured:
    """A folder that `save` wrote; `index` is its index.json."""

    folder: Path
    index: dict[str, Any]

    def tensors(self, layer: str) -> tuple[Tensor, Tensor, Tensor]:
        """W [N, K], X [tokens, K] and dY [tokens, N] of a captured layer, BF16. CaptureError where they aren't there,
        or don't fit each other."""
        known = self.index["layers"]
        if layer not in known:
            raise CaptureError(f"{self.folder}: {layer} wasn't captured; captured: {', '.join(known)}")
        w, x, dy = (self._tensor(layer, part) for part in TENSORS)
        rows, columns = self.index["linears"][layer]
        kept = self.index["tokens"]["kept"]
        shapes = tuple(map(tuple, (w.shape, x.shape, dy.shape)))
        if shapes != ((rows, columns), (kept, columns), (kept, rows)):
            raise CaptureError(
                f"{self.folder}: {layer} has shapes {shapes}, not those of the index; capture the run again"
            )
        return w, x, dy

    def _tensor(self, layer: str, part: str) -> Tensor:
        path = self.folder / str(self.index["layers"][layer]["files"].get(part))
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(f"{layer}.{part}")
        except (OSError, SafetensorError) as error:
            raise CaptureError(
                f"{path}: lacks {layer}.{part} or can't be read ({error}); capture the run again"
            ) from None


def opened(folder: Path) -> Captured:
    """CaptureError where there is no index, or one of something else."""
    if not (folder / INDEX).is_file():
        raise CaptureError(
            f"{folder}: no {INDEX} there; a run captures with probes.capture={{}}, a checkpoint by: "
            + spelled("python scripts/capture.py runs/NAME")
        )
    index = read_json(folder / INDEX)
    if not isinstance(index, dict) or not {"linears", "layers", "tokens", "step"} <= index.keys():
        raise CaptureError(f"{folder / INDEX}: not the index of captured tensors; capture the run again")
    return Captured(folder, index)
