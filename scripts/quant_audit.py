"""Error, alignment and bias of every quantizer of the recipes, beside published figures.

On the CPU: 140 s of one core for all recipes.

    python scripts/quant_audit.py                  # all recipes, and forms that none of them uses
    python scripts/quant_audit.py quartet2 sr --check --json audit.json
    python scripts/quant_audit.py quartet2 mxfp4 --decompose   # where each error comes from
    python scripts/quant_audit.py --captured runs/NAME/capture/3052 --recipes quartet2,nvidia

--captured judges recipes on the tensors of a run (probes.capture={} or scripts/capture.py): the errors of
operands and products by layer and by kind of layer, layers that a recipe leaves in BF16 left out of means. There
--recipes takes cells of a grid, too, whose overrides count: leaderboard/po2_x/x2.8/s0.

Without names a recipe whose file is broken is named and left out, and the exit code is 1.
--check exits with 1 if a published figure is missed by more than 1 %, a stochastic quantizer of a recipe is biased on
dense data, SR with Four-over-Six is not, or MS-EDEN's GEMM gains less than 2.4 over SR's.
"""

import argparse
import json
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from base.commands import parser_of
from base.terminal import one_line_on_ctrl_c, quiet_pipes

if __name__ == "__main__":
    one_line_on_ctrl_c("quant_audit")

from base.files import write_json
from kernels import backend
from kernels.formats.scales import PowersOfTwo
from kernels.spec import QuantSpec
from launcher.compose import compose
from quant import audit, library
from quant.audit import Curve, Quantizer
from quant.captured import PRODUCTS, entries, errors, mean, measure
from quant.decompose import NAMES, TERMS
from quant.names import SLOTS
from quant.plan import Entry, Precision
from quant.product import Product
from quant.recipe import Recipe
from training.capture import Captured, opened


def row(quantizer: Quantizer, used_by: list[str]) -> dict[str, Any]:
    """Everything measured of one quantizer, plain numbers."""
    out: dict[str, Any] = {
        "quantizer": quantizer.label,
        "used_by": used_by,
        "published_mse": audit.published(quantizer),
    }
    for name, make in audit.INPUTS.items():
        mse, alignment = audit.errors(quantizer, make(audit.SHAPE, 0))
        curve = curve_of(quantizer, make, mse)
        out[name] = {
            "mse": mse,
            "alignment": alignment,
            "curve": dict(zip(map(str, audit.DRAWS), curve.errors, strict=True)),
            "bias": curve.bias,
            "bias_se": curve.standard_error,
            "is_biased": curve.is_biased,
        }
    if out["published_mse"] is not None:
        out["agrees"] = abs(out["normal"]["mse"] * 1e3 / out["published_mse"] - 1) <= audit.TOLERANCE
    return out


def curve_of(quantizer: Quantizer, make, mse: float) -> Curve:
    """The bias curve; a deterministic quantizer's is flat and needs no draws."""
    if quantizer.rotation_dim is None and not quantizer.spec.draws_random_bits:
        return Curve((mse,) * len(audit.DRAWS), mse, 0.0)
    return audit.bias_curve(quantizer, make(audit.CURVE_SHAPE, 1))


def checks(rows: list[dict[str, Any]], ratio: float) -> dict[str, bool]:
    """What --check asks, by name."""
    out = {f"{r['quantizer']}: MSE within 1 % of {r['published_mse']}e-3": r["agrees"] for r in rows if "agrees" in r}
    for r in rows:
        if r["quantizer"] == audit.BIASED_EXAMPLE.label:
            out["SR with 4/6 is biased"] = r["normal"]["is_biased"]
        elif " sr" in r["quantizer"] or "ms_eden" in r["quantizer"]:
            out[f"{r['quantizer']}: error falls as 1/n on N(0,1)"] = not r["normal"]["is_biased"]
    out[f"GEMM: SR / MS-EDEN squared error at least {audit.GEMM_RATIO}"] = ratio >= audit.GEMM_RATIO
    return out


