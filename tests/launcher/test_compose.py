"""The command line: every mistake is one clear error that names what is near, before any work."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launcher import cells as experiments
from launcher import compose as compose_module
from launcher import unread
from launcher.cli import read_command_line
from launcher.compose import Composer, ConfigError, compose, groups, parse, sweep, typed_value
from launcher.schema import text_keys
from quant import library, recipefile
from training.config import OptimSection

ROOT = Path(__file__).resolve().parents[2]

# (overrides, parts of the message)
MISTAKES = [
    # unknown keys
    (["optim.lrr=1"], ["'optim.lrr'", "did you mean optim.lr?"]),
    (["lr=1e-3"], ["'lr'", "did you mean optim.lr or model.lr?"]),
    (["optimizer.lr=1e-3"], ["did you mean optim.lr or model.lr?"]),
    (["name=mine"], ["'name'", "did you mean run.name or "]),
    (["scheduler.name=cosine"], ["did you mean schedule.name or "]),
    (["epochs=2"], ["did you mean tokens?"]),
    (["output_dir=x"], ["did you mean paths.runs?"]),
    (["max_lr=1e-3"], ["did you mean optim.lr or model.lr?"]),
    (["nodes=2"], ["unknown key 'nodes': write launcher=slurm slurm.nodes="]),
    (["dropout=0.1"], ["unknown key 'dropout': no model has any"]),
    (["stop_losers=true"], ["unknown key 'stop_losers': it is for python scripts/run_grid.py"]),
    (["in_one=4"], ["unknown key 'in_one': it is for python scripts/run_grid.py"]),
    (["launchr=slurm"], ["did you mean launcher?"]),
    (["resume=true"], ["unknown key 'resume': write resume=runs/NAME"]),
    (["num_gpus=4"], ["unknown key 'num_gpus': torchrun"]),
    (["qunat=bf16"], ["'qunat'", "did you mean quant?"]),
    (["optm.lr=1"], ["'optm.lr'", "optim.lr"]),
    (["optim.betas.x=1"], ["'optim.betas.x'", "optim.betas"]),
    (["evaluate.evry=3"], ["did you mean evaluate.every?"]),
    (["data.fils=x"], ["did you mean data.files?"]),
    (["+foo=1"], ["unknown key 'foo'"]),
    (["+optim.foo=1"], ["unknown key 'optim.foo'"]),
    # group choices
    (["model=llama_3m"], ["model=llama_3m: no such choice", "did you mean llama_30m?", "llama_1b9"]),
    (["quant=quartet"], ["did you mean quartet2?", "bf16"]),
    (["optim=3"], ["optim=3: no such choice", "adamw"]),
    (["quant=null"], ["quant=null: no such choice", "quartet2"]),
    (["optim.betas=0.9"], ["optim.betas: needs a list, such as [0.9,0.95]"]),
    (["debug=smok"], ["did you mean smoke?"]),
    # types
    (["optim=[1]"], ["optim=[1]: a list; give one choice, as in optim=adamw. There are: adamw, muon"]),
    (["optim=[]"], ["optim=[]: a list; give one choice, as in optim=adamw"]),
    (["experiment=[x]"], ["experiment=[x]: a list; give one choice, as in experiment=c4_ablations"]),
    (["quant=[bf16,sr]"], ["quant=[bf16,sr]: a list; give one choice, as in quant=bf16"]),
    (["batch=[]"], ["batch: a section, not a value", "batch.sequences"]),
    (["optim.lr=abc"], ["optim.lr", "'abc'", "Float"]),
    (["seed=a"], ["seed", "'a'", "Integer"]),
    (["model.layers=2.5"], ["model.layers", "2.5", "Integer"]),
    (["batch=8"], ["batch: a section", "batch.sequences"]),
    (["logger.wandb=true"], ["logger.wandb: a section", "logger.wandb.mode"]),
    (["evaluate.bf16=maybe"], ["evaluate.bf16", "'maybe'", "neither true nor false"]),
    # values
    (["backend=tritn"], ["backend=tritn", "auto, reference, triton", "did you mean triton?"]),
    (["parallel=dpp"], ["did you mean ddp?"]),
    (["schedule.name=cosin"], ["schedule.name=cosin", "did you mean cosine?"]),
    (["logger.wandb.mode=onlin"], ["logger.wandb.mode=onlin", "did you mean online?"]),
    (["tokens=0.5"], ["tokens=0.5", "whole number"]),
    (["checkpoint.every=0"], ["checkpoint.every=0", "at least 1", "null"]),
    (["optim.betas=[0.9]"], ["optim.betas=[0.9]", "two numbers"]),
    (["optim.clip=-1"], ["optim.clip=-1", "null"]),
    (["schedule.end_factor=2"], ["schedule.end_factor=2", "from 0 to 1"]),
    (["seed=-1"], ["seed=-1"]),
    (["rounding_seed=-5"], ["rounding_seed=-5"]),
    (["steps=inf"], ["steps=inf", "whole number"]),
    (["steps=nan"], ["steps=nan", "whole number"]),
    (["optim.clip=nan"], ["optim.clip=nan", "null"]),
    (["model.lr=-1"], ["model.lr=-1", "from 1e-12"]),
    (["model.norm_eps=-1"], ["model.norm_eps=-1", "from 0"]),
    (["model.rope_theta=0"], ["model.rope_theta=0", "from 1"]),
    (["model.micro_tokens=0"], ["model.micro_tokens=0", "at least 1"]),
    (["data.source=fils"], ["data.source='fils'", "files"]),
    # pairs of which only one may be given
    (["tokens=1000000", "steps=3"], ["tokens=1000000", "steps=3", "one of them"]),
    (["batch.tokens=1024", "batch.sequences=2"], ["batch.tokens=1024", "batch.sequences=2", "one of them"]),
    # grammar
    (["foo"], ["'foo'", "key=value"]),
    (["model=[a"], ["'model=[a'", "quote"]),
    (["quant=bf16,sr"], ["quant=bf16,sr", "add -m"]),
    (["quant=glob(*)"], ["quant=glob(*)", "list the values, as in quant=a,b,c"]),
    (["hydra.run.dir=x"], ["hydra.run.dir=x", "paths.runs"]),
    (["hydra.foo=1"], ["hydra.foo=1", "no effect"]),
]


@pytest.mark.parametrize(("overrides", "parts"), MISTAKES, ids=lambda value: "|".join(value))
def test_mistake_is_one_error_line_with_a_hint(overrides, parts):
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    message = str(caught.value)
    for part in parts:
        assert part in message
    assert len(message.splitlines()) == 1


def test_numbers_are_typed():
    config = compose(["optim.lr=1e-3", "tokens=3e9", "batch.micro=4", "compile=False", "evaluate.every=null"]).config
    assert (config.optim.lr, config.tokens, config.batch.micro) == (1e-3, 3_000_000_000, 4)
    assert isinstance(config.tokens, int)
    assert (config.compile, config.evaluate.every) == ("false", None)


def test_peak_rate_is_the_presets_unless_given():
    assert compose(["model=llama_100m"]).config.optim.lr is None
    assert compose(["model=llama_100m"]).config.model.lr == pytest.approx(9e-4)


def test_none_gemm_keeps_the_sources():
    quant = compose(
        ["quant=quartet2", "quant.dgrad=none", "quant.wgrad=none", "quant.wgrad.x.source=input"]
    ).config.quant
    assert quant["dgrad"] == {"dy": {"grid": "none", "source": "input"}, "w": {"grid": "none", "source": "fprop"}}
    assert quant["wgrad"]["x"] == {"grid": "none", "source": "input"}
    assert quant["fprop"]["x"]["grid"] == "e2m1"


def test_one_field_of_one_operand():
    quant = compose(
        ["quant=quartet2", "quant.fprop.x.select=absmax", "quant.rules=[{match: 'blocks.0.*', recipe: bf16}]"]
    )
    assert quant.config.quant["fprop"]["x"]["select"] == "absmax"
    assert quant.config.quant["fprop"]["w"]["select"] == "four_over_six"
    assert quant.config.quant["rules"] == [{"match": "blocks.0.*", "recipe": "bf16"}]


def test_choices_name_the_presets():
    choices = compose(["quant=sr", "model=llama_50m"]).choices
    assert (choices["quant"], choices["model"], choices.get("experiment")) == ("sr", "llama_50m", None)


def test_the_composed_text_composes_again():
    composed = compose(["quant=nvidia", "optim.lr=1e-3", "tokens=1e9"])
    assert yaml.safe_load(composed.yaml)["optim"]["lr"] == 1e-3
    assert yaml.safe_load(composed.yaml)["quant"] == composed.config.quant


def test_sweep_is_the_product_in_order():
    jobs = sweep(["model=llama_30m", "quant=bf16,sr", "seed=0,1"])
    assert jobs == [
        ["model=llama_30m", f"quant={quant}", f"seed={seed}"] for quant in ("bf16", "sr") for seed in (0, 1)
    ]


def test_sweep_checks_every_choice():
    with pytest.raises(ConfigError, match="did you mean quartet2"):
        sweep(["quant=bf16,quartet3"])


@pytest.mark.parametrize("override", ["quant=glob(*)", "optim.lr=interval(0,1)"])
def test_sweep_of_what_cannot_be_listed_is_one_error_line(override):
    with pytest.raises(ConfigError, match=r"list the values, as in \w+(\.lr)?=a,b,c"):
        sweep([override])


def test_flags():
    assert read_command_line(["-m", "seed=0,1"]).multirun
    assert "quartet2" in read_command_line(["--help"]).text
    assert "lr: 0.5" in read_command_line(["--cfg", "job", "optim.lr=0.5"]).text
    with pytest.raises(ConfigError, match="did you mean --multirun"):
        read_command_line(["--multrun"])
    for flag, near in (("--dry-run", "dry_run"), ("--steps=3", "steps"), ("--hlep", "--help")):
        with pytest.raises(ConfigError, match=f"unknown flag {flag}; did you mean {near}\\?"):
            read_command_line([flag])
    with pytest.raises(ConfigError, match="--cfg job"):
        read_command_line(["--cfg", "hydra"])
    with pytest.raises(ConfigError, match="leave out --multirun"):
        read_command_line(["--cfg", "job", "-m", "seed=1,2"])


def test_every_group_choice_composes():
    composer = Composer()
    for group, options in groups().items():
        for option in options:
            extra = {"text": ["data.files=x.txt"], "hub": ["data.hub_path=x"]}.get(option, [])
            if group == "experiment" and option in experiments.names():
                extra = [f"cell={next(iter(experiments.expand(experiments.load(option))))}"]
            assert composer.compose([f"{group}={option}", *extra]).choices[group] == option


@pytest.mark.parametrize(
    ("text", "message"), [("fprop: {x: [1\n", r"line 1.*expected"), ("x: *y\n", "undefined alias")]
)
def test_a_mistake_in_yaml_names_the_file(monkeypatch, tmp_path, text, message):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.setattr("launcher.compose.ROOT", tmp_path / "configs")
    monkeypatch.setattr(experiments, "FOLDER", tmp_path / "configs" / "experiment")
    monkeypatch.setattr(recipefile, "FOLDER", tmp_path / "configs" / "quant")
    (tmp_path / "configs" / "quant" / "sr.yaml").write_text(text)
    for read in (lambda: compose(["quant=sr"]), lambda: library.load("sr")):
        with pytest.raises(ValueError, match=rf"sr\.yaml.*{message}|{message}.*sr\.yaml") as caught:
            read()
        assert "\n" not in str(caught.value)
    (tmp_path / "configs" / "experiment" / "c4_grid.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"c4_grid\.yaml"):
        compose(["experiment=c4_grid", "cell=x"])


def test_a_recipe_that_inherits_is_refused_everywhere(monkeypatch, tmp_path):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.setattr("launcher.compose.ROOT", tmp_path / "configs")
    monkeypatch.setattr(recipefile, "FOLDER", tmp_path / "configs" / "quant")
    (tmp_path / "configs" / "quant" / "mine.yaml").write_text(
        "defaults: [tetrajet2, _self_]\nfprop: {w: {grid: none}}\n"
    )
    for read in (lambda: compose(["quant=mine"]), lambda: library.load("mine")):
        with pytest.raises(ValueError, match=r"mine\.yaml: a recipe doesn't inherit; replace defaults=\['tetrajet2'"):
            read()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: sr", "name: mine2", r"mine\.yaml: name='mine2' must be the file's; write name: mine$"),
        ("name: sr", "", r"mine\.yaml: name=None must be the file's; write name: mine$"),
        (
            None,
            "dgrad: none",
            r"mine\.yaml: dgrad=none doesn't say what w is made from; write dgrad: \{dy: \{grid: none",
        ),
    ],
)
def test_a_recipe_file_says_its_own_name_and_sources(monkeypatch, tmp_path, old, new, message):
    """Two files under one name were one recipe to a run's hash; `dgrad: none` was a traceback, or source=input."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.setattr("launcher.compose.ROOT", tmp_path / "configs")
    monkeypatch.setattr(recipefile, "FOLDER", tmp_path / "configs" / "quant")
    text = (ROOT / "configs" / "quant" / "sr.yaml").read_text()
    if old is None:
        text, old = text.replace("name: sr", "name: mine"), text[text.index("dgrad:") : text.index("wgrad:")]
    (tmp_path / "configs" / "quant" / "mine.yaml").write_text(text.replace(old, new + "\n", 1))
    for read in (lambda: compose(["quant=mine"]), lambda: library.load("mine")):
        with pytest.raises(ValueError, match=message):
            read()


