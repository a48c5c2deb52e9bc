"""Draw every figure and fill every table of README and docs/results from the raw runs in results/: make results

    python scripts/check/results.py           # rewrites numbers in the pages, tables and pictures
    python scripts/check/results.py --check   # changes nothing; exit code 1 where a page says another number

Tables are between markers in the page (analysis/pages.py); sentences are found by their words, listed below.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from base.terminal import one_line_on_ctrl_c, quiet_pipes

if __name__ == "__main__":
    one_line_on_ctrl_c("results")

from analysis import leaderboard, noise, pairs
from analysis.compare import Group, Row, group_runs, pick_baseline, seed_means, table
from analysis.contrasts import Spread
from analysis.equal_loss import equal_loss
from analysis.pages import PageError, blocks, differences, sentence
from analysis.pages import table as markdown
from analysis.pairing import t_quantile
from analysis.runs import Run, find_runs, read_run
from base.commands import ROOT
from base.files import write_text
from base.runfolder import read_json

RESULTS = ROOT / "results"
NAMES = {
    "quartet2_no46": "quartet2 without 4/6",
    "quartet2_forward": "quartet2, forward alone",
    "quartet2_backward": "quartet2, backward alone",
}
SHOWN = "corpus_ranking"  # whose report README links
PICTURES = {"corpus_ranking": "*", "corpus_screen": "*", "corpus_short": "*-s[012]-*"}


@dataclass(frozen=True)
class Compared:
    """The kept runs of one experiment, compared as compare.py does."""

    groups: dict[str, Group]
    rows: dict[str, Row]
    pairs: dict[tuple[str, str], pairs.Pair]
    floor: dict

    def gap(self, label: str) -> tuple[float, float]:
        """Over bf16: (mean, half width), 1e-3 nats."""
        gap = self.rows[label].gap
        return 1e3 * gap.mean, 1e3 * gap.half_width

    def pair(self, worse: str, better: str) -> str:
        """`worse` over `better`: "10.0 +- 2.3"."""
        found = self.pairs.get((worse, better)) or self.pairs[better, worse]
        return f"{1e3 * abs(found.gap.mean):.1f} +- {1e3 * found.gap.half_width:.1f}"

    def seeds(self, worse: str, better: str) -> str:
        """The same seed by seed."""
        found = self.pairs.get((worse, better)) or self.pairs[better, worse]
        return ", ".join(f"{1e3 * abs(gap):.1f}" for gap in found.by_seed.values())

    def all_pairs(self, worse: str, better: str) -> float:
        found = self.pairs.get((worse, better)) or self.pairs[better, worse]
        return 1e3 * found.all_pairs


@cache
def compared(name: str) -> Compared:
    runs = find_runs([f"{RESULTS}/{name}/{PICTURES.get(name, '*')}"])
    groups = group_runs(runs)
    base = pick_baseline(groups, "bf16")
    floors = noise.load()
    floor = noise.floor_for(base.runs[0], floors)
    rows = {row.label: row for row in table(groups, base, floor)}
    found = {(pair.recipe, pair.other): pair for pair in pairs.pairs(groups, floor)}
    ordered = {label: next(group for group in groups if group.label == label) for label in rows}
    return Compared(ordered, rows, found, floors.get(base.runs[0].conditions, {}))


def named(label: str) -> str:
    return NAMES.get(label, label)


def share(group: Group, base: Group, digits: int) -> str:
    """Of its tokens, that the baseline needs for the same loss."""
    found = equal_loss(group, base)
    return f"{found.base_tokens / found.tokens:.{digits}%}".replace("%", " %")


def speed(run: Run) -> tuple[float, float]:
    """(least, median) milliseconds a step."""
    times = run.train["ms_per_step"]
    return float(min(times)), float(sorted(times)[len(times) // 2])


def fastest(group: Group) -> tuple[float, float]:
    return min((speed(run) for run in group.runs), key=lambda pair: pair[1])


def screen_table() -> str:
    found = compared("corpus_screen")
    bench = {r["recipe"]: r for r in read_json(RESULTS / "bench" / "step_llama_30m_h200.json")}
    base = found.groups["bf16"]
    rows = []
    for label, row in found.rows.items():
        timed = bench.get(label)
        least, median = (timed["ms_min"], timed["ms_median"]) if timed else fastest(found.groups[label])
        ms = f"{least:.1f} / {median:.1f}"
        gap = tokens = ""
        if row.gap:
            mean, half = found.gap(label)
            gap = f"{mean:+.1f} ({mean - half:+.1f} .. {mean + half:+.1f})"
            tokens = share(found.groups[label], base, 1)
            ms += f": {median / bench['bf16']['ms_median']:.2f}" if timed else ""
        else:
            ms += f" ({100 * timed['mfu']:.1f} % MFU)"
        loss = f"{row.final:.4f} ({row.sd:.4f})".replace("(0.", "(.")
        rows.append([named(label), str(row.seeds), loss, gap, tokens, ms])
    header = ["recipe", "seeds", "final loss (sd)", "gap to bf16, 1e-3 (95 %)", "tokens bf16 needs"]
    return markdown([*header, "ms a step, min / median"], rows)


def training_loss(group: Group, base: Group) -> float:
    """Mean training loss over the last 200 steps, over the seeds that both have, minus the baseline's; the loss itself
    for the baseline."""

    def mean(run: Run) -> float:
        last = run.train["step"] > run.info["steps"] - 200
        return float(run.train["loss"][last].mean())

    ours, theirs = seed_means(group, mean), seed_means(base, mean)
    if group is base:
        return sum(ours.values()) / len(ours)
    both = ours.keys() & theirs.keys()
    return sum(ours[seed] - theirs[seed] for seed in both) / len(both)


def ranking_table() -> str:
    from analysis import published
    from analysis.report import published_gaps

    found = compared("corpus_ranking")
    base = found.groups["bf16"]
    theirs = published_gaps(list(found.rows), "bf16", base.runs[0].info, published.load())
    plain = speed(base.by_seed()[0][0])[1]
    rows = []
    for label, row in found.rows.items():
        group = found.groups[label]
        losses = {seed: runs[0].result["final_loss"] for seed, runs in group.by_seed().items()}
        seeds = " / ".join(f"{losses[seed]:.4f}" if seed in losses else "-" for seed in range(3))
        least, median = speed(group.by_seed()[0][0])
        training, ms = training_loss(group, base), f"{least:.1f} / {median:.1f}"
        if not row.gap:
            rows.append([named(label), seeds, f"{row.final:.4f}", "", f"({training:.4f})", "", ms])
            continue
        mean, half = found.gap(label)
        gap = f"{mean:+.1f} +- {half:.1f} ({1e3 * theirs[label]:+.1f})"
        tokens = share(group, base, 0)
        cells = [f"{row.final:.4f}", gap, f"{1e3 * training:+.1f}", tokens, f"{ms}: {median / plain:.2f}"]
        rows.append([named(label), seeds, *cells])
    header = ["recipe", "seeds 0 / 1 / 2", "mean", "gap, 1e-3 (published, C4)", "training gap", "tokens bf16 needs"]
    return markdown([*header, "ms a step, min / median"], rows)


def final(folder: Path) -> float:
    return read_json(folder / "result.json")["final_loss"]


def noise_table() -> str:
    runs = {
        "bf16 again": "bf16-rerun",
        "bf16, weights nudged by 1e-6": "bf16-nudge1",
        "quartet2 again": "quartet2-rerun",
        "quartet2, other rounding bits": "quartet2-rounding1",
    }
    rows = []
    for text, name in runs.items():
        first = RESULTS / "corpus_ranking" / f"corpus_ranking-{name.split('-')[0]}-x1-s0"
        again = RESULTS / "corpus_noise" / f"corpus_noise-ranking-{name}"
        rows.append([text, f"{1e3 * (final(again) - final(first)):+.1f}"])
    return markdown(["run", "difference, 1e-3"], rows)


@dataclass(frozen=True)
class Scored:
    """A run of corpus_forward with its final weights under other forwards."""

    loss: float
    bf16: float  # that of the same weights in BF16
    forwards: dict[str, float]  # nats over the latter
    ms: str


@cache
def scored(cell: str) -> Scored:
    folder = RESULTS / "corpus_forward" / f"corpus_forward-{cell}-s0"
    forwards = read_json(folder / "score" / "3052.json")["forwards"]
    over = {name: row["over_bf16"] for name, row in forwards.items()}
    ms = "{:.1f} / {:.1f}".format(*speed(read_run(folder)))
    return Scored(final(folder), forwards["bf16"]["loss"], over, ms)


ARMS = {
    "bf16": "bf16-x1",
    "quartet2": "quartet2-x1",
    "`x_only`": "x_only-x1",
    "`w_only`": "w_only-x1",
    "`fp8_fprop`": "fp8_fprop-x1",
    "`block0_fp8`": "block0_fp8-x1",
    "`source_input`": "source_input-x1",
}
SERVED = ("nvfp4", "nvfp4_x", "nvfp4_w", "nvfp4_absmax", "fp8")
TYPES = ("qkv", "out", "gate_up", "down")
NEAR = 5e-5  # what rounds to 0.0e-3


def e3(value: float) -> str:
    """Nats as signed 1e-3."""
    return "0" if abs(value) < NEAR else f"{1e3 * value:+.1f}"


def served_table() -> str:
    """Served losses; the last two columns over bf16's own weights under BF16 and under NVFP4."""
    plain = scored("bf16-x1")
    rows = []
    for name, cell in ARMS.items():
        run = scored(cell)
        cells = [e3(run.forwards[forward]) for forward in SERVED]
        rounded = run.bf16 + run.forwards["nvfp4"] - plain.bf16 - plain.forwards["nvfp4"]
        rows.append([name, *cells, e3(run.bf16 - plain.bf16), e3(rounded)])
    header = ["weights of", "`nvfp4`", "X alone", "W alone", "without 4/6", "FP8", "served in BF16"]
    return markdown([*header, "served in `nvfp4`"], rows)


