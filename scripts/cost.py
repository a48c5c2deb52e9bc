"""What runs take: tokens, FLOPs, memory, disk, GPU-hours, money; which cells are done.

    python scripts/cost.py experiment=c4_grid [only='30M/*'] [price=2.5] [price_b200=5] [details=false]
    python scripts/cost.py model=llama_1b9 quant=quartet2 tokens=38e9 gpus=16    any single run, and days on 16 GPUs
    python scripts/cost.py measure='runs/*'      put the speed of finished runs into runs/throughput.json
    python scripts/cost.py measure=bench.json device='NVIDIA H100'   the same from scripts/bench/bench_step.py json=...

gpus= divides the hours by so many GPUs, as if they scaled perfectly. Other key=value words are overrides of train.py,
as for run_grid.py. No text is hashed: where the contents of a file would have to tell whether a cell is done, its state
is "unknown", as a single run's always is. Hours come from throughput measured on the device that the table names; B200
hours are a prediction from H100 (analysis/costs.py says how). Prices are per GPU-hour.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository first, whatever is installed

from base.commands import spelled
from base.terminal import in_columns, one_line_on_ctrl_c, quiet_pipes

if __name__ == "__main__":
    one_line_on_ctrl_c("cost")

from analysis import costs, states
from analysis.costs import Cell
from analysis.runs import find_runs
from analysis.tables import tokens as short
from base.files import write_json
from base.fingerprints import only_remembered
from base.flops import peak_of
from base.fork import step_of
from base.runfolder import read_json
from launcher import cellline
from launcher.cells import CellError, refuse_twice
from launcher.compose import Composed, ConfigError, compose
from launcher.naming import Numerics

OWN = {"gpus": "", "price": "", "price_b200": "", "details": "true", "table": ""}
MEASURED = "runs/throughput.json"  # of one's own; where there is none, the table of results/ counts
SPEED = ("tokens_per_second",)
HEADER = ("cell", "state", "steps", "tokens", "FLOPs", "GiB/GPU", "disk GiB", "hours", "from", "B200 hours (predicted)")


def cell_of(name: str, composed: Composed, numerics: Numerics) -> Cell:
    """What one cell takes, a fork from its parent's step on, in the phase that takes most. ValueError for numbers that
    don't fit each other."""
    from training.start.derive import derive
    from training.start.memory import GIB, estimate, kept_of, state_bytes
    from training.start.shapes import shape_of

    config = composed.config
    shape = shape_of(config, config.data.vocab_size)
    numbers = derive(config, shape.parameters_non_embedding, world=1)
    plans = numerics.plans(config, shape, numbers.steps)
    begins = step_of(config.fork) if config.fork else 0
    steps = numbers.steps - begins
    kept = config.checkpoint.keep_last + len(config.checkpoint.at)
    kept += numbers.steps // config.checkpoint.keep_every if config.checkpoint.keep_every else 0
    accumulates, optimizer = numbers.accumulation > 1, config.optim.name
    memory = max(
        estimate(shape, numbers.micro_tokens, kept_of(plan), accumulates=accumulates, optimizer=optimizer).total
        for plan in plans
    )
    return Cell(
        name=name,
        model=config.model.name,
        recipe=plans[0].recipe.name,
        base_recipe=composed.choices["quant"],
        steps=steps,
        begins=begins,
        tokens=steps * numbers.tokens_per_step,
        flops_per_token=shape.flops_per_token(numbers.seq_len),
        memory_gib=memory,
        disk_gib=kept * state_bytes(shape, config.optim.name) / GIB,
    )


def table_for(own: dict[str, str]) -> dict:
    """The measured throughput. ValueError for a table that was named and isn't there, and for prices that are none."""
    for key in ("price", "price_b200"):
        try:
            if not 0 <= float(own[key] or 0) < math.inf:
                raise ValueError
        except ValueError:
            raise ValueError(f"{key}={own[key]}: give a number, such as {key}=2.5") from None
    if own["gpus"] and (not own["gpus"].isdecimal() or int(own["gpus"]) < 1):
        raise ValueError(f"gpus={own['gpus']}: give how many, such as gpus=8")
    path = Path(own["table"] or MEASURED)
    if path.exists():
        return costs.load(path)
    if own["table"]:
        raise ValueError(f"table={path}: no such file; measure='runs/*' table={path} writes it")
    return costs.load()


def row(cell: Cell, state: states.State, table: dict, peak: float | None) -> tuple[str, ...]:
    """One line of the table. `peak` [FLOP/s]: of the device that the table measured."""
    hours, source = costs.gpu_hours(cell, table["rows"])
    b200 = costs.b200_hours(cell, table["rows"], peak)
    shown = state.status if state.status in (states.DONE, states.MISSING) else f"{state.status} {state.step}"
    return (
        cell.name,
        shown,
        f"{cell.steps:,}",
        short(cell.tokens),
        f"{cell.flops:.2e}",
        f"{cell.memory_gib:.1f}",
        f"{cell.disk_gib:.1f}",
        "-" if hours is None else f"{hours:.2f}",
        source,
        "-" if b200 is None else f"{b200:.2f}",
    )


def done(cell: Cell, state: states.State) -> float:
    """The share of the cell's own steps that is there."""
    return max(0, state.step - cell.begins) / cell.steps


