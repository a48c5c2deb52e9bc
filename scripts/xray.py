"""What quantization does to every layer's gradients at one checkpoint of a run: an X-ray, on a CPU too.

    python scripts/xray.py runs/NAME                       # the newest checkpoint
    python scripts/xray.py runs/NAME@1000                  # that of step 1000
    python scripts/xray.py runs/NAME --recipes nvidia sr   # the same tensors under other recipes, too
    python scripts/xray.py runs/NAME --lift                # what each layer costs in loss
    python scripts/xray.py runs/NAME --plan budget=5%      # which layers to lift to FP8 or BF16 for 5 % of a step

Prints a table and writes xray/<step>.json into the run folder: what the probe `xray` writes into metrics.jsonl while a
run trains. Errors are squared and relative, in 1e-3; a bias is over random bits, +- its standard error.
--lift takes each layer, and each of its operands, to BF16 while the rest stays in 4 bits, and puts it into 4 bits
alone: changes of the loss of the same weights on the same text, beside what a Taylor series says; lift/<step>.json.
--plan goes by that file, which it makes where it is missing, and by scripts/price.py's predicted times; it prints the
override to type.
"""

import argparse
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from base.commands import parser_of
from base.files import write_json
from base.runfolder import LIFTS, XRAY_PARTS, XRAY_SCOPES, XRAYS, read_json
from base.terminal import one_line_on_ctrl_c, quiet_pipes

if __name__ == "__main__":
    one_line_on_ctrl_c("xray")

from launcher.kept import Kept, kept
from quant.names import GEMMS, OPERANDS
from scripts import _plan
from training.checkpoint.state import load_model
from training.lift import FP8, LAYER, TOKENS, Change, lift, save
from training.loss import LossModel
from training.probes.xray import Xray, XrayOptions, slices
from training.ranks.distributed import setup
from training.reopen import reopen
from training.start.build import micro_batches
from training.start.failures import one_line_errors
from training.xray import View

HEADS = ("fwd", "bwd", "shrunk", "bias", "fwd", "bwd", "bias", "SNR bits", "SNR text")


def table(layers: dict[str, Any]) -> str:
    wide = max(map(len, layers)) + 7
    lines = [f"{'':{wide}} {'this layer alone':^45} {'all layers':^35}", cells(f"{'layer, GEMM':{wide}}", HEADS)]
    for name, layer in layers.items():
        lines += [cells(f"{name} {gemm:5}".ljust(wide), figures(layer, gemm)) for gemm in GEMMS]
    return "\n".join(lines)


def figures(layer: dict[str, Any], gemm: str) -> list[str]:
    """What the table shows of one GEMM, in the order of HEADS."""
    local, propagated = (layer[gemm][scope] for scope in XRAY_SCOPES)
    shrunk = local["backward" if "backward" in local else "forward"]["projection"]
    noise = layer["noise"] if gemm == "wgrad" else {}
    return [
        thousandths(local["forward"]["error"]),
        thousandths(local.get("backward", {}).get("error")),
        thousandths(None if shrunk is None else 1 - shrunk),
        biased(local.get("backward", local["forward"])),
        thousandths(propagated["forward"]["error"]),
        thousandths(propagated.get("backward", {}).get("error")),
        biased(propagated.get("backward", propagated["forward"])),
        *("" if noise.get(name) is None else f"{noise[name]:.2f}" for name in ("snr_rounding", "snr_sampling")),
    ]


def cells(label: str, texts: Iterable[str]) -> str:
    widths = (8, 8, 8, 18, 8, 8, 18, 9, 9)
    return label + " ".join(f"{text:>{width}}" for text, width in zip(texts, widths, strict=True))


def thousandths(value: float | None) -> str:
    return "" if value is None else f"{1e3 * value:.2f}"


def biased(part: dict[str, Any]) -> str:
    """ "-0.012 +- 0.020", with a star beyond three standard errors; empty where nothing is drawn."""
    bias, error = part.get("bias"), part.get("bias_se")
    if bias is None or error is None:
        return ""
    return f"{1e3 * bias:.3f} +- {1e3 * error:.3f}{'*' if bias > 3 * error else ' '}"


def compared(layers: dict[str, Any], others: dict[str, Any]) -> str:
    """Local errors of the run's recipe and of others on the same tensors, means over layers."""
    shown = [(gemm, part) for gemm in GEMMS for part in XRAY_PARTS if part in layers[next(iter(layers))][gemm]["local"]]
    own = {name: {gemm: layer[gemm]["local"] for gemm in GEMMS} for name, layer in layers.items()}
    lines = [f"{'mean error, alone':24}" + "".join(f"{gemm + ' ' + part:>16}" for gemm, part in shown)]
    for label, found in {"as trained": own, **others}.items():
        means = ([one[gemm][part]["error"] or 0.0 for one in found.values()] for gemm, part in shown)
        lines.append(f"{label:24}" + "".join(f"{thousandths(fmean(values)):>16}" for values in means))
    return "\n".join(lines)


