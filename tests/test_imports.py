"""Imports point one way, touch nothing, and our packages are the ones that Python finds."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# package -> (our packages that it may import, third-party packages that it may import at module level); each line only
# names packages of the lines above it.
MAY = {
    "base": (set(), {"yaml"}),
    "configs": (set(), set()),
    "kernels": (set(), {"torch", "triton"}),
    "quant": ({"base", "configs", "kernels"}, {"torch"}),
    "models": ({"base", "kernels"}, {"torch"}),  # kernels.pointwise alone: test_models_know_nothing_of_quantization
    "data": ({"base"}, {"torch", "numpy"}),
    "analysis": ({"base"}, {"numpy", "scipy", "matplotlib"}),
    "training": ({"base", "kernels", "quant", "models", "data"}, {"torch", "numpy", "rich", "safetensors"}),
    "launcher": ({"base", "configs", "quant", "data", "training", "analysis"}, {"hydra", "omegaconf", "yaml"}),
}
OURS = tuple(MAY)


def imports(path: Path, lazy: bool) -> set[str]:
    """Dotted names of what a file imports, `from a import b` as a.b; those inside functions only if `lazy`."""
    names: set[str] = set()
    stack: list[ast.AST] = [ast.parse(path.read_text())]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            stack += node.orelse
        elif lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            stack += list(ast.iter_child_nodes(node))
    return names


def packages(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("package", OURS)
def test_imports_point_one_way(package):
    ours, others = MAY[package]
    for path in sorted((ROOT / package).rglob("*.py")):
        foreign = packages(imports(path, lazy=True)) & set(OURS) - {package}
        assert foreign <= ours, f"{path.relative_to(ROOT)} imports {sorted(foreign - ours)}"
        rest = packages(imports(path, lazy=False)) - set(sys.stdlib_module_names) - set(OURS)
        assert rest <= others, f"{path.relative_to(ROOT)} imports {sorted(rest - others)} at module level"


def test_no_package_may_import_one_below_its_line():
    for number, (package, (ours, _)) in enumerate(MAY.items()):
        assert ours <= set(OURS[:number]), package


def test_no_file_is_reached_from_itself():
    files = {name: path for package in OURS for name, path in modules(package)}
    reached: dict[str, set[str]] = {}
    for name, path in files.items():
        asked = imports(path, lazy=True)
        reached[name] = {word if word in files else word.rpartition(".")[0] for word in asked} & set(files)
    while ends := {name for name, others in reached.items() if not others & set(reached)}:
        reached = {name: others for name, others in reached.items() if name not in ends}
    assert not reached, f"these files import each other in a circle, or one that does: {sorted(reached)}"


def modules(package: str) -> list[tuple[str, Path]]:
    """(dotted name, file) of each module of a package; a folder's __init__.py goes by the folder's name."""
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def test_models_know_nothing_of_quantization():
    """Of kernels they take the memory-bound parts between GEMMs, whose definition is plain PyTorch."""
    for path in (ROOT / "models").rglob("*.py"):
        imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        taken = {f"{node.module}.{name.name}" for node in imports for name in node.names}
        foreign = {name for name in taken if name.startswith("kernels") and not name.startswith("kernels.pointwise")}
        assert not foreign, f"{path.name} imports {sorted(foreign)}"


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
    names = [name for package in OURS for name, _ in modules(package)]
    code = f"""
import importlib, socket, sys
import torch
def refuse(*args, **kwargs):
    raise RuntimeError("network at import")
socket.socket.connect = refuse
for name in {names!r}:
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
        [sys.executable, str(ROOT / "scripts" / "bench" / "bench_step.py"), "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "recipes=bf16,quartet2" in done.stdout and not done.stderr
