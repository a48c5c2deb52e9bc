import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from synthetic import write_run

from analysis import report, slot_errors, tables, verdict
from analysis.compare import Group, group_runs, pick_baseline, table
from analysis.equal_loss import equal_loss, first_reach
from analysis.pairs import pairs
from analysis.runs import find_runs

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PAPER = {"parameters_non_embedding": 30482560, "tokens_per_step": 7499939}
PUBLISHED = {"bf16": {(30482560, 749993984): 3.4}, "quartet2": {(30482560, 749993984): 3.443}}


class Tables(HTMLParser):
    """{table id: rows of cell texts} and the images of a document."""

    def __init__(self, text: str):
        super().__init__()
        self.tables, self.images, self._id, self._open = {}, [], None, False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "table":
            self._id = attrs["id"]
            self.tables[self._id] = []
        elif tag == "tr":
            self.tables[self._id].append([])
        elif tag in ("td", "th"):
            self.tables[self._id][-1].append("")
            self._open = True
        elif tag == "img":
            self.images.append(attrs["src"])

    def handle_endtag(self, tag):
        self._open = self._open and tag not in ("td", "th")

    def handle_data(self, data):
        if self._open:
            self.tables[self._id][-1][-1] += data


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    """Three recipes, three seeds; run names and one label need escaping; one run ran elsewhere."""
    tmp_path = tmp_path_factory.mktemp("document")
    for seed, wobble in enumerate((0.0, 0.001, -0.001)):
        write_run(tmp_path, "bf16", seed, 3.4, ms=10.0, **PAPER)
        write_run(tmp_path, "quartet2", seed, 3.45 + wobble, ms=20.0, **PAPER)
        path = write_run(tmp_path, "sr", seed, 3.4501 - wobble, label="sr <b>&", name=f"sr-{seed}", **PAPER)
    (path / "env.json").write_text(json.dumps({"commit": "other", "device": "cpu", "packages": {"torch": "2.13"}}))
    groups = group_runs(find_runs([f"{tmp_path}/*"]))
    base = pick_baseline(groups, None)
    return report.build(groups, base, table(groups, base), ["batch differs"], pairs(groups, None), PUBLISHED)


