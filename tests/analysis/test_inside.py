"""The pages of a report that show what was seen inside the layers: their numbers, and what a browser makes of them."""

import json
import re
import shutil
import subprocess

import pytest
from synthetic import write_run

from analysis import inside, lifting, report
from analysis.compare import group_runs, pick_baseline, table
from analysis.pairs import pairs
from analysis.runs import find_runs, read_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LAYERS = ("blocks.0.attn.qkv", "blocks.0.mlp.down")


def xray_row(step: int, size: float) -> dict:
    """The second layer's wgrad has a bias at step 50; no rho is told at step 100."""

    def products(number: int) -> dict:
        error = size * (number + 1) * step
        bias = {"bias": 9e-5, "bias_se": 1e-5} if number and step == 50 else {"bias": -1e-6, "bias_se": 2e-5}
        near = {"error": error, "cosine": 0.99, "projection": 0.98}
        both = {"forward": near, "backward": near | {"variance": error, "visible": 4e-5} | bias}
        scopes = {"local": both, "propagated": both}
        return {"fprop": {scope: {"forward": near} for scope in scopes}, "dgrad": scopes, "wgrad": scopes}

    noise = {"snr_sampling": 2.0, "snr_rounding": 1.0, "rho": None if step == 100 else 0.5, "common": None}
    slots = {"fprop.x": {"mse": 0.007, "clipped": 0.02, "underflowed": 0.08}}
    layers = {
        name: {"recipe": "quartet2", **products(number), "noise": noise, "slots": slots}
        for number, name in enumerate(LAYERS)
    }
    return {"kind": "xray", "step": step, "tokens": 1024 * step, "layers": layers, "time": 1.0}


def counted(step: int) -> dict:
    counts = {"elements": 1000, "clipped": 10, "zeroed": 50, "blocks": 0, "underflow_blocks": 0}
    return {"kind": "slots", "step": step, "slots": {LAYERS[0]: {"fprop.x": counts}}, "time": 1.0}


