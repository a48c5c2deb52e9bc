"""Dockerfile and devcontainer name the versions that pyproject.toml allows and requirements/ci.txt pins.

Nothing here builds an image: that needs Docker and the base images.
"""

import json
import re
import shlex
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PINS = dict(line.split("==") for line in (ROOT / "requirements/ci.txt").read_text().split() if "==" in line)
CI_PYTHON = "3.11"
CUDA = "13.0"  # of the pinned torch's own libraries, as torch 2.13.0 was resolved for Python 3.12


def installs(text: str) -> list[list[str]]:
    """The arguments of every `pip install`."""
    lines = text.replace("\\\n", " ").splitlines()
    parts = [part for line in lines if not line.startswith("#") for part in re.split(r"&&", line)]
    return [shlex.split(part.split("pip install", 1)[1]) for part in parts if "pip install" in part]


def extras_of(arguments: list[str]) -> set[str]:
    lists = [found[1] for word in arguments if (found := re.fullmatch(r"\.\[(.*)\]", word))]
    return {extra for names in lists for extra in names.split(",")}


def test_every_pin_is_allowed_by_the_project():
    asked = [Requirement(text) for texts in (PROJECT["dependencies"], *EXTRAS.values()) for text in texts]
    pinned = {canonicalize_name(name): Version(version) for name, version in PINS.items()}
    checked = [r for r in asked if canonicalize_name(r.name) in pinned]
    assert {"torch", "triton", "hydra-core"} <= {r.name for r in checked}
    for requirement in checked:
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_the_gpu_image_installs_what_is_tested_and_declared():
    text = (ROOT / "Dockerfile").read_text()
    found = installs(text)
    assert set().union(*map(extras_of, found)) == {"gpu", "hub", "wandb", "tensorboard", "slurm", "te"} <= EXTRAS.keys()
    for arguments in found:
        assert arguments[:2] == ["--no-deps", *EXTRAS["cutlass"]] or "-c requirements/ci.txt" in " ".join(arguments)
    assert re.search(r"^FROM nvidia/cuda:([\d.]+)-cudnn-devel-", text, re.M)[1].startswith(CUDA + ".")


def test_the_cpu_container_is_cis_environment():
    box = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())
    assert installs(box["postCreateCommand"]) == [["-c", "requirements/ci.txt", "-e", ".[dev]"]]
    image = (ROOT / ".devcontainer" / box["build"]["dockerfile"]).read_text()
    assert f"FROM python:{CI_PYTHON}-" in image and f"Python {CI_PYTHON}" in (ROOT / "requirements/ci.txt").read_text()
    assert Version(CI_PYTHON) in Requirement(f"x{PROJECT['requires-python']}").specifier


def test_what_the_images_copy_is_not_ignored():
    """`pip install -e .` in the image needs these; `.dockerignore` keeps run folders out."""
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not {"requirements", "README.md", "LICENSE", "pyproject.toml", "configs", "kernels"} & {*ignored}
    assert {"runs", "token_shards", ".git"} <= {*ignored}