def test_an_empty_recipe_file_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(recipefile, "FOLDER", tmp_path)
    (tmp_path / "mine.yaml").touch()
    with pytest.raises(ValueError, match=r"mine\.yaml: got None, need a mapping"):
        library.load("mine")


def test_a_mistake_ends_with_code_2_and_no_traceback():
    done = subprocess.run(
        [sys.executable, "train.py", "optim.lrr=1"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith("train.py: error: unknown key 'optim.lrr'")
    assert len(done.stderr.splitlines()) == 1 and done.stdout == ""


INTERRUPTED = """
import runpy, sys
from launcher import cli
def interrupt(arguments): raise KeyboardInterrupt
cli.read_command_line, sys.argv = interrupt, ["train.py"]
runpy.run_path("train.py", run_name="__main__")
"""


def test_ctrl_c_before_training_is_one_line():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130 and done.stderr.startswith("train.py: interrupted before training began")
    assert len(done.stderr.splitlines()) == 1


def test_optimizers_have_the_published_values():
    """Written out: a default of the schema and a YAML file could drift together."""
    rates = {"lr": None, "embed_lr": 0.3, "head_lr": 0.004, "scalar_lr": 0.5}
    adamw = OptimSection("adamw", betas=[0.9, 0.95], eps=1e-8, weight_decay=0.1, clip=1.0, **rates)
    muon = OptimSection("muon", betas=[0.8, 0.95], eps=1e-10, weight_decay=0.2, clip=None, **rates)
    assert compose([]).config.optim == compose(["optim=adamw"]).config.optim == adamw
    assert compose(["optim=muon"]).config.optim == muon


@pytest.mark.parametrize("word", ["1.10", "2024_11_05", "1e3", "007", "true", "1.50", "0x10", "nan", "inf"])
def test_a_text_field_keeps_the_characters_that_were_typed(word, monkeypatch):
    keys = ("run.name", "data.hub_revision", "data.hub_name", "data.text_key", "logger.wandb.project", "data.id_key")
    words = [f"{key}={word}" for key in keys]
    config = compose([*words, "data=hub", "data.hub_path=x", "logger=wandb", f"quant.name={word}"]).config
    assert [unread.value_at(config, key) for key in keys] == [word] * len(keys) and config.quant["name"] == word
    monkeypatch.setenv("WORD", word)
    assert (
        compose(["run.name=${oc.env:WORD}"]).config.run.name == compose([f"++run.name={word}"]).config.run.name == word
    )
    assert yaml.safe_load(compose([f"run.name={word}"]).yaml)["run"]["name"] == word


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("data.files=[2024_11,x]", ["2024_11", "x"]),
        ("data.files=[ 1.10 , 'a,1e3' ,true]", ["1.10", "a,1e3", "true"]),
        ("data.files=['{a,b}',007]", ["{a,b}", "007"]),
        ("data.val_sets={2024_11: 1e3, web: shards/1.10}", {"2024_11": "1e3", "web": "shards/1.10"}),
        ("data.mix=[2024_11,2024_12]", ["2024_11", "2024_12"]),
        ("data.weights=[0.50,1e-1]", [0.5, 0.1]),
        ("optim.train=[1e3]", ["1e3"]),
        ("optim.betas=[0.90,0.95]", [0.9, 0.95]),
        ("data.files=[]", []),
        ("data.files=null", None),
    ],
)
def test_words_in_lists_and_mappings_of_text_keep_their_characters(line, value):
    (override,) = parse([line])
    assert typed_value(override) == value