def table(rows: list[dict[str, Any]]) -> str:
    head = (
        f"{'quantizer':36}{'MSE':>8}{'published':>11}{'':7}{'align':>8}{'t(3)':>8}{'align':>8}{'sparse':>8}{'align':>8}"
    )
    lines = ["Relative squared error and alignment, x1e-3", head]
    for r in rows:
        shown, verdict = r["published_mse"], {True: "agrees", False: "MISSED", None: ""}[r.get("agrees")]
        cells = "".join(
            f"{r[name]['mse'] * 1e3:8.3f}{r[name]['alignment'] * 1e3:8.2f}" for name in ("student_t", "sparse")
        )
        normal = f"{r['normal']['mse'] * 1e3:8.3f}{'-' if shown is None else format(shown, 'g'):>11} {verdict:6}"
        lines.append(f"{r['quantizer']:36}{normal}{r['normal']['alignment'] * 1e3:8.2f}{cells}")
    lines += ["", "Squared error of the mean of n draws, x1e-6: falls as 1/n, or stops at the bias (+- standard error)"]
    lines.append(f"{'quantizer':36}{'input':10}" + "".join(f"{f'n={n}':>9}" for n in audit.DRAWS))
    lines += [curve_line(r, name) for r in rows for name in audit.INPUTS]
    return "\n".join(lines)


def curve_line(r: dict[str, Any], name: str) -> str:
    part = r[name]
    points = "".join(f"{value * 1e6:9.1f}" for value in part["curve"].values())
    size = f"{part['bias'] * 1e6:.1f} +- {part['bias_se'] * 1e6:.1f}"
    return f"{r['quantizer']:36}{name:10}{points}   {'stops at ' if part['is_biased'] else 'falls as 1/n; bias '}{size}"


def terms_table(rows: list[dict[str, Any]]) -> str:
    """The terms of the squared error of each quantizer (quant/decompose.py)."""
    short = {"scale_grid": "2<s,grid>", "scale_dead": "2<s,dead>", "random_cross": "2<r,err>", "underflowed": "zeroed"}
    lines = [
        "Relative squared error, x1e-3: scale + dead zone + grid + cross terms + random bits; then alignment x1e-3,",
        "cosine of scale and grid, % of elements in the dead zone, clipped, rounded to zero, mean of log2(s/s*)",
        f"{'quantizer':36}{'input':10}" + "".join(f"{short.get(name, name.split('_')[0]):>11}" for name in NAMES),
    ]
    shown = dict.fromkeys(("mse", *TERMS, "align"), 1e3) | {"cos": 1, "log2_scale": 1}
    for r in rows:
        for name in audit.INPUTS:
            cells = "".join(f"{r[name][term] * shown.get(term, 100):11.3f}" for term in NAMES)
            lines.append(f"{r['quantizer']:36}{name:10}{cells}")
    return "\n".join(lines)


def load(names: list[str]) -> tuple[list[Product], list[str]]:
    """(recipes, what is wrong with the files of others). ValueError for a broken one that was asked for by name."""
    loaded, broken = [], []
    for name in names or library.names():
        try:
            loaded.append(Precision.from_dict(library.mapping(name)).recipe)
        except (ValueError, OSError) as error:
            if names:
                raise
            broken.append(str(error))
    return loaded, broken


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__file__, __doc__)
    parser.add_argument("recipes", nargs="*", help=f"default: all ({', '.join(library.names())})")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a figure does not come out")
    parser.add_argument("--json", metavar="FILE", help="write everything as JSON ('-': standard output, no table)")
    parser.add_argument("--recipes", dest="listed", default="", metavar="A,B", help="recipes in one word")
    parser.add_argument(
        "--decompose", action="store_true", help="the terms of each error instead: scale, dead zone, grid"
    )
    parser.add_argument("--captured", type=Path, metavar="FOLDER", help="errors on tensors of a run instead")
    parser.add_argument("--layers", default="*", metavar="GLOB", help="with --captured: of these layers only")
    args = parser.parse_args(argv)
    backend.use("reference")
    try:
        names = list(dict.fromkeys([*args.recipes, *filter(None, args.listed.split(","))]))
        check_options(args, names)
        if args.json not in (None, "-"):
            Path(args.json).touch()  # what can't be written is found before a minute's work
        if args.captured:
            return on_captured(args.captured, names, args.layers, args.json)
        loaded, broken = load(names)
    except (ValueError, OSError, RuntimeError) as error:  # the last: what this machine can't run
        parser.error(str(error))
    used = audit.quantizers([slots for recipe in loaded if (slots := recipe.audited())])  # others' are not ours
    if not names:
        used = {quantizer: ["no recipe"] for quantizer in audit.WITHOUT_RECIPE} | used
    passed = decomposed(used, args.json) if args.decompose else audited(used, args.json)
    for error in broken:
        print(f"quant_audit: left out: {error}", file=sys.stderr)
    return 1 if broken or (args.check and not passed) else 0


