"""Loss of a run's final weights served in BF16, FP8 and NVFP4.

Under its own forward, BF16, NVFP4 (both operands, one of them, without Four-over-Six) and FP8.

    python scripts/score.py runs/NAME                   # the newest checkpoint
    python scripts/score.py runs/NAME@1000              # that of step 1000
    python scripts/score.py runs/NAME --layers 'blocks.0.*' '*.mlp.down'   # also NVFP4 in these layers alone

On all of the run's final evaluation text, uncompiled, on one device. Prints a table and writes score/<step>.json and
score/<step>.npz (nats by sequence and document) into the run folder.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from base.commands import parser_of
from base.runfolder import CONFIG, RUN, read_json
from base.terminal import one_line_on_ctrl_c, quiet_pipes

if __name__ == "__main__":
    one_line_on_ctrl_c("score")

from launcher.compose import stored
from training.checkpoint.manifest import step_of
from training.inference import find_checkpoint, split_step
from training.ranks.distributed import setup
from training.score import Scored, score
from training.start.failures import one_line_errors


def report(run: str, scored: Scored) -> str:
    lines = [f"{run} at step {scored.step}: {scored.evalset.targets:,} tokens of validation text"]
    lines.append(f"{'forward':24} {'nats/token':>10} {'over BF16, 1e-3 (+- SE over documents)':>40} {'bits/byte':>10}")
    for name, row in scored.table().items():
        error = "" if row["over_bf16_se"] is None else f" +- {1e3 * row['over_bf16_se']:.2f}"
        over = f"{1e3 * row['over_bf16']:+.2f}{error}"
        lines.append(f"{name:24} {row['loss']:10.5f} {over:>40} {row['bpb']:10.5f}")
    return "\n".join(lines)


def main() -> int:
    parser = parser_of(__file__, __doc__)
    parser.add_argument("run", help="run folder, or FOLDER@STEP")
    parser.add_argument("--layers", nargs="+", default=[], metavar="GLOB", help="NVFP4 in these layers alone, each")
    parser.add_argument("--data", type=Path, help="token folder, if it was moved")
    arguments = parser.parse_args()
    folder, step = split_step(arguments.run)
    with one_line_errors("score.py") as outcome:
        checkpoint = find_checkpoint(folder, step)
        config, run = stored(folder / CONFIG), read_json(folder / RUN)
        if arguments.data and config.data.mix:
            raise ValueError(f"{run['name']} was trained on a mixture: put its folders back where data.mix names them")
        config.data.path = arguments.data and str(arguments.data)
        scored = score(config, run, checkpoint, step_of(checkpoint), arguments.layers, setup())
        path = scored.save(folder)
        print(report(run["name"], scored))
        print(path, file=sys.stderr)
        outcome.code = 0
    return outcome.code


if __name__ == "__main__":
    quiet_pipes()
    sys.exit(main())