def layers_table() -> str:
    rows = []
    for name in ("bf16", "quartet2"):
        forwards = scored(ARMS[name]).forwards
        globs = [*(f"blocks.{i}.*" for i in range(6)), *(f"*.{kind}" for kind in TYPES)]
        keys = [next(key for key in forwards if key.partition("@")[2].endswith(glob.lstrip("*"))) for glob in globs]
        rows.append([name, *(f"{1e3 * forwards[key]:.1f}" for key in keys)])
    return markdown(["weights of", "block 0", *"12345", *TYPES], rows)


def arm_rows() -> Iterator[str]:
    """The first table of docs/results/forward.md, whose first column is prose."""
    plain = scored("bf16-x1")
    yield f"| bf16 | {plain.loss:.4f} | | | | {plain.ms} | ..."
    beginnings = {"quartet2": "| quartet2 |"} | {name: f"| {name}: ... |" for name in list(ARMS)[2:]}
    for name, beginning in beginnings.items():
        run = scored(ARMS[name])
        parts = f"{1e3 * run.forwards['own']:.1f} | {1e3 * (run.bf16 - plain.loss):.1f}"
        yield f"{beginning} {run.loss:.4f} | {e3(run.loss - plain.loss)} | {parts} | {run.ms} | ..."
    trunk, double = scored("quartet2-x2"), scored("bf16-x2")
    parts = f"{1e3 * trunk.forwards['own']:.1f} | {1e3 * (trunk.bf16 - double.loss):.1f}"
    yield f"| bf16 at rate x2 (c66488e) | {double.loss:.4f} | | | | {double.ms} | ..."
    cells = f"{trunk.loss:.4f} | {e3(trunk.loss - double.loss)} | {parts} | {trunk.ms}"
    yield f"| quartet2 at rate x2 (c66488e) | {cells} | ..."


