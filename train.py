"""Train a language model under a 4-bit recipe, or resume its run: python train.py key=value ..."""

import os
import sys

# Deterministic cuBLAS needs a workspace of fixed size, chosen before CUDA starts; other runs don't mind.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from base.commands import spelled, typed
from base.terminal import outlive_readers, quiet_pipes
from launcher.cli import read_command_line
from launcher.compose import ConfigError, compose


def main(arguments: list[str]) -> int:
    """Exit codes: 0 finished or stopped by Ctrl-C, 1 the machine or the run failed, 2 wrong command, 75 preempted,
    130 Ctrl-C before training began or a second one."""
    if "--" in arguments:
        from launcher.several import one_after_another

        return one_after_another(arguments, run)
    return run(arguments)


def run(arguments: list[str]) -> int:
    """What one command asks for."""
    try:
        line = read_command_line(arguments)
        if line.text is not None:
            quiet_pipes()  # only here: training has sockets of its own, and goes on
            print(spelled(line.text))
            return 0
        outlive_readers()
        if line.slurm is not None or line.multirun:
            from launcher.multirun import run_all, submit_all
        if line.slurm is not None:
            return submit_all(line.overrides, line.multirun, line.slurm)
        if line.multirun:
            return run_all(line.overrides)
        composed = compose(line.overrides)
    except ConfigError as error:
        print(f"train.py: error: {spelled(str(error))}", file=sys.stderr)
        return 2
    # Only now: a wrong override shall not wait for torch to be imported.
    from training.ranks.distributed import leave
    from training.start.failures import one_line_errors
    from training.start.launch import Request, launch

    with one_line_errors() as outcome:
        outcome.code = launch(
            Request(composed.config, composed.yaml, composed.choices, typed([sys.argv[0], *arguments]))
        )
    leave(outcome.code)
    return outcome.code


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("train.py: interrupted before training began; the same command starts again", file=sys.stderr)
        sys.exit(130)