def check_options(args: argparse.Namespace, names: list[str]) -> None:
    """ValueError, with what to type, for options that don't go together."""
    modes = [f"--{name}" for name in ("check", "decompose", "captured") if getattr(args, name)]
    if len(modes) > 1:
        raise ValueError(f"{' and '.join(modes)}: give one of them; leave the others out")
    if args.captured and not names:
        raise ValueError("--captured needs recipes: --recipes quartet2,nvidia")
    if args.layers != "*" and not args.captured:
        raise ValueError(f"--layers {args.layers} is of --captured FOLDER")


def decomposed(used: dict[Quantizer, list[str]], out: str | None) -> bool:
    """Print, or write, where errors come from."""
    rows = [
        {"quantizer": quantizer.label, "used_by": where}
        | {name: audit.terms(quantizer, make(audit.SHAPE, 0)) for name, make in audit.INPUTS.items()}
        for quantizer, where in used.items()
    ]
    show({"rows": rows}, out, lambda: [terms_table(rows), users(rows)])
    return True


def audited(used: dict[Quantizer, list[str]], out: str | None) -> bool:
    """Print, or write, errors, alignments and biases; whether every figure comes out."""
    used = used | {audit.BIASED_EXAMPLE: ["example of a bias, no recipe"]}
    used |= {} if audit.MS_EDEN_128 in used else {audit.MS_EDEN_128: ["override eden_block=rotation"]}
    rows = [row(quantizer, where) for quantizer, where in used.items()]
    ratio = audit.gemm_error(audit.SR) / audit.gemm_error(audit.MS_EDEN)
    verdicts = checks(rows, ratio)
    report = {"rows": rows, "gemm_sr_over_ms_eden": ratio, "checks": verdicts}
    gemm = f"\nGEMM with both operands quantized: SR's squared error is {ratio:.3f} times MS-EDEN's\n"
    passed = [f"{'ok    ' if ok else 'FAILED'} {name}" for name, ok in verdicts.items()]
    show(report, out, lambda: [table(rows), users(rows), gemm, *passed])
    return all(verdicts.values())


def on_captured(folder: Path, names: list[str], glob: str, out: str | None) -> int:
    """Print, or write, the errors of recipes on captured tensors. Everything that can be wrong is looked at first."""
    found = opened(folder)
    layers = [name for name in found.index["layers"] if fnmatchcase(name, glob)]
    if not layers:
        raise ValueError(f"--layers {glob} matches none that was captured: {', '.join(found.index['layers'])}")
    wanted = dict(map(mapping_of, names))
    planned = {name: entries(Precision.from_dict(values), found.index["linears"]) for name, values in wanted.items()}
    for name, plan in planned.items():
        if not any(plan[layer].recipe.is_quantized for layer in layers):
            raise ValueError(
                f"{name} leaves {', '.join(layers)} in BF16 ({plan[layers[0]].reason}): there is nothing to measure; "
                "choose other --layers, or leave it out"
            )
        for layer in layers:
            plan[layer].recipe.require()
    for layer in layers:
        found.tensors(layer)
    recipes = {name: of_recipe(found, plan, layers) for name, plan in planned.items()}
    about = {key: value for key, value in found.index.items() if key not in ("layers", "linears")}
    texts = [f"{about['name']} at step {about['step']}, {about['tokens']['kept']} tokens of {about['text']} text"]
    show({"captured": about, "recipes": recipes}, out, lambda: [*texts, captured_table(recipes)])
    return 0


def mapping_of(word: str) -> tuple[str, dict[str, Any]]:
    """(name, values as in a recipe file) of a recipe, or of a grid's cell: EXPERIMENT/CELL. ValueError for neither."""
    experiment, _, cell = word.partition("/")
    if not cell:
        return word, library.mapping(word)
    values = compose([f"experiment={experiment}", f"cell={cell}"]).config.quant
    return values["name"], values


