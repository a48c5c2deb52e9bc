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
from base.runfolder import CAPTURE
from base.terminal import one_line_on_ctrl_c, quiet_pipes

if __name__ == "__main__":
    one_line_on_ctrl_c("capture")

from launcher.kept import kept
from training.capture import capture, save
from training.checkpoint.state import load_model
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
    with one_line_errors("capture.py") as outcome:
        asked = kept(arguments.run, arguments.data)
        ranks = setup()
        again = reopen(asked.config, asked.run, asked.step, ranks)
        load_model(asked.checkpoint, again.model)
        loss = LossModel(again.model)
        found = capture(
            again.model, again.evalset, again.numbers.micro, lambda tokens: loss(tokens.to(ranks.device)).backward()
        )
        out = arguments.out or asked.folder / CAPTURE / str(asked.step)
        print(save(out, asked.run, asked.step, again.model, *found))
        outcome.code = 0
    return outcome.code


if __name__ == "__main__":
    quiet_pipes()
    sys.exit(main())
