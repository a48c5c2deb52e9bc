"""The forward's gap against the errors of X and of W: the law of errors, on the published runs.

    python scripts/fit_error_law.py --out results/error_law
    python scripts/fit_error_law.py --captured runs/NAME/capture/3052   # errors on a run's tensors, too

Nine forward quantizers have published gaps at 15 to 22 cells (N, D). Their errors are measured on normal and on
heavy-tailed X; analysis/error_law.py has the model. Writes error_law.json and error_law.png. CPU, half a minute.
The figure has our own arms, too: the screen's, and of the leaderboard those that share quartet2's backward. The last
table has the backward's parts, product by product (analysis/backward_parts.py).
"""

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from base.commands import parser_of
from base.terminal import existing, one_line_on_ctrl_c, quiet_pipes

if __name__ == "__main__":
    one_line_on_ctrl_c("fit_error_law")

import numpy as np
import torch
from torch import Tensor

from analysis import backward_parts, error_law, leaderboard, pages, plots, published
from analysis.contrasts import Spread
from analysis.law import read_law
from analysis.runs import find_runs
from base.files import write_json
from base.runfolder import read_json
from kernels import backend
from kernels.formats.minifloat import E2M1, E4M3, round_nearest
from kernels.rotation import restored, rotated
from kernels.spec import NVFP4_SCALES, NVFP4_SQUARE_SCALES, TENSOR_FP32, QuantSpec
from quant import audit
from quant.audit import Quantizer
from quant.captured import compared
from training.capture import opened

# FP32 [rows, contraction] -> (its quantized values, the share of elements beyond the grid)
Form = Callable[[Tensor], tuple[Tensor, float]]
QUEST = 2.92247856 / 6  # of a group's root mean square: the scale (Quartet, arXiv 2505.14669)
SHAPE_X, SHAPE_W = (1024, 1024), (512, 1024)
# (X's number, W's number, third regressor): what is tried as the law.
TRIED = (("x", "w", None), ("x", "w", "align"), ("x", "w", "clipped"), ("mse", "mse", None), ("y", "y", None))


def nvfp4(select: str = "absmax", square: bool = False, **limits: float) -> Form:
    """Rounded to nearest in 1x16 blocks or 16x16 tiles."""
    scales = NVFP4_SQUARE_SCALES if square else NVFP4_SCALES
    quantizer = Quantizer(QuantSpec.resolve("e2m1", scales, select=select, **limits), None)

    def make(x: Tensor) -> tuple[Tensor, float]:
        return audit.estimate(quantizer, x, 1), audit.terms(quantizer, x)["clipped"]

    return make


def quest(x: Tensor) -> tuple[Tensor, float]:
    """Scales from each group's root mean square, which clips; E4M3 under a cap of 256."""
    groups = x.view(-1, 16)
    wanted = groups.square().mean(dim=1, keepdim=True).sqrt() * QUEST
    outer = wanted.max() / 256
    elements = groups / (round_nearest(wanted / outer, E4M3).clamp(min=2.0**-9) * outer)
    values = round_nearest(elements, E2M1) * (groups / elements)
    return torch.where(elements == 0, 0.0, values).view(x.shape), float((elements.abs() > 6).double().mean())


def behind(form: Form) -> Form:
    """Behind a Hadamard transform without signs, as the published runs have it."""

    def make(x: Tensor) -> tuple[Tensor, float]:
        signs = torch.ones(16)
        values, clipped = form(rotated(x, signs))
        return restored(values, signs), clipped

    return make