def test_report_is_one_file_that_loads_nothing(document):
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", document) and "@import" not in document
    assert "fetch(" not in document and "<b>&" not in document and "sr &lt;b&gt;&amp;" in document
    image = Tables(document).images[0]
    assert base64.b64decode(image.split(",", 1)[1])[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_verdict_is_the_first_sentence(document):
    first, second, third = re.findall(r"<p[^>]*>(.*?)</p>", document)[:3]
    assert (
        first
        == "Ended above bf16, in 1e-3 nats with 95 % intervals: quartet2 +50.0 ± 2.5, sr &lt;b&gt;&amp; +50.1 ± 2.5."
    )
    assert second.startswith("9 runs of llama_tiny") and "Mixed: batch differs" in third


def test_one_seed_ahead_of_the_baseline_is_called_chance(tmp_path):
    write_run(tmp_path, "bf16", 0, 3.4)
    write_run(tmp_path, "quartet2", 0, 3.35)
    write_run(tmp_path, "sr", 0, 3.5)
    groups = group_runs(find_runs([f"{tmp_path}/*"]))
    said = verdict.sentences(table(groups, groups[0]), pairs(groups, None))
    assert len(said) == 2 and said[0].startswith("No verdict on quartet2 -50.0, sr +100.0: one seed.")
    assert said[1] == "That quartet2 ended below bf16 is chance until more seeds say otherwise."


def test_where_errors_come_from_is_shown_for_the_first_and_the_last_look(tmp_path):
    """Of a run that looked three times, mean over its layers; without such runs there is no table."""
    write_run(tmp_path, "bf16", 0, 3.4)
    path = write_run(tmp_path, "quartet2", 0, 3.45)
    groups = group_runs(find_runs([f"{tmp_path}/*"]))
    assert slot_errors.section(groups) == []
    with open(path / "metrics.jsonl", "a") as file:
        for step, mse in ((25, 7e-3), (50, 1.0), (100, 9e-3)):
            layers = {"a": {"fprop.x": {"mse": mse, "clipped": None}}, "b": {"fprop.x": {"mse": mse + 2e-3}}}
            file.write(json.dumps({"kind": "errors", "step": step, "errors": layers, "time": 1.0}) + "\n")
    groups = group_runs(find_runs([f"{tmp_path}/*"]))
    base = pick_baseline(groups, "bf16")
    made = report.build(groups, base, table(groups, base), [], pairs(groups, None), {})
    _, first, last = Tables(made).tables["slot-errors"]
    assert first[:4] == ["quartet2", "fprop.x", "25", "8.000"] and last[:4] == ["quartet2", "fprop.x", "100", "10.000"]
    assert first[-2] == "-"


def test_every_column_is_in_the_glossary(document):
    assert {*tables.HEADER} - {*tables.GLOSSARY} == {"recipe"}
    assert all(f"<dt>{word}</dt>" in document for word in tables.GLOSSARY)


def curves(document):
    return json.loads(re.search(r'id="curves">(.*?)</script>', document)[1])


def test_the_curves_are_the_runs_numbers(document):
    losses, gaps = curves(document)
    last = {line["name"]: line["y"][-1] for line in gaps["lines"]}
    assert last == pytest.approx({"quartet2": 50.0, "sr <b>&": 50.1}, abs=1e-3)
    assert sum(line["kind"] == "thin" for line in losses["lines"]) == 9
    assert [mark["name"] for mark in gaps["marks"]] == ["quartet2"] and len(gaps["bars"]) == 2


def test_a_diverged_run_leaves_numbers_that_json_can_hold(tmp_path):
    write_run(tmp_path, "bf16", 0, 3.0)
    path = write_run(tmp_path, "sr", 0, 3.1)
    text = (path / "metrics.jsonl").read_text().splitlines()
    bad = [re.sub(r'"loss": [^,}]+', '"loss": NaN', line, count=1) if '"train"' in line else line for line in text]
    (path / "metrics.jsonl").write_text("\n".join(bad) + "\n")
    groups = group_runs(find_runs([f"{tmp_path}/*"]))
    text = report.build(groups, groups[0], table(groups, groups[0]), [], pairs(groups, None), {})
    assert len(curves(text)) == 2


def test_tables_of_the_report_hold_the_numbers(document):
    found = Tables(document).tables
    by_name = {row[0]: row for row in found["comparison"]}
    assert (
        by_name["quartet2"][7] == "+50.00"
        and by_name["quartet2"][4] == f"{3.45 / 2.8:.4f}"
        and by_name["quartet2"][-1] == "resolved"
    )
    told = {row[0]: dict(zip(found["pairwise"][0], row, strict=True)) for row in found["pairwise"][1:]}
    assert told["quartet2"]["bf16"].startswith("+50.0 ± 2.5") and told["bf16"]["quartet2"].startswith("-50.0")
    assert told["quartet2"]["sr <b>&"].startswith("-0.1 ±")
    assert {row[0]: row[3] for row in found["published"]}["quartet2"] == "+43.0"
    assert len(found["runs"]) == 10
    assert found["environment"][1][0] == "commit" and '"other": sr-2' in found["environment"][1][1]
    assert found["configuration"][1] == ["recipe", '"bf16": bf16; "quartet2": quartet2; "sr <b>&": sr <b>&']


def test_differences_name_recipes_and_leave_out_what_has_no_effect(tmp_path):
    plain = {"quant.dgrad.w.grid": "none", "quant.dgrad.w.source": "input", "quant.dgrad.w.rounding": "rtn"}
    plain |= {"quant.dgrad.w.eden_block": 16, "quant.dgrad.rotation.dim": None}
    eden = {"quant.dgrad.w.grid": "e2m1", "quant.dgrad.w.rounding": "ms_eden", "quant.dgrad.w.eden_block": "rotation"}
    for seed in range(6):
        write_run(tmp_path, "bf16", seed, numerics=plain | {"optim.lr": 1e-3 if seed else 2e-3})
    write_run(tmp_path, "sr", numerics=plain | {"quant.dgrad.w.grid": "e2m1", "quant.dgrad.w.rounding": "sr"})
    write_run(tmp_path, "quartet2", numerics=plain | eden)
    runs = find_runs([f"{tmp_path}/*"])
    bf16, others = [r for r in runs if "bf16" in r.name], [r for r in runs if "bf16" not in r.name]
    groups = [Group("bf16", tuple(bf16)), *(Group(run.name.split("-")[1], (run,)) for run in others)]
    page = "".join(report.differing("Configuration", [(r, report.configuration(r)) for r in runs], groups, "it"))
    assert {row[0]: row[1] for row in Tables(page).tables["it"][1:]} == {
        "optim.lr": "0.002: llama_tiny-bf16-0; 0.001: quartet2, sr, llama_tiny-bf16-1, llama_tiny-bf16-2, "
        "llama_tiny-bf16-3, 2 more",
        "quant.dgrad.w.grid": '"none": bf16; "e2m1": quartet2, sr',
        "quant.dgrad.w.rounding": '"ms_eden": quartet2; "sr": sr',
        "recipe": '"bf16": bf16; "quartet2": quartet2; "sr": sr',
    }


def test_tokens_and_time_to_equal_loss_by_hand(tmp_path):
    # Evaluations at 25 50 75 100 steps; between 75 and 100 the baseline falls from 4.0 to 3.0 and meets 3.05 at 98.75.
    write_run(tmp_path, "bf16", 0, 3.0, ms=10.0)
    write_run(tmp_path, "quartet2", 0, 3.05, ms=20.0)
    base, group = group_runs(find_runs([f"{tmp_path}/*"]))
    found = equal_loss(group, base)
    assert (found.tokens, found.base_tokens) == (102400, pytest.approx(98.75 * 1024))
    assert (found.seconds, found.base_seconds) == (pytest.approx(2.0), pytest.approx(0.9875))
    assert report._equal_row(found)[3:] == ["101k", "98.8%", "2.0 s", "1.0 s", "49.4%"]
    back = equal_loss(base, group)
    assert back.base_tokens is None and back.loss == pytest.approx(3.0)
    curve = np.array([10.0, 20.0]), np.array([2.0, 1.0])
    assert first_reach(*curve, 1.0) == 20.0 and first_reach(*curve, 0.5) is None


def test_a_baseline_that_is_there_at_its_first_evaluation_gives_no_share(tmp_path):
    write_run(tmp_path, "bf16", 0, 3.0)
    write_run(tmp_path, "sr", 0, 6.5)  # above the first evaluation of bf16, 6.0 at step 25
    base, group = group_runs(find_runs([f"{tmp_path}/*"]))
    assert equal_loss(group, base) is None and report.equal_losses([base, group], base) == []


def test_equal_loss_takes_the_seeds_that_both_have(tmp_path):
    write_run(tmp_path, "bf16", 0, 3.0)
    write_run(tmp_path, "quartet2", 0, 3.05)
    write_run(tmp_path, "quartet2", 1, 2.0)  # a lucky seed, which bf16 hasn't run
    base, group = group_runs(find_runs([f"{tmp_path}/*"]))
    found = equal_loss(group, base)
    assert found.loss == pytest.approx(3.05) and found.base_tokens == pytest.approx(98.75 * 1024)
    write_run(tmp_path, "sr", 2, 3.05)
    base, _, alone = group_runs(find_runs([f"{tmp_path}/*"]))
    assert equal_loss(alone, base).loss == pytest.approx(3.05)  # no common seed: all that there are


def test_a_cell_of_recipes_compared_before_the_end_says_where(tmp_path):
    write_run(tmp_path, "bf16", 0, 3.0)
    write_run(tmp_path, "fp8", 0, 2.99999)
    write_run(tmp_path, "sr", 0, 3.1, steps_done=60)
    groups = group_runs(find_runs([f"{tmp_path}/*"]))
    text = report.build(groups, groups[0], table(groups, groups[0]), [], pairs(groups, None), {})
    header, *rows = Tables(text).tables["pairwise"]
    told = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert told["sr"]["bf16"] == "+100.0 (step 50)" and told["bf16"]["sr"] == "-100.0 (step 50)"
    assert told["fp8"]["bf16"] == told["bf16"]["fp8"] == "0.0"  # neither -0.0 nor +0.0


def test_without_published_runs_of_that_size_there_is_no_overlay(tmp_path):
    write_run(tmp_path, "bf16", 0, 3.0)
    groups = group_runs(find_runs([f"{tmp_path}/*"]))
    text = report.build(groups, groups[0], table(groups, groups[0]), [], pairs(groups, None), PUBLISHED)
    assert "published" not in Tables(text).tables and "pairwise" not in Tables(text).tables


def test_published_gaps_are_to_the_baseline_of_the_comparison(tmp_path):
    for recipe, loss in (("bf16", 3.4), ("quartet2", 3.45)):
        write_run(tmp_path, recipe, 0, loss, **PAPER)
    groups = group_runs(find_runs([f"{tmp_path}/*"]))
    base, info = groups[1], groups[0].runs[0].info
    text = report.build(groups, base, table(groups, base), [], pairs(groups, None), PUBLISHED)
    shown = {row[0]: row[2:] for row in Tables(text).tables["published"]}
    assert shown["bf16"] == ["-50.0", "-43.0"] and shown["quartet2"] == ["-", "0.0"]
    assert report.published_gaps(["bf16", "quartet2"], "sr", info, PUBLISHED) == {}


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on the PATH")
def test_a_browser_renders_it(document, tmp_path):
    page = tmp_path / "page.html"
    # A person hides a recipe and zooms into the second half.
    touch = "".join(
        f"document.querySelector('{which}').click();" for which in ("[data-name=quartet2]", "[data-from]~*")
    )
    page.write_text(document.replace("</body>", f"<script>{touch}</script></body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command += ["--virtual-time-budget=2000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rendered = Tables(done.stdout).tables
    assert {row[0] for row in rendered["comparison"][1:]} == {"bf16", "quartet2", "sr <b>&"}
    assert rendered["comparison"] == Tables(document).tables["comparison"]
    drawn = re.findall(r'<div class="plot"><svg.*?</svg>', done.stdout, re.DOTALL)
    assert [part.count("<polyline") for part in drawn] == [2 + 6, 1]  # bf16 and sr with their seeds, sr's gap
    ticks = [float(n) for n in re.findall(r'text-anchor="middle">([\d.]+)M<', drawn[0])]
    assert ticks and min(ticks) >= 375  # of 750M tokens
    assert "Tokens and time to equal loss" in done.stdout and "Mixed: batch differs" in done.stdout
