"""--help KEY, tab completion, resume=FOLDER, and a recipe from a file outside the checkout."""

import json
import subprocess

import pytest

import configs
from launcher import explain
from launcher.cli import read_command_line
from launcher.compose import ConfigError, compose, groups
from launcher.schema import known_keys
from quant import library


def test_every_group_and_key_is_explained():
    for name in groups():
        assert f"{name}=choice" in explain.key_help(name)
    for key in known_keys():
        assert key in explain.key_help(key)


def test_every_file_of_a_group_says_what_it_is():
    for name, options in groups().items():
        for option in options:
            said = explain.described(configs.FOLDER / name / f"{option}.yaml")
            assert 4 < len(said) <= explain.WIDEST, (name, option, said)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--help", "optim.lr"], "optim.lr: float | None = null  peak; null: the model preset's"),
        (["--help", "optim.betas=[0.9,0.95]"], "optim.betas: list[float] = [0.9, 0.95]"),
        (["--help", "checkpoint"], "checkpoint.every: "),
        (["--help", "probes.xray.draws"], "probes.xray={every: null, steps: [], tokens: 2048"),
        (["--help", "hooks"], "hooks.ema={decay: 0.999}"),
        (["--help"], "c4_grid         The published scaling grid"),
    ],
)
def test_help_says_what_a_key_means(words, said):
    assert said in read_command_line(words).text


def test_help_on_an_unknown_key_names_the_nearest():
    with pytest.raises(ConfigError, match=r"did you mean optim\.lr"):
        read_command_line(["--help", "optim.lrr"])


@pytest.mark.parametrize(
    ("word", "near"), [("probes.xrya", "xray"), ("probes.xray.drws", "draws"), ("hooks.em", "ema")]
)
def test_help_on_an_unknown_probe_hook_or_option_names_the_nearest(word, near):
    with pytest.raises(ConfigError, match=f"did you mean {near}"):
        read_command_line(["--help", word])


@pytest.mark.parametrize(
    ("line", "reply"),
    [
        ("python train.py quant=quartet2_up", ["quartet2_upstream"]),
        ("nibble train optim.weight", ["optim.weight_decay="]),
        ("python other.py quant=quartet2_up", []),
    ],
)
def test_bash_completes_settings(line, reply):
    asked = f'COMP_LINE="{line}"; COMP_POINT=${{#COMP_LINE}}; _nibble_complete; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", f"{explain.completion()}\n{asked}"], capture_output=True, text=True)
    assert done.stdout.split() == reply and not done.stderr


def run_folder(tmp_path, command):
    folder = tmp_path / "elsewhere" / "my_run"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"command": command}))
    return folder


@pytest.mark.parametrize("program", ["/somewhere/train.py", "nibble train"])
def test_resume_is_the_runs_own_command_in_its_own_place(tmp_path, program):
    folder = run_folder(tmp_path, f"{program} model=llama_tiny 'data.files=a b.txt' paths.runs=old log.every=5")
    line = read_command_line([f"resume={folder}", "log.every=1"])
    assert line.overrides[:2] == ["model=llama_tiny", "data.files=a b.txt"] and line.overrides[-1] == "log.every=1"
    config = compose([word for word in line.overrides if not word.startswith("data.")]).config
    assert (config.paths.runs, config.run.name) == (str(folder.parent), "my_run")


def test_resume_of_what_is_no_run_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"resume=.*nowhere.*give a run's folder"):
        read_command_line([f"resume={tmp_path}/nowhere"])


MINE = """# Mine.
name: mine
fprop: {x: {grid: e2m1}, w: {grid: e2m1, select: four_over_six}}
dgrad: {dy: {grid: none}, w: {grid: none, source: fprop}}
wgrad: {dy: {grid: none}, x: {grid: none, source: fprop}}
"""


def test_a_recipe_from_a_file_is_as_if_it_lay_in_configs(tmp_path, monkeypatch):
    file = tmp_path / "a folder" / "mine.yaml"
    file.parent.mkdir()
    file.write_text(MINE)
    composed = compose([f"quant='{file}'", "quant.fprop.x.select=four_over_six"])
    recipe = library.build(composed.config.quant)
    assert recipe.name == "mine" and recipe.operand("fprop.x").spec.select == "four_over_six"
    assert composed.choices["quant"] == str(file)
    monkeypatch.chdir(file.parent)
    assert compose(["quant=mine.yaml"]).config.quant == compose(["quant=./mine.yaml"]).config.quant
    late = compose(["quant=mine.yaml", "phases=late_bf16"]).config.quant
    assert late["name"] == "mine" and late["phases"] == compose(["phases=late_bf16"]).config.quant["phases"]
    beside = tmp_path / "quartet2.yaml"
    beside.write_text((configs.FOLDER / "quant" / "quartet2.yaml").read_text())
    assert compose([f"quant={beside}"]).config.quant == compose(["quant=quartet2"]).config.quant


def test_a_recipe_file_that_is_none_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        compose(["quant=./nowhere.yaml"])
    (tmp_path / "other.yaml").write_text(MINE)
    with pytest.raises(ConfigError, match="name='mine' must be the file's"):
        compose([f"quant={tmp_path}/other.yaml"])