PLAIN, FOURS = nvfp4(), nvfp4("four_over_six")
SQUARE, SQUARE_FOURS = nvfp4(square=True), nvfp4("four_over_six", square=True)
OVERRIDE = nvfp4(target_max=6 / 0.92, scale_cap=448.0)
ANCHOR = "forward_1x16_46"  # quartet2's forward: others are shown relative to it
# Recipe of analysis/published.py: what it makes of X and of W.
ARMS: dict[str, tuple[Form, Form]] = {
    "forward_1x16_46": (FOURS, FOURS),
    "forward_1x16": (PLAIN, PLAIN),
    "forward_1x16_override92": (OVERRIDE, OVERRIDE),
    "forward_16x16_46": (FOURS, SQUARE_FOURS),
    "forward_16x16": (PLAIN, SQUARE),
    "forward_1x16_rht16": (behind(PLAIN), behind(PLAIN)),
    "forward_16x16_rht16": (behind(PLAIN), behind(SQUARE)),
    "forward_quartet:quest/had1": (quest, quest),
    "forward_quartet:quest/had16": (behind(quest), behind(quest)),
}


def fp8(x: Tensor) -> tuple[Tensor, float]:
    quantizer = Quantizer(QuantSpec.resolve("e4m3", (TENSOR_FP32,)), None)
    return audit.estimate(quantizer, x, 1), 0.0


def errors(x: Tensor, w: Tensor) -> error_law.Measured:
    """{arm: numbers} of one pair of operands, BF16. x, w, y: errors of X, W and X W^T after the best gain; mse: mean
    of X's and W's without a gain; align, clipped: sums over both operands."""
    x, w = x.float(), w.float()
    exact = x.double() @ w.double().t()
    return {arm: _of_arm(x, w, exact, *forms) for arm, forms in (ARMS | {"fp8": (fp8, fp8)}).items()}


def _of_arm(x: Tensor, w: Tensor, exact: Tensor, of_x: Form, of_w: Form) -> dict[str, float]:
    (qx, clipped_x), (qw, clipped_w) = of_x(x), of_w(w)
    found: dict[str, float] = {"clipped": clipped_x + clipped_w, "align": 0.0, "mse": 0.0}
    for name, tensor, made in (("x", x.double(), qx.double()), ("w", w.double(), qw.double())):
        energy = tensor.square().sum()
        found[name] = compared(tensor, made)["error"]
        found["align"] += float((tensor * made).sum() / energy - 1)
        found["mse"] += float((made - tensor).square().sum() / energy) / 2
    return found | {"y": compared(exact, qx.double() @ qw.double().t())["error"]}


def inputs(folder: Path | None) -> dict[str, error_law.Measured]:
    """Errors on normal operands, on X from Student's t with 3 degrees of freedom, and on captured layers' mean."""
    weight = audit.gaussian(SHAPE_W, 1)
    found = {
        "normal": errors(audit.gaussian(SHAPE_X, 0), weight),
        "heavy": errors(audit.student_t(SHAPE_X, 0), weight),
    }
    if folder:
        captured = opened(folder)
        each = [errors(x, w) for w, x, _ in map(captured.tensors, captured.index["layers"])]
        found["captured"] = {
            arm: {name: float(np.mean([one[arm][name] for one in each])) for name in numbers}
            for arm, numbers in each[0].items()
        }
    return found


RESULTS = published.DEFAULT_PATH.parents[1]
# What the leaderboard has of other forwards under quartet2's backward. Not shaped ones: their operands' errors are not
# what is left in the product.
LIKE_QUARTET2 = ("if4_x", "sfp4_x", "po2_x", "po2_fwd", "sfp4_fwd", "search", "search_no_clip", "fp8_down")
BOARD = "llama_30m", 1.7e-3
BACKWARD = "corpus_screen-quartet2_backward-s0"


OURS = {arm: f"corpus_forward-{arm}-x1-s0" for arm in ("quartet2", "x_only", "w_only", "fp8_fprop")}


def folder_of(run: str) -> Path:
    return RESULTS / run.split("-")[0] / run


def final_loss(run: str) -> float:
    return find_runs([str(folder_of(run))])[0].result["final_loss"]


def our_gaps() -> dict[str, float]:
    """Gaps of the screen's seed 0 to BF16, less that of the backward alone; {} without the raw runs."""
    if not all(folder_of(run).exists() for run in (*OURS.values(), BACKWARD)):
        return {}
    return {arm: final_loss(run) - final_loss(BACKWARD) for arm, run in OURS.items()}


