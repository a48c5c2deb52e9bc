"""What a person types: each command's name and file, and how a text spells them where this program was started."""

import argparse
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# An installed copy lies among other packages, without the project's own file: there one types `nibble NAME`.
IS_CHECKOUT = (ROOT / "pyproject.toml").is_file()
# In the order of use. The first line of each file's docstring is its description.
COMMANDS = {
    "prepare": "scripts/prepare_data.py",
    "train": "train.py",
    "grid": "scripts/run_grid.py",
    "compare": "scripts/compare.py",
    "noise": "scripts/noise_floor.py",
    "early": "scripts/early.py",
    "score": "scripts/score.py",
    "xray": "scripts/xray.py",
    "capture": "scripts/capture.py",
    "generate": "scripts/generate.py",
    "export": "scripts/export_hf.py",
    "audit": "scripts/quant_audit.py",
    "cost": "scripts/cost.py",
    "price": "scripts/price.py",
    "pareto": "scripts/pareto.py",
    "fit": "scripts/fit_scaling_law.py",
    "errors": "scripts/fit_error_law.py",
    "keep": "scripts/keep_results.py",
}


def spelled(text: str, checkout: bool = IS_CHECKOUT) -> str:
    """`text`, in which commands are `python scripts/compare.py`; `nibble compare` outside a checkout."""
    if checkout:
        return text
    names = {file: name for name, file in COMMANDS.items()}
    files = "|".join(map(re.escape, names))
    text = re.sub(r"(torchrun [^\n]*?)train\.py", r"\1-m train", text)
    return re.sub(rf"(?<![\w/.-])(?:python )?({files})\b", lambda found: f"nibble {names[found[1]]}", text)


def typed(argv: list[str], checkout: bool = IS_CHECKOUT) -> str:
    """The command line to copy, from sys.argv: an installed copy's own path says nothing to a person."""
    name = {str(ROOT / file): name for name, file in COMMANDS.items()}.get(argv[0])
    return shlex.join(argv if checkout or name is None else ["nibble", name, *argv[1:]])


def parser_of(file: str, text: str | None) -> argparse.ArgumentParser:
    """The argument parser of the script in `file`, whose docstring is `text`."""
    path = Path(file).resolve()
    names = {ROOT / place: f"nibble {name}" for name, place in COMMANDS.items()}
    return argparse.ArgumentParser(
        prog=None if IS_CHECKOUT else names.get(path),
        description=spelled(text or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