def test_a_sweep_over_lists_keeps_the_characters_that_were_typed():
    assert sweep(["data.files=[2024_11,x],[1.10]"]) == [["data.files=[2024_11,x]"], ["data.files=[1.10]"]]
    assert sweep(["seed=choice(1,2)"]) == [["seed=1"], ["seed=2"]]


def test_every_text_field_of_the_schema_keeps_its_characters():
    """All that are declared as text, whatever is added later."""
    assert {"run.name", "paths.runs", "data.tokenizer", "data.bos", "model.name", "quant.name"} <= text_keys()
    assert {"data.files", "data.val_sets", "optim.train"} <= text_keys()
    assert (
        not {"quant", "hooks", "checkpoint.at", "data.weights", "seed", "optim.lr", "evaluate.bf16", "tokens"}
        & text_keys()
    )


def test_null_stays_null_and_a_number_a_number():
    config = compose(["run.name=null", "data.id_key=null", "optim.lr=1e-3"]).config
    assert (config.run.name, config.data.id_key, config.optim.lr) == (None, None, 1e-3)


def test_a_sweep_keeps_the_characters_that_were_typed():
    assert sweep(["run.name=1.10,1.20"]) == [["run.name=1.10"], ["run.name=1.20"]]
    assert sweep(["seed=range(0,2)"]) == [["seed=0"], ["seed=1"]]
    assert sweep(["run.name='a,b',c"]) == [["run.name='a,b'"], ["run.name=c"]]