def board_arms(backward: float) -> dict[str, tuple[float, tuple[float, float]]]:
    """{arm: (its gap less `backward` over quartet2's, (e_X, e_W) on captured tensors)} of the leaderboard's runs;
    `backward`: the screen's gap of MS-EDEN's backward alone, since none was run at the leaderboard's rate."""
    captured = read_json(RESULTS / "error_law" / "captured.json")["recipes"]
    runs = leaderboard.at(find_runs([f"{RESULTS}/{name}/*" for name in ("leaderboard", "candidates")]), *BOARD)
    gaps = {arm.label: arm.gap.value for arm in leaderboard.arms(runs, Spread(1.0, 1, ""))[0] if arm.gap}
    least = gaps["quartet2"] - backward
    means = {arm: captured[arm]["mean"] for arm in map("quartet2_{}".format, LIKE_QUARTET2) if arm in gaps}
    return {arm: ((gaps[arm] - backward) / least, (m["fprop.x"], m["fprop.w"])) for arm, m in means.items()}


def screen_backward() -> float:
    """The gap of MS-EDEN's backward alone at the screen's rate, seed 0."""
    return final_loss(BACKWARD) - final_loss("corpus_screen-bf16-s0")


def our_errors(measured: error_law.Measured) -> dict[str, tuple[float, float]]:
    """(e_X, e_W) of those arms."""
    fours, eight = measured[ANCHOR], measured["fp8"]
    return {
        "quartet2": (fours["x"], fours["w"]),
        "x_only": (fours["x"], 0.0),
        "w_only": (0.0, fours["w"]),
        "fp8_fprop": (eight["x"], eight["w"]),
    }


def fits(found: dict[str, error_law.Effect], measured: error_law.Measured) -> list[dict[str, Any]]:
    """Every law of TRIED, on all arms, with intervals; and the first one without each arm that has something of its
    own."""
    sets = {"all": found}
    sets |= {"no override": {arm: e for arm, e in found.items() if "override" not in arm}}
    sets |= {"unrotated NVFP4": {arm: e for arm, e in found.items() if "rht" not in arm and "quest" not in arm}}
    rows = []
    for label, arms in sets.items():
        for x, w, extra in TRIED if label == "all" else TRIED[:1]:
            law = error_law.fit(arms, measured, x, w, extra)
            drawn = error_law.bootstrap(arms, measured, x, w, extra)
            spans = {name: [float(v) for v in np.percentile(values, [2.5, 97.5])] for name, values in drawn.items()}
            rows.append(
                {"arms": label, "count": len(arms), "x": x, "w": w, "third": extra, **asdict(law), "spans": spans}
            )
    return rows


def text(name: str, rows: list[dict[str, Any]]) -> str:
    lines = [f"{name}: gap ~ (theta e_X + (1 - theta) e_W)^p; 95 % over arms; residuals of log gap, in %"]
    for row in rows:
        what = "X and W" if row["x"] == "x" else {"y": "Y alone", "mse": "no gain taken out"}[row["x"]]
        theta, p, third = (row["spans"].get(key) for key in ("theta", "p", "extra"))
        shown = f"theta {row['theta']:.2f} ({theta[0]:.2f} .. {theta[1]:.2f}) " if row["x"] == "x" else " " * 27
        extra = f"  {row['third']} {row['extra']:+.2f} ({third[0]:+.2f} .. {third[1]:+.2f})" if row["third"] else ""
        lines.append(
            f"  {row['arms']:16}{what:18}{shown}p {row['p']:.2f} ({p[0]:.2f} .. {p[1]:.2f})  "
            f"rms {100 * row['rms']:.1f}, left out {100 * row['left_out']:.1f}{extra}"
        )
    return "\n".join(lines)


