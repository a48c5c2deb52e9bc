import re
from dataclasses import asdict

import pytest

from analysis import published
from launcher import cellline
from launcher import cells as experiments
from launcher.cli import read_command_line
from launcher.compose import Composer, ConfigError, compose, sweep
from quant import library
from training.start.derive import derive
from training.start.shapes import shape_of

PUBLISHED_TOKENS = 749993984, 12 * 10**9 // 262144 * 262144  # the D of published_runs.csv: steps * 262144
WIDTH_30M = 30482560


def small_grid(**changes):
    base = {"base": ["seed=0"], "axes": {"size": {"a": ["model=llama_tiny"], "b": []}, "length": "tokens={tokens}"}}
    return {**base, "cells": [{"size": ["a", "b"], "length": "0.75B"}, {"size": "a", "length": ["1.5M"]}], **changes}


def test_cells_are_products_of_a_block_in_the_order_of_the_file():
    assert experiments.expand(small_grid()) == {
        "a/0.75B": ["seed=0", "model=llama_tiny", "tokens=750000000"],
        "b/0.75B": ["seed=0", "tokens=750000000"],
        "a/1.5M": ["seed=0", "model=llama_tiny", "tokens=1500000"],
    }


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([{"size": "c", "length": "1B"}], "axis size has no value 'c'"),
        ([{"size": "a"}], "needs each of size, length; got size"),
        ([{"size": "a", "length": "much"}], r"axis length: can't read \{tokens\} from 'much'; write 0.75B"),
    ],
)
def test_a_wrong_block_is_named(cells, message):
    with pytest.raises(experiments.CellError, match=message):
        experiments.expand(small_grid(cells=cells))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base:\naxes: {a: {x: []}}\ncells: [{a: x}]", "base: needs a list of overrides"),
        ("base: seed=0\naxes: {a: {x: []}}\ncells: [{a: x}]", "base: needs a list of overrides"),
        ("base: []\naxes: [a]\ncells: [{a: x}]", "axes: needs axes by name"),
        ("base: []\naxes: {a: [x]}\ncells: [{a: x}]", "axis a: needs values by name"),
        ("base: []\naxes: {a: {x: seed=0}}\ncells: [{a: x}]", "axis a, x: needs a list of overrides"),
        ("base: []\naxes: {a: {0: []}}\ncells: [{a: 0}]", "axis a: YAML reads 0 as no text; put"),
        ("base: []\naxes: {a: {on: []}}\ncells: [{a: on}]", "axis a: YAML reads True as no text; put"),
        ("base: []\naxes: {a: {x: []}}\ncells: {a: x}", "cells: needs a list of blocks"),
        ("base: []\naxes: {a: {x: []}}\ncells: []", "cells: needs a list of blocks"),
    ],
)
def test_a_file_of_another_shape_is_named(text, message, tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text(text)
    monkeypatch.setattr(experiments, "FOLDER", tmp_path)
    with pytest.raises(experiments.CellError, match=f"mine.yaml: {message}"):
        cellline.read(["experiment=mine"], {})


@pytest.mark.parametrize("item", ["paths.runs=runs/mine", "++paths.runs=runs/mine", "run.name=mine"])
def test_a_grid_file_moves_no_run(item):
    """cost.py and run_grid.py would look elsewhere, and call finished cells missing."""
    with pytest.raises(experiments.CellError, match=f"cell a/0.75B sets {re.escape(item)}: "):
        experiments.expand(small_grid(base=[item]))


def test_cells_of_one_run_folder_are_refused():
    axes = {"a": {"x-y": [], "x": ["seed=1"]}, "b": {"z": [], "y-z": []}}
    with pytest.raises(experiments.CellError, match="cells x-y/z and x/y-z would be one run folder"):
        experiments.expand(small_grid(axes=axes, cells=[{"a": "x-y", "b": "z"}, {"a": "x", "b": "y-z"}]))


def test_the_scripts_look_where_the_runs_go():
    words = ["experiment=corpus_screen", "only=bf16/s0"]
    assert str(cellline.read([*words, "++paths.runs=b"], {}).runs) == "b"
    with pytest.raises(experiments.CellError, match=r"paths.runs=a and paths.runs=b: one would be without effect"):
        cellline.read([*words, "paths.runs=a", "++paths.runs=b"], {})
    with pytest.raises(experiments.CellError, match=r"run\.name=mine: all cells would be one run"):
        cellline.read([*words, "run.name=mine"], {})


def test_an_override_may_not_make_two_cells_one_run():
    words = ["experiment=corpus_screen", "only=bf16/s[01],sr/s0"]
    with pytest.raises(experiments.CellError, match=r"^\+\+seed=5: cells bf16/s0 and bf16/s1 would be the same run"):
        cellline.read([*words, "++seed=5"], {})
    assert len(cellline.read([*words, "optim.lr=1e-3"], {}).cells) == 3
    one_seed = cellline.read(["experiment=corpus_screen", "only=bf16/s0,sr/s0", "seed=5"], {}).cells
    assert len(one_seed) == 2 and all(cell.endswith("/s0") for cell in one_seed)


def test_equal_cells_of_a_file_are_reruns(tmp_path, monkeypatch):
    cells = {"axes": {"change": {"rerun1": [], "rerun2": []}}, "cells": [{"change": ["rerun1", "rerun2"]}]}
    monkeypatch.setattr(cellline.experiments, "load", lambda name: small_grid(**cells))
    assert len(cellline.read(["experiment=mine", "++seed=5"], {}).cells) == 2


def test_published_grid_has_its_126_cells_and_token_counts():
    cells = experiments.expand(experiments.load("c4_grid"))
    assert len(cells) == 126 and sum(name.startswith("200M/") for name in cells) == 18
    for cell, tokens in zip(("30M/0.75B/quartet2", "30M/12B/bf16"), PUBLISHED_TOKENS, strict=True):
        numbers = derive(compose(cells[cell]).config, WIDTH_30M, world=1)
        assert (numbers.tokens, numbers.tokens_per_step, numbers.seq_len) == (tokens, 262144, 512)


@pytest.mark.parametrize("name", ["c4_grid", "c4_ablations"])
def test_lengths_of_a_model_double_from_a_quarter_of_its_base(name):
    """Base 3B, 5B, 10B and 20B tokens; six lengths, of the largest model three."""
    lengths = {}
    for cell, overrides in experiments.expand(experiments.load(name)).items():
        (tokens,) = (int(item.removeprefix("tokens=")) for item in overrides if item.startswith("tokens="))
        lengths.setdefault(cell.split("/")[0], set()).add(tokens)
    bases = {"30M": (3, 6), "50M": (5, 6), "100M": (10, 6), "200M": (20, 3)}
    assert lengths == {size: {base * 10**9 * 2**i // 4 for i in range(n)} for size, (base, n) in bases.items()}


def test_published_grid_has_the_points_of_the_published_runs():
    sizes = {}
    found = {}
    for cell, overrides in experiments.expand(experiments.load("c4_grid")).items():
        given = dict(item.split("=", 1) for item in overrides)
        model = given["model"]
        if model not in sizes:
            sizes[model] = shape_of(compose([f"model={model}"]).config, 32000).parameters_non_embedding
        step = int(given["batch.sequences"]) * int(given["batch.seq_len"])
        point = sizes[model], int(given["tokens"]) // step * step
        found.setdefault(cell.split("/")[2], set()).add(point)
    runs = published.load()
    assert found == {recipe: set(runs[recipe]) for recipe in ("bf16", *published.MAIN)}


def test_corpus_grids_have_the_lengths_of_the_protocol():
    screen = compose(["experiment=corpus_screen", "cell=sr/s3"]).config
    numbers = derive(screen, WIDTH_30M, world=1)
    assert (numbers.steps, numbers.tokens_per_step, numbers.schedule.lr_peak, screen.seed) == (3052, 65536, 6e-4, 3)
    ranking = compose(["experiment=corpus_ranking", "cell=bf16/x2/s0"]).config
    numbers = derive(ranking, WIDTH_30M, world=1)
    assert (numbers.steps, numbers.tokens_per_step, numbers.schedule.lr_peak) == (2861, 262144, 2.4e-3)


def test_short_grid_has_whole_seeds_before_the_next_and_fresh_text():
    cells = list(experiments.expand(experiments.load("corpus_short")))
    recipes = ["bf16", "quartet2", "nvidia", "tetrajet2"]
    assert cells[:12] == [f"32k/s{seed}/{recipe}" for seed in range(3) for recipe in recipes]
    for batch, tokens, rows in (("32k", 45_875_200, 26922), ("64k", 91_750_400, 53555)):
        config = compose(["experiment=corpus_short", f"cell={batch}/s0_rounding/quartet2"]).config
        numbers = derive(config, WIDTH_30M, world=1)
        assert (numbers.steps, numbers.tokens, numbers.schedule.lr_peak) == (1400, tokens, 6e-4)
        assert (config.seed, config.rounding_seed, config.data.max_documents) == (0, 1001, rows)


def test_every_recipe_of_every_grid_builds():
    seen, composer = set(), Composer()
    for name in experiments.names():
        for cell, overrides in experiments.expand(experiments.load(name)).items():
            recipe = tuple(item for item in overrides if item.startswith("quant"))
            if recipe not in seen:
                built = library.build(composer.compose(list(recipe)).config.quant)
                assert built.is_quantized == ("quant=bf16" not in recipe), cell
            seen.add(recipe)
    assert len(seen) > 20


@pytest.mark.parametrize("name", experiments.names())
def test_no_two_cells_of_a_grid_are_one_run_but_for_reruns(name):
    runs = {}
    for cell, overrides in experiments.expand(experiments.load(name)).items():
        if "rerun" not in cell:
            given = dict(item.split("=", 1) for item in overrides if not item.startswith("quant.name="))
            assert runs.setdefault(frozenset(given.items()), cell) == cell  # the first cell with these overrides


@pytest.mark.parametrize("name", experiments.names())
def test_one_cell_of_each_kind_composes(name):
    cells = experiments.expand(experiments.load(name))
    kinds = {cell.split("/")[0]: cell for cell in cells}  # the last cell of each first part
    for cell in list(kinds.values())[:4]:
        composed = compose([f"experiment={name}", f"cell={cell}"])
        assert composed.config.run.name == f"{name}-{cell.replace('/', '-')}"
        assert composed.config.steps or composed.config.tokens


def test_noise_cells_share_the_numerics_of_the_grids_but_for_the_nudge():
    def flat(*words):
        return dict(walk(asdict(compose(list(words)).config), ""))

    def walk(value, prefix):
        for key, item in value.items():
            yield from walk(item, f"{prefix}{key}.") if isinstance(item, dict) else [(prefix + key, item)]

    for length, base in (("screen", "cell=quartet2/s0"), ("ranking", "cell=quartet2/x1/s0")):
        reference = flat(f"experiment=corpus_{length}", base)
        for change, expected in (("rerun", {}), ("rounding1", {"rounding_seed": 1001}), ("nudge1", {"perturb": 1e-6})):
            other = flat("experiment=corpus_noise", f"cell={length}/quartet2/{change}")
            differing = {key: other[key] for key in other if other[key] != reference[key] and key != "run.name"}
            assert differing == expected


def test_nanochat_grid_has_the_published_lengths_and_optimizer():
    config = compose(["experiment=nanochat", "cell=1.9B/quartet2/s0"]).config
    numbers = derive(config, 0, world=8)
    assert (numbers.steps, numbers.tokens_per_step, numbers.seq_len, numbers.micro) == (71680, 524288, 2048, 8)
    assert (config.optim.name, config.optim.clip, numbers.schedule.lr_peak) == ("muon", None, 0.02)
    assert (numbers.schedule.warmup_steps, numbers.schedule.decay_steps) == (0, 28672)  # the last 40 %
    small = derive(compose(["experiment=nanochat", "cell=560M/bf16/s0"]).config, 0, world=8)
    assert (small.steps, small.tokens_per_step, small.micro) == (21400, 524288, 32)


def test_forward_only_cells_reuse_the_quantized_operands_and_backward_only_ones_the_exact():
    def recipe(cell):
        return library.build(compose(["experiment=c4_ablations", f"cell=30M/0.75B/{cell}"]).config.quant)

    forward, backward = recipe("forward_16x16"), recipe("backward_eden")
    assert not forward.dgrad.is_quantized and not forward.wgrad.is_quantized
    assert forward.operand("wgrad.x").source == "fprop" and forward.operand("dgrad.w").source == "fprop_transposed"
    assert not backward.fprop.is_quantized and backward.operand("dgrad.dy").spec.rounding == "ms_eden"


def test_a_scale_override_of_92_percent_is_in_both_operands_of_the_forward():
    recipe = library.build(compose(["experiment=c4_ablations", "cell=30M/3B/forward_1x16_override92"]).config.quant)
    targets = [recipe.operand(slot).spec.target_max for slot in ("fprop.x", "fprop.w")]
    assert targets == pytest.approx([6 / 0.92] * 2, rel=1e-8)


def test_run_names_follow_the_cell_and_other_numerics_get_another_name():
    def name(*extra):
        return compose(["experiment=corpus_screen", "cell=bf16/s0", *extra]).config.run.name

    assert name() == name("paths.runs=/scratch", "compile=false", "data.files=a.jsonl") == "corpus_screen-bf16-s0"
    assert name("optim.lr=1e-3") != name() != name("optim.lr=2e-3") and name("optim.lr=1e-3").startswith(name() + "-")
    assert name("run.name=mine") == "mine"


def named(*extra, cell="bf16/s0"):
    return compose(["experiment=corpus_screen", f"cell={cell}", *extra]).config.run.name


def test_spelling_and_order_of_extra_words_leave_the_run_its_name():
    one, other = ["optim.lr=1e-3", "batch.micro=4"], ["batch.micro=4", "++paths.runs=/x", "++optim.lr=0.001"]
    assert named(*one) == named(*other) != named()
    assert named("+log.every=3") == named("optim.lr=0.0006") == named("batch.sequences=128") == named()
    assert named("steps=null", "tokens=200015872") == named()  # the same number of steps
    assert named("quant.fprop.x.select=absmax", cell="sr/s0") == named(cell="sr/s0")


def test_a_files_place_leaves_the_run_its_name_and_a_tokenizers_contents_decide(tmp_path):
    for place, text in (("a", "{}"), ("b", "{ }"), ("c", '{"x": 1}')):
        (tmp_path / place).mkdir()
        (tmp_path / place / "tokenizer.json").write_text(text)
    a, b, c = (named(f"data.tokenizer={tmp_path}/{place}") for place in "abc")
    assert a == b != c and named() not in (a, c)
    assert named("data=text", "data.files=x.txt", "data.val_files=y.txt") == named("data.path=/shards") == named()
    assert (
        named("data=text", "data.mix=[/a,/b]", "data.weights=[.5,.5]") == named("data.val_sets={other: /c}") == named()
    )
    assert named("data.max_documents=7") != named()


def test_cells_are_composed_with_their_base(tmp_path, monkeypatch):
    """Alone, the base of a cell would be no configuration: it names no text, which is the command's."""
    text = "base: [data=text, model=llama_tiny, steps=3]\naxes: {seed: 'seed={integer}'}\ncells: [{seed: [s0, s1]}]"
    (tmp_path / "mine.yaml").write_text(text)
    monkeypatch.setattr(experiments, "FOLDER", tmp_path)
    line = cellline.read(["experiment=mine", "data.files=x.txt"], {})
    assert [composed.config.data.files for composed in line.cells.values()] == ["x.txt", "x.txt"]
    with pytest.raises(ConfigError, match=r"cell s0: data.files is empty"):
        cellline.read(["experiment=mine"], {})


@pytest.mark.parametrize(
    "words",
    [
        ["experiment=corpus_screen", "cell=bf16/s0", "cell=bf16/s1"],
        ["quant=bf16", "quant=sr"],
        ["seed=1", "++seed=2"],
        ["launcher=slurm", "slurm.nodes=1", "slurm.nodes=2"],
        ["experiment=corpus_screen", "experiment=corpus_noise", "cell=bf16/s0"],
    ],
    ids=" ".join,
)
def test_a_key_given_twice_is_refused(words):
    with pytest.raises(ConfigError, match="one would be without effect; give one of them"):
        read_command_line(words)
    assert experiments.layered(["a=1", "b=2"], ["+a=3"], ["c"]) == ["b=2", "+a=3", "c"]


def test_a_broken_grid_file_stops_only_what_asks_for_it(tmp_path, monkeypatch):
    (tmp_path / "broken.yaml").write_text("cells: [1\n")
    (tmp_path / "mine.yaml").write_text("base: []\naxes: {a: {x: []}}\ncells: [{a: x}]")
    monkeypatch.setattr(experiments, "FOLDER", tmp_path)
    assert experiments.names() == ["mine"] and experiments.resolve(["seed=1"]).overrides == ["seed=1"]
    with pytest.raises(experiments.CellError, match=r"broken\.yaml"):
        experiments.resolve(["experiment=broken", "cell=x"])


def test_the_command_line_knows_cells():
    composed = compose(["experiment=corpus_screen", "cell=quartet2/s1", "seed=7"])
    assert composed.config.seed == 7 and composed.choices["cell"] == "quartet2/s1"
    assert composed.choices["experiment"] == "corpus_screen" and composed.choices["quant"] == "quartet2"
    jobs = sweep(["experiment=corpus_screen", "cell=bf16/s0,bf16/s1"])
    assert [job[1] for job in jobs] == ["cell=bf16/s0", "cell=bf16/s1"]
    for overrides, message in (
        (["experiment=corpus_screen", "cell=quartet/s1"], "has no cell quartet/s1; for example cell=quartet2/s1"),
        (["experiment=corpus_screen"], "is a grid and needs a cell"),
        (["experiment=c4_gird", "cell=x"], "did you mean c4_grid"),
        (["cell=x"], "needs experiment=<grid>"),
    ):
        with pytest.raises(ConfigError, match=message):
            compose(overrides)