def tail_rows() -> Iterator[str]:
    """One line each; only together they are told from each other."""
    plain, trunk = scored("bf16-x2").loss, scored("quartet2-x2")
    gap = trunk.loss - plain
    yield f"| none, served in its own forward | {trunk.loss:.4f} | {e3(gap)} | ..."
    left = trunk.bf16 - plain
    yield f"| none, served in BF16 | {trunk.bf16:.4f} | {e3(left)} | {100 * left / gap:.0f} % | ..."
    for step, percent in ((2991, 2), (2900, 5), (2595, 15), (2137, 30)):
        loss = final(RESULTS / "corpus_forward_tails" / f"corpus_forward-quartet2-x2-s0-tail{step}")
        over = loss - plain
        yield f"| {step:,} ({percent} %) | {loss:.4f} | {e3(over)} | {100 * over / gap:.0f} % | ..."


BOARD = "llama_30m", 1.7e-3  # model and peak rate of the leaderboard
OWN = "ngpt_30m"  # compared with its own bf16 alone


@cache
def board_runs() -> list[Run]:
    """Those kept of the leaderboard and of the candidates, which share its protocol."""
    return find_runs([f"{RESULTS}/{name}/*" for name in ("leaderboard", "candidates")])


@cache
def board() -> tuple[list[leaderboard.Arm], Spread]:
    kept = compared(SHOWN).floor["paired"]
    spread = Spread(kept["sd"], kept["df"], f"the paired spread of {SHOWN}")
    return leaderboard.arms(leaderboard.at(board_runs(), *BOARD), spread)