def flipped(step: int) -> dict:
    layer = {"flipped": None if step == 25 else 0.2, "flips_per_step": 0.01, "near": 0.1, "distance": [0.1] * 10}
    layers = dict.fromkeys(LAYERS, layer)
    return {"kind": "oscillation", "step": step, "tokens": 1024 * step, "window": 5, "layers": layers, "time": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two runs with looks and one without; one of them has a look by scripts/xray.py, too."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder, "bf16", 0, 3.4)
    for recipe, size in (("quartet2", 1e-3), ("sr", 4e-3)):
        path = write_run(folder, recipe, 0, 3.45, name=f"{recipe} <0>")
        with open(path / "metrics.jsonl", "a") as file:
            rows = [row for step in (25, 50, 100) for row in (xray_row(step, size), counted(step), flipped(step))]
            file.writelines(json.dumps(row) + "\n" for row in rows)
    (path / "xray").mkdir()
    (path / "xray" / "75.json").write_text(json.dumps(xray_row(75, 1.0)))
    return folder


@pytest.fixture(scope="module")
def document(folder):
    groups = group_runs(find_runs([f"{folder}/*"]))
    base = pick_baseline(groups, "bf16")
    return report.build(groups, base, table(groups, base), [], pairs(groups, None), {})


def numbers(document: str) -> dict:
    return json.loads(re.search(r'id="inside-data">(.*?)</script>', document)[1])


def view(document: str, run: str, kind: str, title: str) -> dict:
    found = numbers(document)
    [key] = [key for key, one in found["quantities"].items() if (one["kind"], one["title"]) == (kind, title)]
    [views] = [one["views"] for one in found["runs"] if one["name"] == run]
    return views[key]


def test_the_pages_have_the_rows_numbers(document):
    assert [run["name"] for run in numbers(document)["runs"]] == ["quartet2 <0>", "sr <0>"]
    parts = view(document, "quartet2 <0>", "X-ray", "forward's part, squared error, 1e-3")
    assert set(parts) == {
        f"{gemm}, {scope}" for gemm in ("fprop", "dgrad", "wgrad") for scope in ("alone", "whole pass")
    }
    assert parts["wgrad, alone"]["steps"] == [25, 50, 100] and parts["wgrad, alone"]["values"][1] == [50, 100, 200]
    bias = view(document, "quartet2 <0>", "X-ray", "backward's part, squared bias, 1e-6")["wgrad, whole pass"]
    assert bias["values"][1] == [-1, 90, -1] and bias["errors"][1] == [20, 10, 20]
    assert bias["marks"] == [[0, 0, 0], [0, 1, 0]]
    [rho] = view(document, "quartet2 <0>", "X-ray", "rho: gradient over rounding noise").values()
    assert rho["steps"] == [25, 50] and rho["marks"] == [[1, 1], [1, 1]]


def test_a_look_from_a_checkpoint_is_between_those_of_the_run(document):
    error = view(document, "sr <0>", "X-ray", "backward's part, squared error, 1e-3")["wgrad, alone"]
    assert error["steps"] == [25, 50, 75, 100] and error["values"][0][2] == 75e3


def test_counters_and_oscillation_are_shown(document):
    assert view(document, "sr <0>", "X-ray", "clipped, %")["fprop.x"]["values"][0][0] == 2
    counters = view(document, "sr <0>", "Evaluation's counters", "underflowed to zero, %")["fprop.x"]
    assert counters["values"] == [[5, 5, 5], [None, None, None]]
    flips = view(document, "sr <0>", "Oscillation", "codes changed since the look before, %")["fprop.w"]
    assert flips["steps"] == [50, 100] and flips["values"][0] == [20, 20]


def test_without_looks_there_is_no_such_page(folder):
    groups = group_runs([read_run(folder / "llama_tiny-bf16-0")])
    assert inside.section(groups, groups[0]) == []


def test_lifted_layers_are_bars_in_the_order_of_their_cost(folder, document):
    assert "Which layers cost loss" not in document

    def change(size: float) -> dict:
        return {"change": size, "change_se": 1e-4, "first": 0.0, "first_se": 0.0, "second": 2e-3, "second_se": 0.0}

    def layer(size: float) -> dict:
        lifted = {"layer": change(-size), "x": change(-size / 2)}
        return {"lifted": lifted, "alone": {"layer": change(size / 4)}}

    path = folder / "llama_tiny-bf16-0" / "lift"
    path.mkdir()
    look = {"targets": 4096, "gap": 2e-3, "gap_se": None, "layers": {"a": layer(1e-3), "<b>": layer(4e-3)}}
    for step in (9, 50):
        (path / f"{step}.json").write_text(json.dumps({"step": step} | look))
    text = "".join(lifting.section(group_runs([read_run(path.parent)])))
    rows = re.findall(r"<tr><td>(.*?)</tr>", text)
    assert "at step 50" in text and [row.partition("<")[0] for row in rows] == ["&lt;b&gt;", "a"]
    texts = ["+4.00 ± 0.10", "+1.00 ± 0.10", "2.00", "-", "+2.00 ± 0.10", "-"]  # FP8 and W weren't lifted
    assert re.findall(r"<td>([^<]*)</td>", rows[0]) == texts
    wide = [float(width) for width in re.findall(r'<rect x="[\d.]+" y="3" width="([\d.]+)"', text)]
    assert wide == pytest.approx([4 * wide[2], wide[2], wide[2], wide[2] / 4], abs=0.1)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on the PATH")
def test_a_browser_draws_both_pages_and_keys_read_cells(document, tmp_path):
    """The comparison as it opens; then a run's page by its button, its bias, and two arrow keys in its map."""
    touch = """
      const maps = () => document.querySelectorAll("#inside .maps figure").length;
      const log = document.body.appendChild(document.createElement("pre"));
      log.id = "log"; log.textContent = `${maps()} `;
      document.querySelectorAll("#inside [data-page]")[1].click();
      const select = document.querySelector("#inside [data-choice=quantity]");
      select.selectedIndex = [...select.options].findIndex(one => one.text.startsWith("backward's part, squared bias"));
      select.onchange();
      const map = document.querySelector("#inside .maps svg");
      map.focus();
      for (const key of ["ArrowDown", "ArrowLeft"]) map.dispatchEvent(new KeyboardEvent("keydown", { key }));
      log.textContent += `${maps()} ${document.documentElement.scrollWidth <= window.innerWidth}`;
    """
    page = tmp_path / "page.html"
    page.write_text(document.replace("</body>", f"<script>{touch}</script></body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command += ["--window-size=500,900", "--virtual-time-budget=2000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert re.search(r'id="log">(.*?)<', done.stdout)[1] == "2 1 true"
    said = re.search(r'class="said" aria-live="polite">(.*?)<', done.stdout)[1]
    assert said == "quartet2 &lt;0&gt;, blocks.0.mlp.down, step 50: 90 ± 10"
    [map_] = re.findall(r'<figure class="map">.*?</figure>', done.stdout, re.DOTALL)
    assert map_.count('class="cell"') == 6 and map_.count('class="dot"') == 1
