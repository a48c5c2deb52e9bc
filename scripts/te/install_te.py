"""Unpack a Transformer Engine bundle on an offline GPU machine, build its PyTorch extension if needed, check it.

    python scripts/te/install_te.py BUNDLE SITE [--keep-wheel DIR]
    export PYTHONPATH=SITE

BUNDLE comes from scripts/te/carry_te.py. The extension is compiled from its sdist unless BUNDLE/wheels already holds a
wheel of it for this torch and Python: about 95 s on 16 cores. `--keep-wheel` stores the built wheel (1.7 MB); put it
into BUNDLE/wheels and the next machine skips the build. Nothing is installed into the machine's own Python.

The build needs g++, a CUDA toolkit (for crt/*.h), ninja, pybind11, setuptools, wheel, and PyTorch with the nvidia-*
wheels beside it. The check runs te.Linear forward and backward under each FP8 recipe that nibble offers.
"""

import argparse
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from base.terminal import one_line_on_ctrl_c

if __name__ == "__main__":
    one_line_on_ctrl_c("install_te")

LIBRARY = "transformer_engine/wheel_lib/libtransformer_engine.so"

# Largest relative error (Frobenius) of Y, dX, dW against FP32 on Gaussian operands. An E4M3 operand with one scale
# per tensor has relative MSE 0.7e-3 (error 0.027), E5M2 2.8e-3 (0.053): two E4M3 operands give 0.037, E5M2 with E4M3
# 0.059. Twice the larger.
LARGEST_ERROR = 0.12

CHECK = """
import torch
import transformer_engine.pytorch as te
from transformer_engine.common import recipe

recipes = {"current": recipe.Float8CurrentScaling(), "delayed": recipe.DelayedScaling(),
           "block": recipe.Float8BlockScaling()}
torch.manual_seed(0)
for name, chosen in recipes.items():
    layer = te.Linear(512, 768, bias=False, params_dtype=torch.bfloat16, device="cuda")
    x = torch.randn(1024, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(1024, 768, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):  # delayed scaling has no history before the first pass
        x.grad = layer.weight.grad = None
        with te.autocast(enabled=True, recipe=chosen):
            y = layer(x)
        y.backward(dy)
    x32, w32, dy32 = x.detach().float(), layer.weight.detach().float(), dy.float()
    pairs = {"y": (y, x32 @ w32.T), "dx": (x.grad, dy32 @ w32), "dw": (layer.weight.grad, dy32.T @ x32)}
    errors = {k: float((a.float() - b).norm() / b.norm()) for k, (a, b) in pairs.items()}
    print("te.Linear", name, {k: round(v, 4) for k, v in errors.items()}, flush=True)
    assert all(1e-3 < v < LARGEST_ERROR for v in errors.values()), "not FP8, or wrong"
"""


def unpack(bundle: Path, site: Path) -> None:
    """Write the Python tree, the CUDA library and the wheels of `bundle` into `site`."""
    site.mkdir(parents=True, exist_ok=True)
    with tarfile.open(bundle / "tree.tar.xz") as tar:
        tar.extractall(site, filter="data")
    library = site / LIBRARY
    library.parent.mkdir(exist_ok=True)
    with lzma.open(bundle / f"{library.name}.xz") as packed, library.open("wb") as plain:
        shutil.copyfileobj(packed, plain, 1 << 24)
    for wheel in sorted((bundle / "wheels").glob("*.whl")):
        unpack_wheel(wheel, site)


def unpack_wheel(wheel: Path, site: Path) -> None:
    """Unzip over `site`: `pip install --target` would refuse to merge two wheels into one transformer_engine folder."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)


def cuda_include() -> Path:
    """The CUDA toolkit's include folder. Raises SystemExit where no toolkit is found."""
    nvcc = shutil.which("nvcc")
    roots = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    for root in roots:
        if root and (Path(root) / "include" / "crt" / "host_config.h").is_file():
            return Path(root) / "include"
    raise SystemExit(f"no CUDA toolkit with include/crt in {roots}; set CUDA_HOME to one")


def nvidia_includes() -> list[Path]:
    """Include folders of the nvidia-* wheels beside PyTorch (cuDNN, NCCL, cuBLAS, ...)."""
    import nvidia

    return [folder for root in nvidia.__path__ for folder in sorted(Path(root).glob("*/include"))]


def build(bundle: Path, target: Path) -> Path:
    """Compile the PyTorch extension into a wheel in `target` and return its path."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        (sdist,) = (bundle / "build").glob("transformer_engine_torch-*.tar.gz")
        for archive in (sdist, bundle / "build" / "cudnn_frontend.tar.xz"):
            with tarfile.open(archive) as tar:
                tar.extractall(scratch, filter="data")
        # The nvidia wheels first: the toolkit only adds what they lack (crt/), and its cuBLAS may differ from torch's.
        includes = [*nvidia_includes(), scratch / "include", cuda_include()]
        # ninja of this Python's environment; without it the build is serial, a quarter of an hour.
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        if not shutil.which("ninja", path=path):
            raise SystemExit("ninja is missing; pip install ninja")
        environment = os.environ | {
            "PATH": path,
            "NVTE_FRAMEWORK": "pytorch",
            "NVTE_PYTORCH_FORCE_BUILD": "TRUE",
            "NVTE_BUILD_USE_NVIDIA_WHEELS": "1",
            "MAX_JOBS": os.environ.get("MAX_JOBS", str(os.cpu_count())),
            "CPATH": ":".join(str(path) for path in includes),
        }
        source = scratch / sdist.name.removesuffix(".tar.gz")
        command = [sys.executable, "-m", "pip", "wheel", ".", "--no-build-isolation", "--no-deps", "--no-index"]
        log = target / "build.log"
        with log.open("w") as output:
            done = subprocess.run(
                [*command, "-v", "-w", str(target)], cwd=source, env=environment, stdout=output, stderr=output
            )
        if done.returncode:
            raise SystemExit("\n".join(log.read_text().splitlines()[-60:]) + f"\nbuild failed; whole log: {log}")
    (wheel,) = target.glob("transformer_engine_torch-*.whl")
    return wheel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("site", type=Path, help="folder to unpack to; put it on PYTHONPATH")
    parser.add_argument("--keep-wheel", type=Path, help="folder to store a newly built extension wheel in")
    args = parser.parse_args()

    start = time.perf_counter()
    unpack(args.bundle, args.site)
    print(f"unpacked to {args.site} in {time.perf_counter() - start:.0f} s", flush=True)
    if not list((args.bundle / "wheels").glob("transformer_engine_torch-*.whl")):
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as name:
            wheel = build(args.bundle, Path(name))
            print(f"built {wheel.name} in {time.perf_counter() - start:.0f} s", flush=True)
            unpack_wheel(wheel, args.site)
            if args.keep_wheel:
                shutil.copy(wheel, args.keep_wheel)

    environment = os.environ | {"PYTHONPATH": f"{args.site}:{os.environ.get('PYTHONPATH', '')}"}
    code = CHECK.replace("LARGEST_ERROR", str(LARGEST_ERROR))
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


if __name__ == "__main__":
    main()