def board_properties() -> str:
    captured = read_json(RESULTS / "error_law" / "captured.json")["recipes"]
    return leaderboard.properties(board()[0], captured, leaderboard.step_ratios(RESULTS / "bench", BOARD[0]))


def board_sentences() -> list[str]:
    _, spread = board()
    half = 1e3 * t_quantile(spread.df) * spread.sd * 2**0.5
    return [
        f"one run has a standard deviation of {1e3 * spread.sd:.1f}e-3 ({spread.df:g} degrees of freedom), "
        f"one seed's gap an interval of +- {half:.1f}e-3"
    ]


def forward_alone() -> str:
    """The gap of the forward alone and that of quartet2, over the seeds that both have."""
    found = compared("corpus_screen")
    alone, _ = found.gap("quartet2_forward")
    whole = found.pairs["quartet2", "bf16"].by_seed
    both = [whole[seed] for seed in found.groups["quartet2_forward"].by_seed()]
    mean = 1e3 * sum(both) / len(both)
    return f"{alone:+.1f} of {mean:+.1f}"


def spread(name: str, kind: str, digits: int = 1) -> str:
    return f"{1e3 * compared(name).floor[kind]['sd']:.{digits}f}e-3"


def sentences() -> dict[str, list[str]]:
    """{page: what it has to say}. The words are the page's; only numbers are put in."""
    ranking, screen = compared("corpus_ranking"), compared("corpus_screen")
    arms = scored("quartet2-x1")
    plain, trunk = scored("bf16-x1"), arms.loss
    instant = 100 * arms.forwards["own"] / (trunk - plain.loss)
    gaps = {label: "{:+.1f} +- {:.1f}".format(*screen.gap(label)) for label, row in screen.rows.items() if row.gap}
    rerun, seed, paired = (spread("corpus_ranking", kind) for kind in ("rerun", "seed", "paired"))
    nudge, floor = spread("corpus_ranking", "nudge"), ranking.floor
    law = read_json(RESULTS / "law" / "law.json")
    best, nvidia = (ranking.gap(label)[0] for label in ("quartet2", "nvidia"))
    backward = "{:.1f} +- {:.1f}".format(*screen.gap("quartet2_backward"))
    correlation = "{value:+.2f}, 95 % {low:+.2f} to {high:+.2f}".format(**floor["correlation"])
    return {
        "README.md": [
            f"(Quartet II) ends {best:.0f}e-3 nats above BF16, NVIDIA's {nvidia:.0f}e-3",
            f"Quartet II beats NVIDIA's recipe by {ranking.pair('nvidia', 'quartet2')} e-3 and TetraJet-v2 by "
            f"{ranking.pair('tetrajet2', 'quartet2')} at 0.75B tokens",
            f"of Quartet II's gap, the backward alone {backward}",
            f"Of quartet2's gap {instant:.0f} % is instant (rounding the final weights) and "
            f"{100 - instant:.0f} % is in the weights themselves",
            f"Runs of one recipe and seed scatter by {rerun}; seeds by {seed}, or {paired} after pairing",
            *(f"| `{label}` | ... | {gaps[label]} |" for label in ("fp8", "quartet2", "nvidia", "tetrajet2", "sr")),
        ],
        "docs/results/README.md": [f"quartet2 {best:.0f}e-3 above BF16, nvidia {nvidia:.0f}e-3"],
        "docs/results/ranking.md": [
            f"quartet2 beats nvidia by {ranking.pair('nvidia', 'quartet2')} ({ranking.seeds('nvidia', 'quartet2')}; "
            f"published 11.8) and tetrajet2 by {ranking.pair('tetrajet2', 'quartet2')} "
            f"({ranking.seeds('tetrajet2', 'quartet2')}; published 11.1)",
            f"for all ten pairs at once (+- {ranking.all_pairs('nvidia', 'quartet2'):.1f})",
            f"Without 4/6 it beats nvidia by {ranking.pair('nvidia', 'quartet2_no46')} "
            f"({ranking.seeds('nvidia', 'quartet2_no46')}; published 10.3) and tetrajet2 by "
            f"{ranking.pair('tetrajet2', 'quartet2_no46')} ({ranking.seeds('tetrajet2', 'quartet2_no46')}; 9.6)",
            f"itself is worth {ranking.pair('quartet2_no46', 'quartet2')}: open",
            f"nvidia against tetrajet2 is open: {ranking.pair('nvidia', 'tetrajet2')}, but",
            f"So seeds scatter by {seed} (df {floor['seed']['df']:.1f}), paired gaps' sd over sqrt 2 by {paired} (df "
            f"{floor['paired']['df']:.0f}): sharing a seed paid (correlation {correlation})",
        ],
        "docs/results/screen.md": [
            f"quartet2 beats nvidia by {screen.pair('nvidia', 'quartet2')} and tetrajet2 by "
            f"{screen.pair('tetrajet2', 'quartet2')}; without 4/6 by {screen.pair('nvidia', 'quartet2_no46')} and "
            f"{screen.pair('tetrajet2', 'quartet2_no46')}.",
            f"cap that it needs, is worth {screen.pair('quartet2_no46', 'quartet2')}",
            f"alone {forward_alone()} (over the two seeds that all three have)",
            f"Open: nvidia and tetrajet2 ({screen.pair('tetrajet2', 'nvidia')}), tetrajet2 and sr "
            f"({screen.pair('sr', 'tetrajet2')}), quartet2 and quartet2_upstream",
            f"Seeds scatter by {spread('corpus_screen', 'seed', 2)} (df {screen.floor['seed']['df']:.0f}), paired "
            f"gaps' sd over sqrt 2 by {spread('corpus_screen', 'paired', 2)} (df {screen.floor['paired']['df']:.0f})",
            "quartet2 {:+.1f}, nvidia {:+.1f}, tetrajet2 {:+.1f}, each +- {:.1f} over three seeds".format(
                *(compared("corpus_short").gap(label)[0] for label in ("quartet2", "nvidia", "tetrajet2")),
                compared("corpus_short").gap("quartet2")[1],
            ),
        ],
        "docs/results/noise.md": [
            f"rerun {rerun} (df {floor['rerun']['df']}), rounding bits or a nudge {nudge} (df {floor['nudge']['df']}), "
            f"seeds {seed} (df {floor['seed']['df']:.1f}), seeds after what a seed does to all recipes alike is taken "
            f"out {paired} (df {floor['paired']['df']:.0f})",
            f"reruns {spread('corpus_short', 'rerun')} (df 3; attention's backward sums in any order), other rounding "
            f"bits {spread('corpus_short', 'nudge')} (df 1), seeds {spread('corpus_short', 'seed')} (df "
            f"{compared('corpus_short').floor['seed']['df']:.1f})",
        ],
        "docs/results/speed.md": [],
        "docs/results/leaderboard.md": board_sentences(),
        "results/law/README.md": [
            f"It fits the 21 BF16 cells to {1e3 * law['rms']['coupled']:.1f}e-3 nats (rms); the additive form (gamma = "
            f"1, Chinchilla's) only to {1e3 * law['rms']['additive']:.1f}e-3",
            "eff_N: quartet2 {:.2f}, tetrajet2 {:.2f}, nvidia + 4/6 {:.2f}, nvidia {:.2f}".format(
                *(law["factors"][name]["eff_n"] for name in ("quartet2", "tetrajet2", "nvidia_46", "nvidia"))
            ),
        ],
        "docs/results/forward.md": [
            *arm_rows(),
            "\n".join(tail_rows()),
            f"{instant:.0f} % of quartet2's gap is instant, {100 - instant:.0f} % trajectory.",
        ],
    }


