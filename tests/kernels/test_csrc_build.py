"""The build script with a stand-in for nvcc: what is cached under which name, what fails, and what it says."""

import shutil
import threading

import pytest

from kernels import build
from kernels.selftest import host, verdicts

FAKE_NVCC = """#!/bin/sh
[ "$1" = --version ] && { echo "Cuda compilation tools Build fake_13.0"; exit; }
echo "$@" >> "$(dirname "$0")/calls"
while [ "$1" != -o ]; do shift; done
grep -q 'syntax error' "$3" && { echo "x.cu(1): error: expected a ;" >&2; exit 2; }
sleep 0.2; echo library > "$2"
"""
UNIT = build.Unit("nvfp4_sm120_bf16", "120f")


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    """Own cache, own copy of csrc, a CUTLASS folder of one header, an nvcc that writes 'library'."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").write_text(FAKE_NVCC)
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    header = tmp_path / "cutlass" / "include" / "cutlass" / "version.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 2\n#define CUTLASS_PATCH 0\n")
    shutil.copytree(build.CSRC, tmp_path / "csrc")
    monkeypatch.setattr(build, "CSRC", tmp_path / "csrc")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path / "cutlass"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def calls(sandbox) -> list[str]:
    return (sandbox / "bin" / "calls").read_text().splitlines()


def test_a_built_library_is_compiled_once_even_by_concurrent_processes(sandbox):
    threads = [threading.Thread(target=build.build, args=(UNIT,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert build.build(UNIT).read_text() == "library\n"
    assert len(calls(sandbox)) == 1
    assert "-DNDEBUG" in calls(sandbox)[0] and "arch=compute_120f,code=sm_120f" in calls(sandbox)[0]
    facts = build.record(UNIT)
    assert (facts["cutlass"], facts["nvcc"]) == ("4.2.0", "fake_13.0") and facts["seconds"] >= 0.2


def test_an_edit_of_a_header_renames_the_library_and_the_old_one_stays(sandbox):
    old = build.build(UNIT)
    header = build.CSRC / "nvfp4_gemm.cuh"
    header.write_text(header.read_text() + "// edited\n")
    assert not build.is_built(UNIT)
    assert build.build(UNIT) != old and old.is_file() and len(calls(sandbox)) == 2


def test_a_failed_compilation_shows_the_messages_and_leaves_nothing_behind(sandbox, capsys):
    (build.CSRC / "nvfp4_sm120_bf16.cu").write_text("syntax error")
    with pytest.raises(RuntimeError, match=r"(?s)nvfp4_sm120_bf16: nvcc failed \(2\).*expected a ;"):
        build.build(UNIT)
    assert not build.is_built(UNIT)
    assert [p.suffix for p in build.cache_dir().iterdir()] == [".lock"]
    assert build.main(["--arch", "120f"]) == 1
    assert "kernels.build: nvfp4_sm120_bf16: nvcc failed (2)" in capsys.readouterr().err


def test_a_failed_compilation_costs_the_selftest_only_the_checks_that_need_it(sandbox):
    (build.CSRC / "host_checks.cu").write_text("syntax error")
    (line,) = host.checks()
    assert line.state == verdicts.NOT_COMPILED and line.detail == "failed: x.cu(1): error: expected a ;"


def test_missing_tools_are_named_with_what_to_do(sandbox, monkeypatch, capsys):
    monkeypatch.setenv("CUTLASS_PATH", str(sandbox / "nowhere"))
    with pytest.raises(RuntimeError, match=r"CUTLASS_PATH=.*nowhere: no include/cutlass/version\.h"):
        build.build(UNIT)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert "nvcc not found: install the CUDA toolkit" in build.cannot_build()
    assert build.main(["--arch", "120f"]) == 1
    assert "nvcc not found" in capsys.readouterr().err
    monkeypatch.delenv("CUTLASS_PATH")
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(RuntimeError, match=r"pip install --no-deps nvidia-cutlass==4\.2\.0\.0"):
        build.cutlass_root()


def test_command_line_builds_the_architectures_asked_for_and_lists(sandbox, capsys):
    with pytest.raises(SystemExit):
        build.main(["--arch", "90a"])
    assert "no kernels for 90a; there are kernels for 100f, 120f" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        build.main(["--arch", "120f", "--jobs", "0"])
    assert "--jobs: a whole number of at least 1" in capsys.readouterr().err
    assert build.main(["--arch", "120f", "--jobs", "2"]) == 0
    assert len(calls(sandbox)) == 2
    assert build.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("not built" in line for line in lines) == len(build.UNITS) - 2
    assert "build: possible here" in lines


def test_a_library_with_another_version_s_record_is_listed(sandbox, capsys):
    path = build.build(UNIT)
    path.with_suffix(".json").write_text('{"seconds": 3.5}\n')
    assert build.main(["--list"]) == 0
    assert "built (seconds 3.5)" in capsys.readouterr().out


def test_every_unit_has_its_source_and_every_source_its_unit():
    assert {unit.sources[0].name for unit in build.UNITS.values()} == {path.name for path in build.CSRC.glob("*.cu")}
