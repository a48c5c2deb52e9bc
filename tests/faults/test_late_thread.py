"""A thread of gloo that still holds a collective's tensors while Python ends: ranks of a finished run exit with 0."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.faults


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler for the preloaded library")
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_finished_ranks_exit_with_0(overrides, tmp_path, mode):
    library = tmp_path / "late_thread.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", library, Path(__file__).with_name("late_thread.c"), "-ldl"], check=True
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for repeat in range(3):
        done = subprocess.run(
            [*launcher, str(ROOT / "train.py"), *overrides(f"late{repeat}", "steps=1", f"parallel={mode}")],
            env={**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert "finished:" in done.stdout
        assert done.returncode == 0, done.stderr[-2000:]