def steps_table() -> str:
    timed = {}
    for model in ("llama_30m", "llama_100m", "wide"):
        rows = read_json(RESULTS / "bench" / f"step_{model}.json")
        timed[model] = {row["recipe"]: row for row in rows}
    lines = []
    for recipe in timed["wide"]:
        cells = []
        for rows in timed.values():
            row, base = rows[recipe], rows["bf16"]
            beside = f": {row['ms_median'] / base['ms_median']:.2f}"
            beside = f" ({100 * row['mfu']:.1f} %)" if row is base else beside
            cells.append(f"{row['ms_min']:.1f} / {row['ms_median']:.1f}{beside}")
        lines.append([f"{recipe}, ms (MFU)" if recipe == "bf16" else recipe, *cells])
    kinds = ("bf16", "quartet2", "fp8")
    memory = [" / ".join(f"{rows[kind]['memory_gib']:.1f}" for kind in kinds) for rows in timed.values()]
    return markdown(["", *timed], [*lines, ["memory GiB, bf16 / quartet2 / fp8", *memory]])


TABLES = {
    "steps": steps_table,
    "screen": screen_table,
    "ranking": ranking_table,
    "noise": noise_table,
    "served": served_table,
    "layers": layers_table,
    "leaderboard": lambda: leaderboard.board(*board()),
    "leaderboard_arms": board_properties,
    "leaderboard_own": lambda: leaderboard.own_baseline(leaderboard.at(board_runs(), OWN, None)),
}