def test_a_recipe_may_be_called_like_a_number(monkeypatch, tmp_path):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.setattr("launcher.compose.ROOT", tmp_path / "configs")
    text = (ROOT / "configs" / "quant" / "sr.yaml").read_text().replace("name: sr", 'name: "1.10"')
    (tmp_path / "configs" / "quant" / "1.10.yaml").write_text(text)
    assert compose(["quant=1.10"]).choices["quant"] == "1.10"
    (tmp_path / "configs" / "quant" / "1.10.yaml").write_text(text.replace('"1.10"', "1.10"))
    with pytest.raises(ConfigError, match=r'write name: "1.10"'):
        compose(["quant=1.10"])


WITHOUT_EFFECT = [
    (["quant=bf16", "quant.fprop.x.rounding=sr"], "fprop.x is not quantized; set quant.fprop.x.grid"),
    (["quant=quartet2", "quant.dgrad=none", "quant.dgrad.dy.rounding=rtn"], "dgrad.dy is not quantized"),
    (["quant=bf16", "quant.wgrad.rotation.dim=32"], "no operand of wgrad is quantized"),
    (["quant=nvidia", "quant.fprop.rotation.signs=fixed"], "fprop isn't rotated; set quant.fprop.rotation.dim"),
    (["quant=sr", "quant.dgrad.dy.eden_block=rotation"], "set quant.dgrad.dy.rounding=ms_eden"),
    (["quant=quartet2", "quant.fprop=none", "quant.dgrad.w.source=fprop"], "fprop.w is not quantized"),
    (["quant=bf16", "++quant.fprop.x={grid: none, source: input, select: absmax}"], "quant.fprop.x.select=absmax"),
    (["quant=bf16", "rounding_seed=7"], "draws no random bits"),
    (["schedule.warmup_steps=5", "schedule.warmup_fraction=0.2"], "schedule.warmup_steps is given, too"),
    (["schedule.warmup_fraction=0.2", "schedule.warmup_tokens=1e6"], "schedule.warmup_tokens is given, too"),
    (["schedule.warmup_fraction=0.01", "steps=20"], "of 20 steps that is none"),
    (["schedule.warmup_fraction=0.01", "tokens=2e4", "batch.sequences=2"], "of 19 steps that is none"),
    (["evaluate.tokens=4096", "evaluate.every=null"], "set evaluate.final_tokens"),
    (["model.lr=1e-3", "optim.lr=2e-3"], "optim.lr is given, too"),
    (["data=text", "data.files=a.txt", "data.val_files=b.txt", "data.val_fraction=0.1"], "data.val_fraction=0.1"),
    (["data.path=shards", "data.text_key=body"], "data.path names text that is tokenized already"),
    (
        ["data.mix=[a,b]", "data.weights=[0.5,0.5]", "data.text_key=body"],
        "data.mix names text that is tokenized already",
    ),
    (["data.tokenizer=t.json", "data.vocab_size=500"], "the tokenizer is given"),
    (["data.bos=BOS"], "add data.tokenizer="),
    (["data=text", "data.files=a.txt", "data.hub_name=en"], "reads no hub"),
    (["logger.wandb.project=mine"], "set logger=wandb"),
]


