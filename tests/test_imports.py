"""Imports point one way, touch nothing, and our packages are the ones that Python finds."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("analysis", "configs", "data", "kernels", "models", "quant", "training")
# package -> (our packages it may import, third-party packages it may import at module level)
NUMERIC = {"torch", "numpy"}
MAY = {
    "kernels": (set(), {"torch", "triton"}),
    "quant": ({"kernels", "configs"}, {"torch", "yaml"}),  # configs: only the folder of the recipe files
    "models": ({"kernels"}, {"torch"}),  # kernels.pointwise alone: test_models_know_nothing_of_quantization
    "data": (set(), NUMERIC),
    "training": ({"kernels", "quant", "models", "data"}, NUMERIC | {"rich", "safetensors"}),
    "analysis": ({"configs", "data"}, {"numpy", "scipy", "matplotlib"}),  # configs.grid: plain YAML; data.files
    "configs": ({"training", "quant", "data"}, {"hydra", "omegaconf", "yaml"}),
}


def module_level_imports(path: Path) -> set[str]:
    """Top-level names of what a file imports when it is itself imported; imports inside functions are lazy."""
    names: set[str] = set()
    stack: list[ast.AST] = [ast.parse(path.read_text())]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            stack += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            stack += list(ast.iter_child_nodes(node))
    return names


@pytest.mark.parametrize("package", OURS)
def test_imports_point_one_way(package):
    ours, others = MAY[package]
    for path in sorted((ROOT / package).rglob("*.py")):
        foreign = module_level_imports(path) - set(sys.stdlib_module_names) - {package}
        assert foreign & set(OURS) <= ours, f"{path.relative_to(ROOT)} imports {sorted(foreign & set(OURS) - ours)}"
        rest = foreign - set(OURS)
        assert rest <= others, f"{path.relative_to(ROOT)} imports {sorted(rest - others)} at module level"


def test_models_know_nothing_of_quantization():
    """Of kernels they take the memory-bound parts between GEMMs, whose definition is plain PyTorch."""
    for path in (ROOT / "models").rglob("*.py"):
        imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        taken = {f"{node.module}.{name.name}" for node in imports for name in node.names}
        foreign = {name for name in taken if name.startswith("kernels") and not name.startswith("kernels.pointwise")}
        assert not foreign, f"{path.name} imports {sorted(foreign)}"


def test_hydra_stays_at_the_top():
    for package in set(OURS) - {"configs"}:
        for path in (ROOT / package).rglob("*.py"):
            assert "hydra" not in path.read_text().split("import ", 1)[-1].split("\n\n")[0], path
            assert not {"hydra", "omegaconf"} & module_level_imports(path), path


@pytest.mark.parametrize("package", OURS)
def test_packages_come_from_this_repository(package):
    found = Path(importlib.import_module(package).__file__).resolve()
    assert found.is_relative_to(ROOT), (
        f"another package named {package!r} is installed ({found}): pip uninstall {package}"
    )


def test_every_package_has_an_init_file():
    for package in OURS:
        folders = {path.parent for path in (ROOT / package).rglob("*.py")}
        missing = [folder for folder in folders if not (folder / "__init__.py").exists()]
        assert not missing, f"without __init__.py an installed package of the same name wins: {missing}"


def test_transformers_models_still_import_beside_our_kernels():
    """transformers looks for a distribution that provides `kernels` and reads our version: it must stay 0.1.x."""
    pytest.importorskip("transformers")
    code = "import kernels; from transformers import LlamaForCausalLM; print(kernels.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert str(ROOT) in done.stdout


def test_importing_starts_no_gpu_and_needs_no_network_or_environment():
    """Every module of ours, in a process whose sockets raise, whose environment is empty and whose CUDA is watched."""
    modules = []
    for package in OURS:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            modules.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    code = f"""
import importlib, socket, sys
import torch
def refuse(*args, **kwargs):
    raise RuntimeError("network at import")
socket.socket.connect = refuse
for name in {modules!r}:
    try:
        importlib.import_module(name)
    except ImportError as error:
        if error.name in ("triton", "transformer_engine"):
            continue
        raise
assert not torch.cuda.is_initialized()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, env={})
    assert done.returncode == 0, done.stderr


def test_bench_step_tells_its_use_without_a_gpu():
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "bench_step.py"), "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "recipes=bf16,quartet2" in done.stdout and not done.stderr
