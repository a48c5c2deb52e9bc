"""What the numerics hash covers and what it leaves out, key by key; the names of grid cells follow it."""

import json
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from base.tree import flatten
from launcher.compose import Composer
from launcher.naming import HARMLESS
from training.config import TrainConfig
from training.ranks.distributed import Dist
from training.records.identity import IdentityError, hash_of, refuse_other
from training.start.describe import Request, describe

compose = Composer().compose  # the files of configs/ are read once
BASE = ["model=llama_tiny", "quant=quartet2", "batch.sequences=8", "batch.micro=4", "batch.seq_len=128", "steps=40"]
CHANGES_NUMBERS = [
    "seed=1",
    "rounding_seed=7",
    "perturb=1e-6",
    "model.layers=2",
    "model.width=128",
    "model.heads=1",
    "model.hidden=256",
    "model.norm_eps=1e-6",
    "model.rope_theta=2e4",
    "model.residual_dtype=bfloat16",
    "model.kv_heads=1",
    "model.tied=true",
    "model.rope_llama3=[8,1,4,32]",
    "quant=sr",
    "quant.dgrad=none",
    "quant.fprop.x.select=absmax",
    "quant.wgrad.rotation.dim=64",
    "quant.high_precision.last=1",
    "quant.rules=[{match: 'blocks.0.*', recipe: bf16}]",
    "data.vocab_size=3000",
    "data.packing=bos_bestfit",
    "hooks.ema.decay=0.9",
    "optim.lr=1e-3",
    "optim.weight_decay=0.2",
    "optim.betas=[0.9,0.99]",
    "optim.eps=1e-7",
    "optim.clip=null",
    "schedule=wsd",
    "schedule.warmup_steps=3",
    "schedule.end_factor=0",
    "schedule=linear",
    "schedule=constant",
    "optim.train=['embed*']",
    "quant.phases=[{from: .5, set: {fprop: none}}]",
    "steps=41",
    "batch.sequences=16",
    "batch.micro=8",
    "batch.seq_len=256",
    "batch.document_mask=true",
]
CHANGES_NOTHING = [
    "run.name=other",
    "paths.runs=elsewhere",
    "log.every=1",
    "evaluate.every=7",
    "evaluate.bf16=true",
    "probes.bf16={}",
    "checkpoint.every=3",
    "checkpoint.keep_last=5",
    "cuda_graphs=false",
    "dry_run=true",
    "backend=reference",
    "compile=true",
    "parallel=ddp",
    "recompute=true",
    "watchdog_s=60",
    "nonfinite=skip",
    "deterministic=false",
    "logger=tensorboard",
    "profile.steps=[1,2]",
    "model.lr=1.2e-3",
    "model.micro_tokens=512",
]


MUON = ["model.family=nanochat", "model.heads=1", "optim=muon", "schedule=wsd"]


def hash_with(*overrides: str, world: int = 1) -> str:
    composed = compose([*BASE, *overrides], typed=False)
    request = Request(composed.config, composed.yaml, composed.choices, "test")
    return describe(request, Dist(0, world, 0, torch.device("cpu")), tokens=None).run["hash"]


@pytest.fixture(scope="module")
def base_hash():
    return hash_with()


@pytest.mark.parametrize("override", CHANGES_NUMBERS)
def test_hash_covers(base_hash, override):
    assert hash_with(override) != base_hash


@pytest.mark.parametrize(
    "override",
    [
        "optim.embed_lr=0.1",
        "optim.head_lr=0.1",
        "optim.scalar_lr=0.1",
        "schedule.decay_fraction=0.2",
        "schedule.decay_shape=sqrt",
    ],
)
def test_hash_covers_what_muon_and_wsd_alone_read(override):
    assert hash_with(*MUON, override) != hash_with(*MUON)


@pytest.mark.parametrize("override", CHANGES_NOTHING)
def test_hash_leaves_out(base_hash, override):
    assert hash_with(override) == base_hash


def cell_name(override):
    return compose(["experiment=corpus_screen", "cell=quartet2/s0", override]).config.run.name


@pytest.mark.parametrize("override", [item for item in CHANGES_NOTHING if not item.startswith(("model.", "run.name="))])
def test_a_cell_keeps_its_name_where_the_hash_stays(override):
    """Else what an error says to add, such as nonfinite=skip, would start another run from step 0."""
    assert cell_name(override) == "corpus_screen-quartet2-s0"


