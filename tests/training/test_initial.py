"""init.from: a Llama of transformers' is ours, logit by logit, both ways; what can't be is one line before any work."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from launcher.compose import compose
from models.llama import Llama, LlamaConfig
from training.config import ModelSection
from training.export import linear_weights, plain_weights, transformers_config
from training.start.initial import Source, Weights, check_model, described

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
VOCABULARY, LENGTH = 97, 48
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SHAPES = {
    "plain": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 128},
    "grouped": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96},
    "one key head, tied": {
        **{"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 112},
        "tie_word_embeddings": True,
    },
    "llama 3": {
        **{"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256},
        **{"tie_word_embeddings": True, "rms_norm_eps": 1e-5},
        "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 16},
    },
    "odd sizes, other theta": {
        **{"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 80},
        **{"rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 2e4}},
    },
}


def theirs(**sizes) -> torch.nn.Module:
    """A random Llama of transformers', its weights large and its gains away from one, so that nothing hides."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, num_hidden_layers=2, max_position_embeddings=LENGTH, bos_token_id=0, **sizes
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            parameter.copy_(1 + 0.3 * noise if parameter.ndim == 1 else 0.2 * noise)
    return model


def ours(folder: Path) -> Llama:
    source = Source(str(folder))
    sizes = {name: value for name, value in described(source).items() if name != "family"}
    model = Llama(LlamaConfig(**sizes, vocab_size=VOCABULARY, max_seq_len=LENGTH), compute_dtype=torch.float32)
    model.fill(Weights(source, model.config))
    return model