def arms_text(found: dict[str, error_law.Effect], measured: dict[str, error_law.Measured]) -> str:
    lines = [
        f"{'arm':30}{'gap':>7}{'+-':>7}{'cells':>6}" + "".join(f"{f'X {n}':>12}{'W':>7}{'align':>8}" for n in measured)
    ]
    for arm, effect in found.items():
        ratio = np.exp(effect.value - found[ANCHOR].value)
        cells = "".join(
            f"{1e3 * m[arm]['x']:12.2f}{1e3 * m[arm]['w']:7.2f}{1e3 * m[arm]['align']:8.1f}" for m in measured.values()
        )
        lines.append(f"{arm:30}{ratio:7.3f}{effect.se:7.3f}{effect.cells:6}{cells}")
    return "\n".join(lines)


def board_text(
    board: dict[str, tuple[float, tuple[float, float]]], numbers: error_law.Measured, law: dict[str, Any]
) -> str:
    """What the law of the published arms says of the leaderboard's, and what came, over quartet2's forward."""
    anchor = _mixed(law, (numbers[ANCHOR]["x"], numbers[ANCHOR]["w"]))
    lines = ["", "Leaderboard, gap less the backward over quartet2's: by the law, and what came"]
    for arm, (gap, pair) in board.items():
        lines.append(f"  {arm:26}{(_mixed(law, pair) / anchor) ** law['p']:7.3f}{gap:9.3f}")
    return "\n".join(lines)


def backward(points: dict[str, published.Points]) -> dict[str, backward_parts.Part]:
    """Of the parts whose arms are there."""
    law = read_law()
    return {
        name: backward_parts.part(points, plus, minus, law)
        for name, (plus, minus) in backward_parts.PARTS.items()
        if points.keys() >= {*plus, *minus}
    }


def backward_text(found: dict[str, backward_parts.Part]) -> str:
    header = ("part", "1e-3 nats", "cells", "more a factor e of D/N", "% of the tokens, low and high D/N")
    rows = []
    for name, one in found.items():
        mean, rise = f"{one.mean:.1f} +- {one.se:.1f}", f"{one.rise:+.1f} +- {one.rise_se:.1f}"
        rows.append((name, mean, str(one.cells), rise, ", ".join(f"{share:.1f}" for share in one.tokens)))
    return pages.table(header, rows)


