"""Processes below a process: found, signalled, ended."""

import contextlib
import os
import signal
import subprocess
from pathlib import Path


def stop_signals() -> tuple[int, ...]:
    """What asks a program to save and stop: Ctrl-C, SIGTERM, SIGUSR1 and, unless nohup has it ignored, the SIGHUP of a
    closed terminal."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    return numbers if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (*numbers, signal.SIGHUP)


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, from /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    below = list(children.get(pid, []))
    for child in below:  # grows while it is walked
        below.extend(children.get(child, []))
    return below


def kill_tree(process: subprocess.Popen, number: int) -> int:
    """Signal torchrun and its ranks, which it starts in sessions of their own, and wait; nothing of them survives."""
    everyone = [process.pid, *descendants(process.pid)]
    for pid in everyone:
        send(pid, number)
    try:
        return process.wait(timeout=60)
    finally:
        for pid in everyone:
            send(pid, signal.SIGKILL)


def send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