def far(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_those_of_transformers_both_ways(name, tmp_path):
    from safetensors.torch import save_file

    model = theirs(**SHAPES[name])
    model.save_pretrained(tmp_path / "in")
    mine = ours(tmp_path / "in")
    tokens = torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        reference = model(tokens).logits
        assert far(mine(tokens), reference) < 1e-5
    assert (
        mine.config.parameters
        == sum(p.numel() for p in model.parameters())
        == sum(p.numel() for p in mine.parameters())
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text(json.dumps(transformers_config(mine.config, 0)))
    weights = plain_weights(mine) | linear_weights(mine, {})
    save_file(weights, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items() if key in weights)
    with torch.no_grad():
        assert far(back(tokens).logits, reference) < 1e-6


def test_checkpoints_in_several_files_and_in_bf16(tmp_path):
    model = theirs(**SHAPES["grouped"]).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "in", max_shard_size="30KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 1
    exact = {key: value.float() for key, value in model.state_dict().items()}
    read = ours(tmp_path / "in")
    weights = plain_weights(read) | linear_weights(read, {})
    assert weights.keys() == exact.keys() and all(torch.equal(weights[key], exact[key]) for key in exact)


@pytest.mark.parametrize(
    ("preset", "vocabulary", "parameters"),
    [("llama_3p2_1b", 128256, 1_235_814_400), ("tinyllama_1p1b", 32000, 1_100_048_384)],
)
def test_presets_have_the_parameters_of_their_models(preset, vocabulary, parameters):
    section = compose([f"model={preset}"]).config.model
    names = ("layers", "width", "heads", "hidden", "kv_heads", "tied", "rope_llama3", "rope_theta")
    shape = LlamaConfig(**{name: getattr(section, name) for name in names}, vocab_size=vocabulary)
    with torch.device("meta"):
        counted = sum(p.numel() for p in Llama(shape).parameters())
    assert shape.parameters == counted == parameters


@pytest.fixture
def exported(run, tmp_path):
    """A trained run's export: folder with weights and tokenizer."""
    from scripts.export_hf import export

    _, folder = run("quant=bf16", name="first")
    export(folder, tmp_path / "exported", None, "float32", 5)
    return tmp_path / "exported"


NORM = "model.norm.weight"
GROUPED = ["model.kv_heads=1", "model.tied=true", "model.rope_llama3=[8,1,4,32]"]


@pytest.mark.parametrize("words", [[], GROUPED])
def test_training_begins_where_the_checkpoint_was(run, rows, tmp_path, stop_after, words):
    from scripts.export_hf import export

    _, first = run("quant=bf16", *words, name="first")
    export(first, tmp_path / "out", None, "float32", 5)
    begun = [*words, "quant=sr", f"init.from={tmp_path / 'out'}", f"data.tokenizer={tmp_path / 'out'}", "optim.lr=1e-4"]
    begun += ["steps=4", "checkpoint.every=2", "evaluate.every=2"]
    _, straight = run(*begun, name="straight")
    losses = [row["loss"] for row in rows(straight, "train")]
    assert losses[0] == pytest.approx(rows(first, "train")[-1]["loss"], abs=0.3) and losses[0] < 4.5  # ln 300 = 5.7
    with stop_after(3):
        run(*begun, name="stopped")
    _, stopped = run(*begun, name="stopped")
    assert [row["loss"] for row in rows(stopped, "train")] == losses


def test_a_grid_knows_what_its_cells_begin_with(exported, tmp_path):
    from launcher.naming import Numerics, Text

    words = ["model=llama_tiny", f"init.from={exported}", f"paths.data={tmp_path}", "data=text", "data.files=x"]
    flat = Numerics().of(compose(words, typed=False).config, Text(300))
    assert flat["init.from"] == Source(str(exported)).fingerprint(tmp_path)


def test_another_checkpoint_is_another_run(exported, run):
    from safetensors.torch import load_file, save_file

    words = ["steps=1", f"init.from={exported}", f"data.tokenizer={exported}", "evaluate.every=null"]
    run(*words, name="second")
    weights = load_file(exported / "model.safetensors")
    save_file({key: value * 1.5 for key, value in weights.items()}, exported / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"other numerics:\n  init\.from"):
        run(*words, name="second")


def test_a_model_that_is_not_the_checkpoints_is_told_what_to_type(exported, run):
    with pytest.raises(ValueError, match=r"another model.*type model\.") as refused:
        given = [f"init.from={exported}", f"data.tokenizer={exported}"]
        run(*given, "model.hidden=256", "model.kv_heads=1", name="second")
    words = shlex.split(re.search(r"type (model\..*)", str(refused.value))[1])
    assert set(words) == {"model.hidden=128", "model.kv_heads=null"}


def test_every_override_that_is_told_works(tmp_path):
    for name, sizes in SHAPES.items():
        folder = tmp_path / name.replace(" ", "-").replace(",", "")
        theirs(**sizes).save_pretrained(folder)
        with pytest.raises(ValueError, match="another model") as refused:
            check_model(Source(str(folder)), ModelSection())
        words = shlex.split(re.search(r"type (model\..*)", str(refused.value))[1])
        check_model(Source(str(folder)), compose(["model=llama_30m", *words]).config.model)


def test_text_of_another_tokenizer_is_refused_before_it_is_prepared(exported, run, tmp_path):
    with pytest.raises(ValueError, match=r"type data\.tokenizer="):
        run(f"init.from={exported}", name="second")
    path = json.loads((tmp_path / "runs" / "first" / "run.json").read_text())["data_path"]
    with pytest.raises(ValueError, match=r"another tokenizer; type data\.tokenizer="):
        run(f"init.from={exported}", f"data.path={path}", name="second")


def damaged(folder: Path, change) -> Source:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return Source(str(folder))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda w: w.update(extra=torch.ones(1)), "extra has no place in a Llama"),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(3)}),
            r"model\.norm\.weight \[3\]; norm\.weight is \[64\]",
        ),
        (
            lambda w: w.update({"model.layers.1.self_attn.k_proj.weight": torch.ones(64, 64)}),
            r"layers\.1\.self_attn\.k_proj\.weight has 64 rows, needed are 32",
        ),
        (lambda w: w["lm_head.weight"].fill_(float("nan")), r"lm_head\.weight holds values that are not finite"),
    ],
)
def test_a_checkpoint_that_does_not_fit_names_the_tensor_and_the_rule(tmp_path, change, says):
    theirs(**SHAPES["grouped"]).save_pretrained(tmp_path)
    damaged(tmp_path, change)
    with pytest.raises(ValueError, match=says):
        ours(tmp_path)


def test_a_tensor_that_does_not_fit_is_refused_before_a_folder_is_made(exported, run, tmp_path):
    damaged(exported, lambda w: w.update({"model.layers.0.mlp.up_proj.weight": torch.ones(7, 128)}))
    with pytest.raises(ValueError, match=r"up_proj\.weight \[7, 128\]; blocks\.0\.mlp\.gate_up\.weight is"):
        run(f"init.from={exported}", f"data.tokenizer={exported}", name="second")
    assert not (tmp_path / "runs" / "second").exists()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model_type": "qwen2"}, "model_type=qwen2"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"head_dim": 32}, "head_dim=32"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type=yarn"),
    ],
)
def test_a_model_that_we_have_not_is_refused_by_its_rule(tmp_path, fields, says):
    theirs(**SHAPES["plain"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(ValueError, match=f"{says} isn't possible here"):
        described(Source(str(tmp_path)))


def test_folders_that_are_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        Source(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"config\.json can't be read"):
        Source(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"no \*\.safetensors"):
        Source(str(tmp_path))
    with pytest.raises(ValueError, match=r"init\.form: unknown key; init\.from=PATH"):
        compose(["init.form=x"])