def of_recipe(found: Captured, plan: dict[str, Entry], layers: list[str]) -> dict[str, Any]:
    """{"layers", "kinds", "mean", "fprop", "native"}; of a layer in BF16 only why it is. fprop: of each of its operands
    the bits a value, alignment and clipped share, means over layers."""
    measured: dict[str, Any] = {}
    kinds: dict[str, list[dict[str, float]]] = {}
    fprop: dict[str, list[dict[str, float]]] = {}
    for layer in layers:
        about, entry = found.index["layers"][layer], plan[layer]
        if not entry.recipe.is_quantized:
            measured[layer] = {"kind": about["kind"], "bf16": entry.reason}
            continue
        got = measure(entry.recipe, about["index"], found.index["step"], *found.tensors(layer))
        measured[layer] = {"kind": about["kind"], **got}
        kinds.setdefault(about["kind"], []).append(errors(got))
        for name in {"fprop.x", "fprop.w"} & got["slots"].keys():
            bits = entry.recipe.audited().operand(name).spec.bits
            shown = {"bits": bits, **{key: got["slots"][name][key] for key in ("align", "clipped")}}
            fprop.setdefault(name, []).append(shown)
    every = [row for rows in kinds.values() for row in rows]
    return {
        "layers": measured,
        "kinds": {kind: mean(rows) for kind, rows in kinds.items()},
        "mean": mean(every),
        "fprop": {name: mean(rows) for name, rows in sorted(fprop.items())},
        "native": native([slots for layer in layers if (slots := plan[layer].recipe.audited())]),
    }


# Which tensor cores multiply the codes of each kind of operand; other formats' only in BF16, that is emulated.
CORES = {"NVFP4": "Blackwell", "MXFP4": "Blackwell", "FP8": "Hopper"}


def native(recipes: list[Recipe]) -> str:
    """The hardware whose tensor cores multiply all operands of these recipes: "Blackwell (NVFP4)"; or "none"."""
    specs = {recipe.operand(slot).spec for recipe in recipes for slot in SLOTS if recipe.operand(slot).is_quantized}
    kinds = {operand_kind(spec) for spec in specs}
    if not kinds or not kinds <= CORES.keys():
        return "none"
    return f"{min(CORES[kind] for kind in kinds)} ({', '.join(sorted(kinds))})"


def operand_kind(spec: QuantSpec) -> str:
    if not spec.is_blocked:
        return "FP8"
    is_plain = spec.grid == "e2m1" and isinstance(spec.scaling, PowersOfTwo) and spec.macro_bits is None
    return "NVFP4" if spec.tensor_core else "MXFP4" if is_plain else spec.label


def captured_table(recipes: dict[str, Any]) -> str:
    """A block for each recipe: its layers, then means over them."""
    columns = (*SLOTS, *PRODUCTS)
    lines = [
        "Relative squared error after the best gain, x1e-3; a slot that reuses fprop's codes has none of its own, one",
        "that starts from them its own on top. g: (gain - 1) of the product, x1e-3",
        "",
        f"{'recipe':24}{'layer':24}"
        + "".join(f"{name:>10}" for name in columns)
        + "".join(f"{f'g {p}':>8}" for p in PRODUCTS),
    ]
    for name, found in recipes.items():
        for layer, row in found["layers"].items():
            if "bf16" in row:
                lines.append(f"{name:24}{layer:24}  in BF16 ({row['bf16']}), in no mean")
                continue
            gains = "".join(f"{(row['products'][p]['gain'] - 1) * 1e3:8.2f}" for p in PRODUCTS)
            lines.append(f"{name:24}{layer:24}{cells(errors(row), columns)}{gains}")
        means = {f"all {kind}": row for kind, row in found["kinds"].items()} | {"all": found["mean"]}
        lines += [f"{name:24}{label:24}{cells(row, columns)}" for label, row in means.items()]
    return "\n".join(lines)


def cells(row: dict[str, float], columns: tuple[str, ...]) -> str:
    return "".join(f"{row[name] * 1e3:10.3f}" if name in row else f"{'-':>10}" for name in columns)


def users(rows: list[dict[str, Any]]) -> str:
    return "\nUsed by\n" + "\n".join(f"  {r['quantizer']:36}{', '.join(r['used_by'])}" for r in rows)


def show(report: dict[str, Any], out: str | None, texts: Callable[[], list[str]]) -> None:
    """The texts, and the report into a file; or the report alone on standard output ("-")."""
    if out == "-":
        print(json.dumps(report, indent=1))
        return
    if out:
        write_json(Path(out), report)
    print("\n".join(texts()))


if __name__ == "__main__":
    quiet_pipes()
    sys.exit(main())
