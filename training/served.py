"""Served loss: the loss of one checkpoint's weights under other forwards than the one that trained them.

It tells apart what quantizing costs the moment it happens (own forward minus BF16 forward, same weights) and what it
did to the weights (BF16 forward minus a BF16 run). Every forward is scored on the list of the run's final evaluation in
the same batches, so that losses differ by the forward alone and their differences pair document by document.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
from torch import nn

from base.files import atomic_write, write_json
from base.runfolder import RESULT, SCORE, read_json
from data.evalset import EvalSet
from quant import library
from quant.plan import HEAD, quant_linears
from quant.recipe import GEMMS, OPERANDS, Recipe

_NONE, _FP8 = {"grid": "none"}, {"grid": "e4m3"}
_NVFP4, _NVFP4_46 = {"grid": "e2m1"}, {"grid": "e2m1", "select": "four_over_six"}
# Operands x and w of each forward (base/runfolder.py says what they are).
FORWARDS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "bf16": (_NONE, _NONE),
    "nvfp4": (_NVFP4_46, _NVFP4_46),
    "nvfp4_x": (_NVFP4_46, _NONE),
    "nvfp4_w": (_NONE, _NVFP4_46),
    "nvfp4_absmax": (_NVFP4, _NVFP4),
    "fp8": (_FP8, _FP8),
}
OWN = "own"


@dataclass(frozen=True)
class Scored:
    """One checkpoint under several forwards. `nats`: {forward: FP64, one number a segment of `evalset`}. gram_tokens:
    training tokens by which training/shaped_weights.py fitted; None where it didn't."""

    step: int
    evalset: EvalSet
    nats: dict[str, np.ndarray]
    gram_tokens: int | None = None

    def table(self) -> dict[str, dict[str, float | None]]:
        """{forward: loss, bpb, se, and the loss over BF16's with its standard error over documents}, in nats."""
        out = {}
        for name, nats in self.nats.items():
            over, se = self.evalset.difference(nats, self.nats["bf16"])
            out[name] = self.evalset.summary(nats) | {"over_bf16": over, "over_bf16_se": se}
        return out

    def save(self, run_dir: Path) -> Path:
        """Write score/<step>.json and .npz (the segments once, nats.<forward> for each), and into the result.json of a
        run that ended there; an older score is replaced."""
        folder, part = run_dir / SCORE, self.evalset.segments
        folder.mkdir(exist_ok=True)
        ids = {key: getattr(part, key) for key in ("sequence", "document", "tokens", "bytes")}
        with atomic_write(folder / f"{self.step}.npz") as file:
            np.savez(file, **ids, **{f"nats.{name}": nats for name, nats in self.nats.items()})
        path = folder / f"{self.step}.json"
        table = self.table()
        fitted = {} if self.gram_tokens is None else {"gram_tokens": self.gram_tokens}
        write_json(path, {"step": self.step, "targets": self.evalset.targets, **fitted, "forwards": table})
        result = read_json(run_dir / RESULT) if (run_dir / RESULT).exists() else {}
        if result.get("step") == self.step:
            write_json(run_dir / RESULT, result | {"served": {name: table[name]["loss"] for name in FORWARDS}})
        return path


def all_forwards(model: nn.Module, globs: Iterable[str]) -> dict[str, dict[str, Recipe]]:
    """{forward: {layer: its recipe}}: FORWARDS in all layers, then nvfp4@<glob> in some."""
    layers = [name for name in quant_linears(model) if name != HEAD]
    bf16, nvfp4 = forward_recipe("bf16"), forward_recipe("nvfp4")
    out = {name: dict.fromkeys(layers, forward_recipe(name)) for name in FORWARDS}
    for glob in globs:
        matched = [name for name in layers if fnmatchcase(name, glob)]
        if not matched:
            raise ValueError(f"{glob!r} matches no quantized layer; layers: {', '.join(layers[:6])} ...")
        out[f"nvfp4@{glob}"] = dict.fromkeys(layers, bf16) | dict.fromkeys(matched, nvfp4)
    return out


def forward_recipe(name: str) -> Recipe:
    """The recipe whose fprop is forward `name`; its backward, which scoring doesn't run, is BF16."""
    slots = {gemm: dict.fromkeys(OPERANDS[gemm], _NONE) for gemm in GEMMS}
    slots["fprop"] = dict(zip(OPERANDS["fprop"], FORWARDS[name], strict=True))
    return library.build({"name": f"forward_{name}", **slots})
