"""The tree of forks, and losses of the same weights under other forwards, from runs whose losses are known."""

import csv
import json

import pytest
from synthetic import write_run

from analysis import forks, served
from analysis.compare import group_runs, pick_baseline
from analysis.runs import find_runs


def trunk_and_tails(folder, seeds=(0, 1), keep_trunk=True):
    """quartet2 ends at 3.03; a tail from 70 at 3.015, from 85 at 3.02, that one's own from 95 at 3.018."""
    for seed in seeds:
        trunk = f"t{seed}"
        if keep_trunk:
            write_run(folder, "quartet2", seed, 3.03, hash=trunk)
        for name, step, final, parent, way in (
            ("none", 85, 3.02, trunk, ["quartet2@85"]),
            ("none", 70, 3.015, trunk, ["quartet2@70"]),
            ("dgrad", 95, 3.018, f"none85{seed}", ["quartet2@85", "none@95"]),
        ):
            lineage = {"hash": parent, "step": step, "trunk": trunk, "rounding_seed": None, "way": way}
            write_run(
                folder,
                "quartet2",
                seed,
                final,
                label=" > ".join([*way, name]),
                name=f"{name}{step}{seed}",
                hash=f"{name}{step}{seed}",
                parent=lineage,
                numerics={"fork.parent": parent, "fork.step": step},
            )
    return group_runs(find_runs([f"{folder}/*"]))


def test_the_tree_as_text(tmp_path):
    assert forks.text(forks.trees(trunk_and_tails(tmp_path))).splitlines() == [
        "quartet2: 3.0300 (2 trunks)",
        "├─ @70 none: 3.0150, -15.0e-3 (2 trunks)",
        "└─ @85 none: 3.0200, -10.0e-3 (2 trunks)",
        "   └─ @95 dgrad: 3.0180, -2.0e-3 (2 trunks)",
    ]


def test_a_trunk_that_is_not_among_the_runs_is_named(tmp_path):
    groups = trunk_and_tails(tmp_path, seeds=(0,), keep_trunk=False)
    first, *rest = forks.text(forks.trees(groups)).splitlines()
    assert {first, *rest} >= {"quartet2@70 (not here)", "└─ @70 none: 3.0150 (1 trunk)", "quartet2@85 (not here)"}
    assert forks.trees([]) == []


def test_the_figure_has_a_line_a_run_and_one_to_each_parent(tmp_path):
    figure = forks.figure(forks.trees(trunk_and_tails(tmp_path)))
    (ax,) = figure.axes
    ends = [tuple(line.get_xdata()) for line in ax.lines]
    assert ends == [(0, 100), (70, 100), (70, 70), (85, 100), (85, 85), (95, 100), (95, 95)]
    assert ax.texts[1].get_text() == "3.0150, -15.0e-3 (2 trunks)  @70 none"


def score(path, **losses):
    (path / "score").mkdir()
    rows = {name: {"loss": loss} for name, loss in losses.items()}
    (path / "score" / "100.json").write_text(json.dumps({"step": 100, "forwards": rows}))


def test_served_losses_are_over_the_baselines_own(tmp_path):
    """By hand; a seed that one side lacks is left out, a recipe that nobody scored has no row."""
    for seed, level in enumerate((3.0, 3.1, 3.2)):
        score(write_run(tmp_path, "bf16", seed, level), own=level, bf16=level, nvfp4=level + 0.02)
        arm = write_run(tmp_path, "arm", seed, level + 0.03)
        if seed < 2:
            score(arm, own=level + 0.03, bf16=level + 0.016, nvfp4=level + 0.028 + 0.002 * seed, fp8=level + 0.017)
        write_run(tmp_path, "never", seed, level)
    groups = group_runs(find_runs([f"{tmp_path}/*"]))
    found = {row.label: row for row in served.served(groups, pick_baseline(groups, None))}
    assert found.keys() == {"bf16", "arm"} and (found["bf16"].seeds, found["arm"].seeds) == (3, 2)
    assert found["bf16"].over == pytest.approx({"own": 0, "bf16": 0, "nvfp4": 0.02})
    assert found["arm"].over == pytest.approx({"own": 0.03, "bf16": 0.016, "nvfp4": 0.029, "fp8": 0.017})
    rows = csv.DictReader(served.to_csv([found["arm"]]).splitlines())
    assert {row["forward"]: float(row["over_baseline"]) for row in rows} == pytest.approx(found["arm"].over)
    assert "+29.00" in served.text(list(found.values())) and served.text([]) == ""
