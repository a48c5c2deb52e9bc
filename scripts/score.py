"""Loss of a run's final weights served in BF16, FP8 and NVFP4; or the tasks of lm-eval and CORE.

Under its own forward, BF16, NVFP4 (both operands, one of them, without Four-over-Six) and FP8.

    python scripts/score.py runs/NAME                   # the newest checkpoint
    python scripts/score.py runs/NAME@1000              # that of step 1000
    python scripts/score.py runs/NAME --layers 'blocks.0.*' '*.mlp.down'   # also NVFP4 in these layers alone
    python scripts/score.py runs/NAME --shaped-weights  # also NVFP4 with W rounded by error feedback
    python scripts/score.py runs/NAME --tasks hellaswag,arc_easy --forward bf16
    python scripts/score.py runs/NAME --core eval_bundle

The loss is of all of the run's final evaluation text, uncompiled, on one device. Prints a table and writes
score/<step>.json and score/<step>.npz (nats by sequence and document) into the run folder. Tasks are asked under the
run's own forward, or --forward; their table is kept in tasks/<step>.json.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from base.commands import parser_of
from base.files import write_json
from base.runfolder import TASKS, read_json
from base.terminal import one_line_on_ctrl_c, quiet_pipes

if __name__ == "__main__":
    one_line_on_ctrl_c("score")

from launcher.kept import Kept, kept
from training import core
from training.harness import Harness
from training.inference import run_tokenizer
from training.likelihood import opened
from training.ranks.distributed import setup
from training.score import score
from training.served import FORWARDS, OWN, Scored
from training.start.failures import one_line_errors


def report(run: str, scored: Scored) -> str:
    lines = [f"{run} at step {scored.step}: {scored.evalset.targets:,} tokens of validation text"]
    lines.append(f"{'forward':24} {'nats/token':>10} {'over BF16, 1e-3 (+- SE over documents)':>40} {'bits/byte':>10}")
    for name, row in scored.table().items():
        error = "" if row["over_bf16_se"] is None else f" +- {1e3 * row['over_bf16_se']:.2f}"
        over = f"{1e3 * row['over_bf16']:+.2f}{error}"
        lines.append(f"{name:24} {row['loss']:10.5f} {over:>40} {row['bpb']:10.5f}")
    return "\n".join(lines)


def asked(arguments: argparse.Namespace, taken: Kept) -> dict[str, Any]:
    """The rows of --tasks and --core. Everything that is named is read before the model is."""
    harness = Harness(arguments.tasks.split(","), arguments.task_path) if arguments.tasks else None
    tasks = core.read_tasks(arguments.core) if arguments.core else []
    run = taken.run
    place = arguments.data or run["data_path"]
    tokenizer = run_tokenizer(run | {"data_path": place})
    if tokenizer is None:
        raise ValueError(f"the data of {run['name']} is gone ({place}): give its folder by --data")
    model = taken.config, run, taken.checkpoint, taken.step
    with opened(*model, arguments.forward or OWN, tokenizer, setup()) as likelihood:
        rows = harness.ask(likelihood) if harness else {}
        if tasks:
            rows |= core.ask(tasks, likelihood, lambda text: print(text, file=sys.stderr))
    return rows


def answers(run: str, step: int, forward: str, rows: dict[str, Any]) -> str:
    lines = [f"{run} at step {step}, forward {forward}"]
    lines.append(f"{'task':32} {'metric':16} {'value':>9} {'+- SE':>9} {'questions':>9} {'shots':>5}")
    for name, row in rows.items():
        for metric, (value, error) in row["metrics"].items():
            se = "" if error is None else f"{error:.4f}"
            shots = "" if row["shots"] is None else row["shots"]
            lines.append(f"{name:32} {metric:16} {value:9.4f} {se:>9} {row['questions']:>9} {shots:>5}")
    return "\n".join(lines)


def keep(folder: Path, step: int, forward: str, rows: dict[str, Any]) -> Path:
    """Into tasks/<step>.json, beside what was asked before."""
    path = folder / TASKS / f"{step}.json"
    path.parent.mkdir(exist_ok=True)
    before = read_json(path)["forwards"] if path.exists() else {}
    write_json(path, {"step": step, "forwards": before | {forward: before.get(forward, {}) | rows}})
    return path


def arguments_of(parser: argparse.ArgumentParser) -> argparse.Namespace:
    parser.add_argument("run", help="run folder, or FOLDER@STEP")
    parser.add_argument("--layers", nargs="+", default=[], metavar="GLOB", help="NVFP4 in these layers alone, each")
    parser.add_argument(
        "--shaped-weights", action="store_true", help="NVFP4, W by error feedback fitted on the last training tokens"
    )
    parser.add_argument("--data", type=Path, help="token folder, if it was moved")
    parser.add_argument("--tasks", metavar="A,B", help="tasks of lm-eval, by name")
    parser.add_argument("--task-path", type=Path, metavar="FOLDER", help="of your own task files for lm-eval")
    parser.add_argument("--core", type=Path, metavar="FOLDER", help="nanochat's bundle: the tasks of CORE")
    parser.add_argument("--forward", choices=[OWN, *FORWARDS], help="under which tasks are asked; default own")
    arguments = parser.parse_args()
    if arguments.task_path and not arguments.tasks:
        parser.error("--task-path goes with --tasks A,B")
    if arguments.forward and not (arguments.tasks or arguments.core):
        parser.error("--forward goes with --tasks or --core: the loss is measured under every forward")
    if (arguments.layers or arguments.shaped_weights) and (arguments.tasks or arguments.core):
        parser.error("--layers and --shaped-weights go with the loss, not with --tasks or --core")
    return arguments


def main() -> int:
    arguments = arguments_of(parser_of(__file__, __doc__))
    with one_line_errors("score.py") as outcome:
        taken = kept(arguments.run, arguments.data)
        if arguments.tasks or arguments.core:
            rows, forward = asked(arguments, taken), arguments.forward or OWN
            path = keep(taken.folder, taken.step, forward, rows)
            print(answers(taken.run["name"], taken.step, forward, rows))
        else:
            model = taken.config, taken.run, taken.checkpoint, taken.step
            scored = score(*model, arguments.layers, setup(), arguments.shaped_weights)
            path = scored.save(taken.folder)
            print(report(taken.run["name"], scored))
        print(path, file=sys.stderr)
        outcome.code = 0
    return outcome.code


if __name__ == "__main__":
    quiet_pipes()
    sys.exit(main())