@pytest.mark.parametrize(("overrides", "message"), WITHOUT_EFFECT, ids=lambda value: "|".join(value))
def test_a_setting_without_effect_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        compose(overrides)
    assert "has no effect" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["schedule.warmup_steps=5", "schedule.warmup_fraction=null"],
        ["schedule.warmup_fraction=0.1", "steps=20"],
        ["schedule.warmup_fraction=0", "steps=20"],
        ["steps=3"],  # whose warm-up is a preset's
        ["schedule.warmup_fraction=1e-4"],
        ["evaluate.final_tokens=4096", "evaluate.every=null"],
        ["quant=quartet2", "quant.fprop.x.grid=none", "quant.fprop.x.source=input"],
        ["quant=sr", "rounding_seed=7"],
        ["quant=bf16", "rounding_seed=0"],
        ["quant=bf16", "quant.rules=[{match: 'blocks.0.*', recipe: sr}]", "rounding_seed=7"],
        ["data.path=shards", "data.packing=bos_bestfit"],
        ["data.path=shards", "data.val_sets={web: c}"],
        ["data.mix=[a,b]", "data.weights=[0.5,0.5]", "data.val_sets={web: c}", "data.verify=true"],
    ],
    ids=" ".join,
)
def test_a_setting_that_acts_is_taken(overrides):
    compose(overrides)


def test_the_recipes_of_a_grid_share_what_surrounds_them(monkeypatch):
    """Hydra composes once for them; with files that write into the recipe, each time."""
    calls, hydra = [], compose_module.hydra_compose
    monkeypatch.setattr(compose_module, "hydra_compose", lambda *a, **k: calls.append(k["overrides"]) or hydra(*a, **k))
    names = ("bf16", "quartet2", "nvidia", "fp8_te", "ufp4")
    lists = [[f"quant={name}", "model=llama_micro", "seed=3"] for name in names]
    shared = Composer()
    found = [shared.compose([*words, "quant.high_precision.first=1"]) for words in lists if words[0] != "quant=fp8_te"]
    found += [shared.compose(words) for words in lists]
    assert calls == [["model=llama_micro"]]
    shared.compose(["phases=late_bf16", *lists[1]])
    assert len(calls) == 2
    monkeypatch.setattr(compose_module, "lone_recipe", lambda lines: None)
    whole = [Composer().compose(words) for words in lists]
    assert [(one.yaml, one.choices) for one in found[-len(lists) :]] == [(one.yaml, one.choices) for one in whole]
    assert found[1].config.quant == whole[1].config.quant | {"high_precision": {"first": 1}}