def totals(
    cells: list[Cell], found: dict[str, states.State], table: dict, peak: float | None, own: dict[str, str]
) -> list[str]:
    """Sums over all cells and over what is left to run; a cell in progress counts by the steps it still needs."""
    over = (states.DONE, states.DEAD, states.DIVERGED)
    left = {c.name: 0.0 if found[c.name].status in over else 1 - done(c, found[c.name]) for c in cells}
    lines = [states.counted(found.values())]
    disk = sum(c.disk_gib for c in cells)
    lines.append(f"{sum(c.flops for c in cells):.3g} FLOPs, {disk:.1f} GiB of checkpoints if all are kept")
    for label, hours_of, price in (
        (table["device"] or "measured device", lambda c: costs.gpu_hours(c, table["rows"])[0], own["price"]),
        ("B200, predicted", lambda c: costs.b200_hours(c, table["rows"], peak), own["price_b200"]),
    ):
        hours = {c.name: hours_of(c) for c in cells}
        known = {name: h for name, h in hours.items() if h is not None}
        if not known:
            hint = spelled("scripts/cost.py measure='runs/*'")
            lines.append(f"{label}: no throughput measured yet ({hint})")
            continue
        total, rest = sum(known.values()), sum(h * left[name] for name, h in known.items())
        unknown = f" ({len(hours) - len(known)} cells unknown)" if len(known) < len(hours) else ""
        cost = f", {total * float(price):,.0f} and {rest * float(price):,.0f} at {price} a GPU-hour" if price else ""
        lines.append(f"{label}: {total:,.1f} GPU-hours, {rest:,.1f} of them left{cost}{unknown}")
        if own["gpus"]:
            longest = max(known, key=known.get)
            each = f"; {longest} alone {days(known[longest], own)}" if len(known) > 1 else ""
            lines.append(f"  on {own['gpus']} GPUs, if they scale perfectly: {days(total, own)}{each}")
    return lines


def days(hours: float, own: dict[str, str]) -> str:
    """GPU-hours as time on so many GPUs."""
    wall = hours / int(own["gpus"])
    return f"{wall / 24:.1f} days" if wall >= 24 else f"{wall:.1f} hours"


def measure(given: list[str]) -> int:
    """Write runs/throughput.json or `table`; rows of other models and recipes stay. ValueError for any other key."""
    refuse_twice(given)
    words = dict(word.partition("=")[::2] for word in given)
    for key in words:
        if key not in ("measure", "device", "table"):
            raise ValueError(f"{key} has no meaning beside measure=...; possible are device=... and table=...")
    path = Path(words.get("table", MEASURED))
    table = costs.load(path)
    if words["measure"].endswith(".json"):
        if not words.get("device"):
            raise ValueError(f"{words['measure']} doesn't name its device: add device='NVIDIA H100'")
        device, rows = words["device"], bench_rows(words["measure"])
    else:
        runs = [run for run in find_runs([words["measure"]]) if run.finished]
        if not runs:
            raise ValueError(f"measure={words['measure']}: no run there has finished")
        device, rows = costs.measured_rows(runs)
    if table["device"] not in (None, device):
        raise ValueError(f"{path} is about {table['device']}, not {device}; give table=another.json")
    new = {(r["model"], r["recipe"]) for r in rows}
    kept = [r for r in table["rows"] if (r["model"], r["recipe"]) not in new]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"device": device, "rows": sorted([*kept, *rows], key=str)})
    print(f"{len(rows)} rows written, {len(kept)} kept: {path}")
    return 0


def bench_rows(source: str) -> list[dict]:
    """Rows from bench_step.py's JSON; presets only, whose FLOPs are known. ValueError for another file."""
    from training.start.shapes import shape_of

    timings = read_json(Path(source))
    if not isinstance(timings, list) or not all(costs.is_row(timing, SPEED) for timing in timings):
        keys = ", ".join(costs.ROW_NAMES + SPEED)
        raise ValueError(f"{source}: not what scripts/bench/bench_step.py json=... writes, a list with {keys}")
    rows = []
    for timing in timings:
        try:
            config = compose([f"model={timing['model']}"]).config
        except ConfigError:
            continue  # `wide`, which is no preset
        flops = shape_of(config, 32000).flops_per_token(512)
        keep = {key: timing[key] for key in costs.ROW_NAMES}
        keep |= {"tokens_per_second": round(timing["tokens_per_second"])}
        rows.append(keep | {"flops_per_token": flops, "source": source})
    return rows


def main(words: list[str]) -> int:
    if not words or {"-h", "--help"} & {*words}:
        print(spelled(__doc__))
        return 0 if words else 2
    try:
        if any(word.startswith("measure=") for word in words):
            return measure(words)
        with only_remembered():
            line = cellline.read(words, OWN, single=True)
            details = line.is_true("details")
            table = table_for(line.own)
            found = {cell: looked.state for cell, looked in line.look().items()}
        cells = [cell_of(name, composed, line.composer.numerics) for name, composed in line.cells.items()]
    except (CellError, ConfigError, ValueError, OSError) as error:
        print(f"cost: {error}", file=sys.stderr)
        return 2
    peak = peak_of(table["device"])
    if details:
        lines = [HEADER, *(row(cell, found[cell.name], table, peak) for cell in cells)]
        print(in_columns(lines), "\n")
    title = f"{line.experiment}: {len(cells)} cells" if line.experiment else "one run"
    measured = f"throughput measured on {table['device']}" if table["device"] else "no throughput measured"
    print(f"{title}; {measured}", *totals(cells, found, table, peak, line.own), sep="\n")
    states.tell_problems(found)
    return 0


if __name__ == "__main__":
    quiet_pipes()
    sys.exit(main(sys.argv[1:]))
