"""Tensors that the linear layers of a checkpoint multiply, for quant_audit.py --captured.

Weights, inputs and gradients of outputs.

    python scripts/capture.py runs/NAME                       # the newest checkpoint, into runs/NAME/capture/STEP
    python scripts/capture.py runs/NAME@1000 --out FOLDER     # that of step 1000

One forward and backward over 4,096 tokens of the run's validation text under the run's own recipe, uncompiled, on one
device. Writes at most 64 MiB: some blocks and some of the tokens, by the rule of training/capture.py. A run captures
itself at its end with probes.capture={}.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from base.commands import parser_of
from base.runfolder import CAPTURE, CONFIG, RUN, read_json
from base.terminal import one_line_on_ctrl_c, quiet_pipes

if __name__ == "__main__":
    one_line_on_ctrl_c("capture")

from launcher.compose import stored
from training.capture import capture, save
from training.checkpoint.manifest import step_of
from training.checkpoint.state import load_model
from training.inference import find_checkpoint, split_step
from training.loss import LossModel
from training.ranks.distributed import setup
from training.reopen import reopen
from training.start.failures import one_line_errors


def main() -> int:
    parser = parser_of(__file__, __doc__)
    parser.add_argument("run", help="run folder, or FOLDER@STEP")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write; default: in the run folder")
    parser.add_argument("--data", type=Path, help="token folder, if it was moved")
    arguments = parser.parse_args()
    folder, step = split_step(arguments.run)
    with one_line_errors("capture.py") as outcome:
        checkpoint = find_checkpoint(folder, step)
        config, run = stored(folder / CONFIG), read_json(folder / RUN)
        if arguments.data and config.data.mix:
            raise ValueError(f"{run['name']} was trained on a mixture: put its folders back where data.mix names them")
        config.data.path = arguments.data and str(arguments.data)
        step, ranks = step_of(checkpoint), setup()
        again = reopen(config, run, step, ranks)
        load_model(checkpoint, again.model)
        loss = LossModel(again.model)
        found = capture(
            again.model, again.evalset, again.numbers.micro, lambda tokens: loss(tokens.to(ranks.device)).backward()
        )
        print(save(arguments.out or folder / CAPTURE / str(step), run, step, again.model, *found))
        outcome.code = 0
    return outcome.code


if __name__ == "__main__":
    quiet_pipes()
    sys.exit(main())
