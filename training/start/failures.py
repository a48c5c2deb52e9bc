"""What a person sees when a run can't start or go on: one line where we know the reason, a traceback where we don't."""

import dis
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from base.commands import spelled

ROOT = Path(__file__).resolve().parents[2]
WRONG_COMMAND, FAILED = 2, 1
GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
GO_ON = "The same command goes on from the last checkpoint"


@dataclass
class Outcome:
    code: int = FAILED


@contextmanager
def one_line_errors(script: str = "train.py") -> Iterator[Outcome]:
    """Turn errors whose text was written for the user into that text and an exit code; let others pass.

    Ours are the ValueErrors and RuntimeErrors raised by our own files, and every OSError (it names the file).
    """
    outcome = Outcome()
    try:
        yield outcome
    except torch.OutOfMemoryError as error:
        say(
            script,
            f"out of GPU memory ({str(error).splitlines()[0]}). nvidia-smi shows who else holds some; a smaller "
            "batch.micro, where there is one, needs less",
        )
    except OSError as error:
        say(script, str(error))
    except (ValueError, RuntimeError) as error:
        if lost_a_rank(error):
            why = str(error).splitlines()[0].rpartition("] ")[2].partition(". This")[0]
            say(script, f"another rank has ended, whose own lines say why ({why}). {GO_ON}")
            return
        if not raised_by_us(error):
            raise
        outcome.code = WRONG_COMMAND if isinstance(error, ValueError) else FAILED
        say(script, str(error))


def lost_a_rank(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone: gloo says so in the text alone, at the first collective
    after it. The rank that failed shows what happened; a traceback of each of the others would hide it."""
    is_remote = isinstance(error, dist.DistNetworkError) or "gloo/transport" in str(error)
    return is_remote and any(words in str(error) for words in GONE)


def raised_by_us(error: BaseException) -> bool:
    """Whether a `raise` statement of this repository made it: then the message is deliberate and complete.

    By the instruction that the innermost frame stopped at, not by its source, which an installed copy may lack: what a
    library in C raises stops at a call of ours.
    """
    last = error.__traceback__
    if last is None:
        return False
    while last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code
    stopped_at = dis.opname[code.co_code[last.tb_lasti]]
    return stopped_at == "RAISE_VARARGS" and Path(code.co_filename).resolve().is_relative_to(ROOT)


def say(script: str, text: str) -> None:
    print(f"{script}: error: {spelled(text)}", file=sys.stderr)