@pytest.mark.parametrize("override", [item for item in CHANGES_NUMBERS if not item.startswith("model.width=")])
def test_a_cell_gets_another_name_where_the_hash_moves(override):
    assert cell_name(override) != "corpus_screen-quartet2-s0"


@pytest.mark.parametrize("key", [f.name for f in fields(TrainConfig) if f.name not in ("tokens", "fork", "init")])
def test_every_key_either_moves_the_hash_or_leaves_a_cell_its_name(key):
    """`tokens` is another way to write steps, `fork` needs a run (test_phases.py), `init` a checkpoint
    (test_initial.py). A key that is in neither list
    is new: decide which it is."""
    begins = (f"{key}=", f"{key}.")
    moves = any(item.startswith(begins) for item in CHANGES_NUMBERS)
    assert moves or (key in HARMLESS and any(item.startswith(begins) for item in CHANGES_NOTHING))


def test_hash_knows_which_layers_an_exception_covers():
    first, second = (hash_with(f"quant.rules=[{{match: 'blocks.{i}.*', recipe: bf16}}]") for i in (0, 1))
    assert first != second


def test_hash_leaves_out_the_number_of_ranks(base_hash):
    assert hash_with(world=2) == base_hash


def test_ways_to_write_the_same_numbers_are_the_same_run(base_hash):
    assert hash_with("tokens=40960", "steps=null") == base_hash
    assert hash_with("batch.tokens=1024", "batch.sequences=null") == base_hash
    assert hash_with("optim.lr=1.2e-3") == base_hash
    assert hash_with("quant.name=mine") == base_hash
    assert hash_with("seed=3", "rounding_seed=3") == hash_with("seed=3") != base_hash
    off = hash_with("quant=quartet2", "quant.dgrad=none")
    assert hash_with("quant=quartet2", "quant.dgrad.dy.grid=none", "quant.dgrad.w.grid=none") == off != base_hash


def test_flatten():
    assert flatten({"a": {"b": 1, "c": [2, 3]}, "d": None}) == {"a.b": 1, "a.c": [2, 3], "d": None}


def test_refusal_lists_old_and_new_values_and_shortens_long_lists():
    old = {"numerics": {f"key{i:02}": 0 for i in range(20)} | {"gone": 1}}
    new = {"numerics": {f"key{i:02}": 1 for i in range(20)} | {"come": 2}}
    with pytest.raises(IdentityError) as caught:
        refuse_other(old, new, "runs/a", "a")
    lines = str(caught.value).splitlines()
    assert lines[0] == "runs/a holds a run with other numerics:"
    assert lines[1] == "  come: - (stored) -> 2 (now)" and lines[2] == "  gone: 1 (stored) -> - (now)"
    assert lines[3] == "  key00: 0 (stored) -> 1 (now)" and lines[13] == "  and 10 more"
    assert "runs/a/config.yaml" in lines[14] and "run.name=a-2" in lines[14]


KEPT = sorted((Path(__file__).parents[2] / "results").glob("corpus_*/*/run.json"))


@pytest.mark.parametrize("path", KEPT, ids=lambda path: f"{path.parts[-3]}/{path.parts[-2]}")
def test_a_kept_run_has_the_hash_that_its_command_has_today(path):
    """A later field of recipe or configuration must be left out where it isn't used, or no older run can be resumed."""
    kept = json.loads(path.read_text())
    words, lineage = words_of_kept(kept), kept.get("parent")
    composed = compose(words)
    request = Request(composed.config, composed.yaml, composed.choices, kept["command"])
    today = describe(request, Dist(0, 1, 0, torch.device("cpu")), tokens=None).run["numerics"]
    today |= {"fork.parent": lineage["hash"], "fork.step": lineage["step"]} if lineage else {}
    data = {key: value for key, value in kept["numerics"].items() if key.startswith("data.")}
    assert today | data == kept["numerics"]
    assert hash_of(today | data) == kept["hash"]


def words_of_kept(kept: dict) -> list[str]:
    """The overrides of a cell, a fork's without its `fork`; of a fork that was typed its parent's, then what was."""
    if kept.get("cell"):
        return [f"experiment={kept['experiment']}", f"cell={kept['cell']}", "fork=null"]
    (parent,) = (json.loads(path.read_text()) for path in KEPT if path.parent.name == kept["parent"]["name"])
    typed = [word for word in shlex.split(kept["command"])[1:] if word.startswith("quant.")]
    return [*words_of_kept(parent), *typed]