def computed(page: str, wanted: list[str]) -> tuple[str, str]:
    """(the page as it is, as it should be). PageError, which names the page."""
    old = (ROOT / page).read_text(encoding="utf-8")
    new = old
    try:
        new = blocks(new, TABLES)
        for words in wanted:
            new = sentence(new, words)
    except PageError as error:
        raise PageError(f"{page}: {error}") from error
    return old, new


def draw() -> None:
    """The pictures, as compare.py draws them, and the law's tables and picture."""
    from analysis import plots, published, report

    for name in PICTURES:
        found = compared(name)
        groups = list(found.groups.values())
        path = RESULTS / f"{name}.png"
        plots.save(plots.figure(groups, found.groups["bf16"], list(found.rows.values())), path)
        print(f"drawn: {path.relative_to(ROOT)}")
    found = compared(SHOWN)
    groups, rows = list(found.groups.values()), list(found.rows.values())
    judged = list(found.pairs.values())
    page = report.build(groups, found.groups["bf16"], rows, [], judged, published.load())
    write_text(RESULTS / f"{SHOWN}.html", page)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only; exit code 1 where a number differs")
    args = parser.parse_args()
    wrong = 0
    try:
        for page, wanted in sentences().items():
            old, new = computed(page, wanted)
            lines = differences(old, new)
            wrong += len(lines)
            print(*(f"{page}:{line}" for line in lines), sep="\n" if lines else "", end="\n" if lines else "")
            if lines and not args.check:
                write_text(ROOT / page, new)
        if not args.check:
            draw()
    except (ValueError, OSError) as error:
        print(f"results: {error}", file=sys.stderr)
        return 2
    print(f"{wrong} lines {'differ' if args.check else 'rewritten'}")
    return int(args.check and wrong > 0)


if __name__ == "__main__":
    quiet_pipes()
    sys.exit(main())
