"""Several runs one after another in one process: python train.py WORDS -- WORDS ..., for run_grid.py's in_one.

What is paid once is the start of Python, torch and the device, and Triton's tuning. Everything else is made anew, so
that a run's bits are those that it has alone.
"""

import gc
import traceback
from collections.abc import Callable

from training.ranks.signals import EXIT_KILLED_BY_USER, EXIT_PREEMPTED


def one_after_another(arguments: list[str], run: Callable[[list[str]], int]) -> int:
    """Run each part between the `--`; returns the first exit code that isn't 0. A preemption ends all, an error only
    its own run, and so does Ctrl-C, which run_grid.py doesn't pass on."""
    first = 0
    for words in split(arguments):
        try:
            code = run(words)
        except Exception:  # of one run: the others are none the worse
            traceback.print_exc()
            code = 1
        first = first or code
        if code in (EXIT_PREEMPTED, EXIT_KILLED_BY_USER):
            break
        forget()
    return first


def split(arguments: list[str]) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in arguments:
        if word == "--":
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def forget() -> None:
    """Give back what the last run compiled and allocated: the next one's memory is its own."""
    import torch

    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