def costs(found: dict[str, Any]) -> str:
    """The table: changes of loss in 1e-3 nats a token, layers in the order of what they cost alone."""
    heads = ("lifted", "to FP8", "its X", "its W", "alone", "1st term", "2nd term")
    wide = max(map(len, found["layers"])) + 1
    gap, error = found["gap"], found["gap_se"]
    over = f"{1e3 * gap:.3f}" + ("" if error is None else f" +- {1e3 * error:.3f}")
    lines = [f"own forward {found['own']:.5f}, BF16 {found['bf16']:.5f}, apart {over} (1e-3 nats a token)"]
    lines.append(f"{'':{wide}}" + "".join(f"{head:>18}" for head in heads))
    order = sorted(found["layers"], key=lambda name: -found["layers"][name]["alone"][LAYER]["change"])
    for name in order:
        lifted, alone = found["layers"][name]["lifted"], found["layers"][name]["alone"]
        cells = [lifted.get(what, {}) for what in (LAYER, FP8, *OPERANDS["fprop"])]
        texts = [written(cell, "change") for cell in (*cells, alone[LAYER])]
        texts += [written(alone[LAYER], term) for term in ("first", "second")]
        lines.append(f"{name:{wide}}" + "".join(f"{text:>18}" for text in texts))
    ways = (("lifted", "change"), ("alone", "change"), ("alone", "first"), ("alone", "second"))
    sums = (sum(found["layers"][name][way][LAYER][key] for name in order) for way, key in ways)
    lifted, *rest = (f"{1e3 * value:.3f}" for value in sums)
    lines.append(f"{'sum':{wide}}" + "".join(f"{text:>18}" for text in (lifted, "", "", "", *rest)))
    return "\n".join(lines)


def written(cell: Change, key: str) -> str:
    if cell.get(key) is None:
        return ""
    error = cell[f"{key}_se"]
    return f"{1e3 * cell[key]:.3f}" + ("" if error is None else f" +- {1e3 * error:.3f}")


def look(arguments: argparse.Namespace, asked: Kept) -> dict[str, Any]:
    """The row that the probe would write there."""
    options = {name: getattr(arguments, name) for name in ("tokens", "slices", "draws", "recipes")}
    config, step = asked.config, asked.step
    config.probes = {"xray": {**options, "steps": [step]}}
    ranks = setup()
    again = reopen(config, asked.run, step, ranks)
    load_model(asked.checkpoint, again.model)
    numbers, options = again.numbers, again.probes["xray"]

    def set_rng(draw: int) -> None:
        again.rng[2] = numbers.micro_batches + draw

    text = slices(lambda first: micro_batches(again.train, numbers, ranks, first), step, numbers, options)
    view = View(LossModel(again.model), numbers.tokens_per_step, set_rng, lambda last: nullcontext())
    return Xray(options).row(view, list(text), step, numbers)


def main() -> int:
    parser = parser_of(__file__, __doc__)
    parser.add_argument("run", help="run folder, or FOLDER@STEP")
    parser.add_argument("--recipes", nargs="+", default=[], metavar="NAME", help="others to measure, too")
    parser.add_argument("--lift", action="store_true", help="what each layer costs in loss, instead")
    sizes = f"of a slice (default {XrayOptions.tokens}); with --lift of validation text (default {TOKENS})"
    parser.add_argument("--tokens", type=int, help=sizes)
    for flag, meaning in (("--slices", "how many"), ("--draws", "of random bits")):
        usual = getattr(XrayOptions, flag[2:])
        parser.add_argument(flag, type=int, default=usual, help=f"{meaning} (default {usual})")
    parser.add_argument("--plan", metavar="budget=5%", help="layers to lift for that share of a step's predicted time")
    parser.add_argument("--gpu", metavar="NAME", help="whose times --plan takes (default: where the run gains most)")
    parser.add_argument("--data", type=Path, help="token folder, if it was moved")
    arguments = parser.parse_args()
    if arguments.gpu and not arguments.plan:
        parser.error("--gpu goes with --plan")
    if arguments.tokens is None:
        arguments.tokens = TOKENS if arguments.lift or arguments.plan else XrayOptions.tokens
    with one_line_errors("xray.py") as outcome:
        budget = _plan.budget_of(arguments.plan) if arguments.plan else None
        asked = kept(arguments.run, arguments.data)
        if budget:
            planned(arguments, asked, budget)
        else:
            print(lifted(arguments, asked) if arguments.lift else looked(arguments, asked), file=sys.stderr)
        outcome.code = 0
    return outcome.code


def looked(arguments: argparse.Namespace, asked: Kept) -> Path:
    found = look(arguments, asked)
    print(f"{asked.folder} at step {found['step']}: {found['slices']} slices of {found['slice_tokens']:,} tokens")
    print(table(found["layers"]))
    if "what_if" in found:
        print("\n" + compared(found["layers"], found["what_if"]))
    path = asked.folder / XRAYS / f"{found['step']}.json"
    path.parent.mkdir(exist_ok=True)
    write_json(path, found)
    return path


def lifted(arguments: argparse.Namespace, asked: Kept) -> Path:
    found = lift(asked.config, asked.run, asked.checkpoint, asked.step, arguments.tokens, setup())
    print(f"{asked.folder} at step {found['step']}: {found['targets']:,} tokens of validation text")
    print(costs(found))
    return save(asked.folder, found)


def planned(arguments: argparse.Namespace, asked: Kept, budget: float) -> None:
    path = asked.folder / LIFTS / f"{asked.step}.json"
    found = read_json(path if path.exists() else lifted(arguments, asked))
    print(_plan.shown(_plan.propose(asked.config, found, budget, arguments.gpu), found))


if __name__ == "__main__":
    quiet_pipes()
    sys.exit(main())