def draw(
    found: dict[str, error_law.Effect],
    measured: dict[str, error_law.Measured],
    laws: dict[str, dict[str, Any]],
    ours: dict[str, float],
    board: dict[str, tuple[float, tuple[float, float]]],
    path: Path,
) -> None:
    """Two panels for each input, gaps and mixed errors over those of 1x16 with 4/6: the published arms, and beside them
    ours as stars and, where errors are on captured tensors, the leaderboard's as triangles."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, len(measured), figsize=(5 * len(measured), 8.5), dpi=110, squeeze=False)
    for (near, far), (name, numbers) in zip(panels.T, measured.items(), strict=True):
        law, errors_of = laws[name], {arm: (numbers[arm]["x"], numbers[arm]["w"]) for arm in ARMS}
        fitted = f"errors on {name} tensors: theta {law['theta']:.2f}, p {law['p']:.2f}"
        ours_too = "stars: our screen's seed 0, less its backward"
        if name == "captured" and board:
            ours_too = f"stars: our screen, triangles: leaderboard ({len(board)})"
        for ax, reach, title in ((near, (0.9, 2.6), fitted), (far, (0.06, 2.6), ours_too)):
            plots.style_axes(ax, "gap over 1x16 4/6's", title, "theta e_X + (1 - theta) e_W, over 1x16 4/6's")
            ax.plot(*_line(law, errors_of[ANCHOR], found[ANCHOR].value, reach), color="#888", linewidth=1)
            for arm in found:
                y = np.exp(found[arm].value - found[ANCHOR].value)
                place = _mixed(law, errors_of[arm]) / _mixed(law, errors_of[ANCHOR]), y
                ax.errorbar(*place, 2 * found[arm].se * y, marker="o", color="#1f5fa8", capsize=2, linestyle="")
                if ax is near:
                    is_below = y < _line(law, errors_of[ANCHOR], found[ANCHOR].value, (place[0], place[0]))[1][0]
                    side = {"ha": "left" if is_below else "right", "xytext": (7 if is_below else -7, -3)}
                    label = arm.removeprefix("forward_").removeprefix("quartet:").replace("_", " ")
                    ax.annotate(label, place, textcoords="offset points", fontsize=7, **side)
        near.set_xlim(0.6, 2.8)
        far.set(xscale="log", yscale="log")
        for arm, pair in our_errors(numbers).items() if ours else ():
            place = _mixed(law, pair) / _mixed(law, errors_of[ANCHOR]), ours[arm] / ours["quartet2"]
            far.plot(*place, marker="*", markersize=10, color="#c8501e", linestyle="")
            far.annotate(arm, place, xytext=(7, -4), textcoords="offset points", fontsize=7, color="#c8501e")
        for arm, (gap, pair) in board.items() if name == "captured" else ():
            place = _mixed(law, pair) / _mixed(law, errors_of[ANCHOR]), gap
            far.plot(*place, marker="^", markersize=8, color="#2e7d32", linestyle="")
            label = arm.removeprefix("quartet2_")
            side = {"xytext": (-7, 2), "ha": "right"}
            far.annotate(label, place, textcoords="offset points", fontsize=7, color="#2e7d32", **side)
    figure.tight_layout()
    plots.save(figure, path)


def _mixed(law: dict[str, Any], pair: tuple[float, float]) -> float:
    return law["theta"] * pair[0] + (1 - law["theta"]) * pair[1]


def _line(law: dict[str, Any], anchor: tuple[float, float], effect: float, reach: tuple[float, float]) -> tuple:
    """The fitted power over the relative error."""
    grid = np.geomspace(*reach, 50)
    return grid, np.exp(law["c"] + law["p"] * np.log(grid * _mixed(law, anchor)) - effect)


def main() -> int:
    parser = parser_of(__file__, __doc__)
    parser.add_argument("--captured", type=Path, metavar="FOLDER", help="measure on these tensors, too")
    parser.add_argument("--published", type=existing, default=published.DEFAULT_PATH, help="CSV of published losses")
    parser.add_argument("--out", type=Path, default=Path("error_law"), help="folder for error_law.json and .png")
    args = parser.parse_args()
    backend.use("reference")
    try:
        points = published.load(args.published)
        if missing := [arm for arm in (*ARMS, "bf16") if arm not in points]:
            raise ValueError(f"{args.published} has no {', '.join(missing)}; give the published losses by --published")
        found = error_law.effects({arm: points[arm] for arm in ARMS}, points["bf16"])
        measured = inputs(args.captured)
        args.out.mkdir(parents=True, exist_ok=True)
        rows, ours = {name: fits(found, numbers) for name, numbers in measured.items()}, our_gaps()
        effects = {arm: asdict(effect) for arm, effect in found.items()}
        board = board_arms(screen_backward()) if ours else {}
        parts = backward(points)
        report = {
            "effects": effects,
            "measured": measured,
            "fits": rows,
            "our_gaps": ours,
            "leaderboard": board,
            "backward": {name: asdict(one) for name, one in parts.items()},
        }
        write_json(args.out / "error_law.json", report)
        draw(found, measured, {name: every[0] for name, every in rows.items()}, ours, board, args.out / "error_law.png")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print("Gap over that of 1x16 with 4/6; errors x1e-3 after the best gain\n")
    print(arms_text(found, measured), *(text(name, every) for name, every in rows.items()), sep="\n\n")
    if board and "captured" in rows:
        print(board_text(board, measured["captured"], rows["captured"][0]))
    print("\nThe backward's parts\n", backward_text(parts), sep="\n")
    return 0


if __name__ == "__main__":
    quiet_pipes()
    sys.exit(main())
