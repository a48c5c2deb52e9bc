"""Export in several files and as packed NVFP4, read back by readers of those formats that know nothing of ours."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from kernels import backend
from kernels import quantize as ops
from kernels.spec import NVFP4_SQUARE_SCALES
from models.llama import permute_for_half_split
from quant import library
from scripts.export_hf import export
from training.inference import load_trained

# By the format's own documentation: OCP's FP4 E2M1, sign in the highest of four bits.
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
# Our layer -> its parts at transformers, with the heads by which q's and k's rows are permuted.
PARTS = {
    "attn.qkv": {"self_attn.q_proj": 2, "self_attn.k_proj": 2, "self_attn.v_proj": None},
    "attn.out": {"self_attn.o_proj": None},
    "mlp.gate_up": {"mlp.gate_proj": None, "mlp.up_proj": None},
    "mlp.down": {"mlp.down_proj": None},
}


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of an export, by its index where it has one."""
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        where = json.loads(index.read_text())["weight_map"]
        files = sorted(set(where.values()))
    found = {}
    for file in files:
        with safe_open(folder / file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                assert not index.exists() or where[name] == file
                found[name] = opened.get_tensor(name)
    return found


def values(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """FP32 levels times block scales of a packed layer, without the tensor's scale."""
    packed, scales = tensors[f"{module}.weight_packed"], tensors[f"{module}.weight_scale"]
    assert packed.dtype == torch.uint8 and scales.dtype == torch.float8_e4m3fn
    nibbles = torch.stack((packed & 15, packed >> 4), -1).flatten(1).long()
    levels = E2M1[nibbles & 7] * torch.where(nibbles > 7, -1.0, 1.0)
    return levels * scales.float().repeat_interleave(16, 1)


@pytest.mark.parametrize("recipe", ["quartet2", "nvidia"])
def test_packed_weights_are_those_of_the_forward(run, tmp_path, recipe):
    _, folder = run(f"quant={recipe}", "quant.rules=[{match: '*.mlp.down', recipe: bf16}]", "steps=1")
    export(folder, tmp_path / "out", None, "nvfp4", 5)
    tensors, model = read_all(tmp_path / "out"), load_trained(folder)[0]
    spec = library.load(recipe).operand("fprop.w").spec
    assert (spec.scales == NVFP4_SQUARE_SCALES) == (recipe == "nvidia")
    for ours, parts in PARTS.items():
        weight = model.get_submodule(f"blocks.0.{ours}").weight.detach().bfloat16()
        names = [f"model.layers.0.{name}" for name in parts]
        if ours == "mlp.down":
            assert torch.equal(tensors[f"{names[0]}.weight"], weight)
            continue
        made = ops.quantize(weight, spec, 1, ops.amax(weight, 1), want=("packed",)).packed
        widths = [tensors[f"{name}.weight_packed"].shape[0] for name in names]
        for name, heads, rows in zip(names, parts.values(), made.values().split(widths), strict=True):
            assert torch.equal(values(tensors, name), permute_for_half_split(rows, heads) if heads else rows)
            assert f"{name}.weight" not in tensors
            inverse = tensors[f"{name}.weight_global_scale"]
            assert inverse.shape == (1,) and abs(inverse.double() * made.global_scale.double() - 1) < 2**-24
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert set(config["ignore"]) == {"lm_head", "model.layers.0.mlp.down_proj"}


def test_the_library_of_the_format_reads_the_same(run, tmp_path):
    library_of_it = pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationConfig

    assert library_of_it
    _, folder = run("quant=nvfp4_rtn", "quant.fprop.w.tensor_scale=pow2", "steps=1")
    export(folder, tmp_path / "out", None, "nvfp4", 5)
    tensors = read_all(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (scheme,) = QuantizationConfig.model_validate(config).config_groups.values()
    for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"):
        module = f"model.layers.0.{name}"
        kinds = ("weight_packed", "weight_scale", "weight_global_scale")
        assert set(kinds) == set(NVFP4PackedCompressor.compression_param_names(scheme))
        state = {kind: tensors[f"{module}.{kind}"] for kind in kinds}
        theirs = NVFP4PackedCompressor.decompress(state, scheme)["weight"]
        mine = values(tensors, module) / state["weight_global_scale"]
        assert torch.equal(theirs, mine.to(theirs.dtype))


def test_recipes_whose_weights_are_no_nvfp4_codes_are_refused_with_the_reason():
    backend.use("reference", "cpu")
    weight, refused = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)), {}
    for name in library.names():
        try:
            packed = library.load(name).nvfp4_weight(weight)
            assert packed is None or packed.tensor_core
        except ValueError as error:
            refused[name] = str(error)
    assert "e4m3" in refused["fp8"] and "1x32 e8m0" in refused["mxfp4"] and "slots" in refused["fp8_te"]
    assert not {"nvfp4_rtn", "sr", "nvidia", "tetrajet2", "quartet2", "quartet2_upstream", "bf16"} & set(refused)
    turned = library.load("nvfp4_rtn").to_dict()
    turned["fprop"] |= {"rotation": {"dim": 16}}
    with pytest.raises(ValueError, match="rotation"):
        library.build(turned).nvfp4_weight(weight)


def test_a_run_without_packed_weights_is_refused_before_a_file_is_written(run, tmp_path):
    _, folder = run("steps=1")
    with pytest.raises(ValueError, match=r"bf16.*--dtype bfloat16"):
        export(folder, tmp_path / "out", None, "nvfp4", 5)
    assert not (tmp_path / "out").exists()
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    export(folder, tmp_path / "one", None, "bfloat16", 5)
    export(folder, tmp_path / "many", None, "bfloat16", 1e-4)
    shards = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    one, many = read_all(tmp_path / "one"), read_all(tmp_path / "many")
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "many", dtype="bfloat16").state_dict()
    assert all(torch.equal(loaded[name], one[name]) for name in one)
