"""Read every command out of README, CONTRIBUTING and docs, check its words, and run those that take seconds.

    python scripts/check/docs_commands.py            # check, then run: some minutes on two cores
    python scripts/check/docs_commands.py --check    # words only: files, flags, make targets, overrides; seconds

Commands run in a temporary folder that holds links to this checkout, three small texts and one small run, under the
names that the pages use. What trains runs with dry_run=true. What needs a GPU, a cluster or minutes is checked only.
"""

import argparse
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from base.terminal import one_line_on_ctrl_c, quiet_pipes

if __name__ == "__main__":
    one_line_on_ctrl_c("docs_commands")

from base.commands import COMMANDS, ROOT
from launcher import cellline
from launcher.cli import read_command_line, take_launcher
from launcher.compose import Composer, sweep

PAGES = ("README.md", "CONTRIBUTING.md", "docs/**/*.md", "results/README.md", "results/law/README.md")
PROGRAM = re.compile(r"(python|make|torchrun|pip|nibble|scripts/\S+\.py) ")
BLOCK = re.compile(r"^```(?:\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# What a page writes for a person's own, and what is tried in its place.
TEXT = "data=text data.files=corpus/train-0.jsonl data.val_files=corpus/val.jsonl data.vocab_size=300"
PLACES = {
    r"RECIPE/RATE/s0": "bf16/x2/s0",
    r"fork=(runs/)?(NAME@STEP|trunk@\d+)": "fork=small@2",
    r"NAME\b": "small",
    r"data=text \.\.\.": TEXT,
    r"data.vocab_size=\d+": "data.vocab_size=300",
    r" \.\.\.": "",
    r"--help KEY": "--help optim",
    r"\./mine\.yaml": "configs/quant/quartet2.yaml",
    r"\bmine\b": "quartet2",
    r"data.files=FILES": "data.files=corpus/train-0.jsonl data.val_files=corpus/val.jsonl",
}
MIXED = "-..."  # token folders, whose names end in a key
MEASURED = ("runs/*", "runs/llama_30m-*", "runs/nanochat_1b9-*", "results/small/*")  # globs, read from kept runs
KEPT = "results/corpus_ranking/*"
RUN = "model=llama_tiny model.layers=1 batch.seq_len=64 batch.sequences=4 steps=4 evaluate.tokens=256 run.name=small"
RUN += " checkpoint.every=2"
WORDS = "the quick brown fox jumps over the lazy dog and runs away from every hound it meets"
QUICK = {"prepare", "compare", "noise", "cost", "price", "generate", "export"}
TOO_LONG = {"experiment=nanochat": "prepares 38B tokens", "only='1.9B*' launcher": "needs a cluster"}


@dataclass(frozen=True)
class Command:
    page: str
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)


def commands() -> Iterator[Command]:
    """Lines of code blocks and pieces of prose that begin with a program of ours, in the order of the pages."""
    for page in sorted(path for pattern in PAGES for path in ROOT.glob(pattern)):
        text = page.read_text(encoding="utf-8")
        lines = [line for block in BLOCK.findall(text) for line in block.replace("\\\n", " ").splitlines()]
        prose = [" ".join(piece.split()) for piece in re.findall(r"`([^`]+)`", BLOCK.sub("", text))]
        for line in [*lines, *prose]:
            if PROGRAM.match(line):
                yield Command(page.relative_to(ROOT).as_posix(), line)


def placed(text: str) -> str:
    """The command with something of ours where it says what a person has."""
    for pattern, ours in PLACES.items():
        text = re.sub(pattern, ours, text)
    return text


def problem(command: Command) -> str | None:
    """What is wrong with a command's words, None for nothing. Runs nothing."""
    words = shlex.split(placed(command.text), comments=True)
    if words[0] == "make":
        return _problem_of_make(words[1:])
    if words[0] == "pip":
        return _problem_of_extras(words)
    if words[0] == "nibble":
        name = command.words[1]
        return None if name in (*COMMANDS, "NAME", "--help") else f"no command {name}"
    if words[:2] == ["python", "-m"]:
        return _problem_of_module(words[2], words[3:])
    script = next((word for word in words if word.endswith(".py")), None)
    if script is None or not (ROOT / script).is_file():
        return f"no file {script}"
    return _problem_of_words(script, words[words.index(script) + 1 :])


def _problem_of_make(words: list[str]) -> str | None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return None if words[0] in targets else f"no make target {words[0]}"


def _problem_of_extras(words: list[str]) -> str | None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.findall(r"\[(.*)\]", words[-1])
    missing = [
        extra for extra in ",".join(extras).split(",") if extra and extra not in project["optional-dependencies"]
    ]
    return f"no extra {', '.join(missing)}" if missing else None


def _problem_of_module(module: str, words: list[str]) -> str | None:
    if module == "pytest":
        tiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
        marked = [tier.partition(":")[0] for tier in tiers]
        return None if "-m" not in words or words[words.index("-m") + 1] in marked else f"no marker among {words}"
    path = ROOT / module.replace(".", "/")
    file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    return _unknown_flags(file, words) if file.is_file() else f"no module {module}"


def _unknown_flags(file: Path, words: list[str]) -> str | None:
    source = file.read_text()
    unknown = [word for word in words if word.startswith("--") and f'"{word}"' not in source and word != "--help"]
    return f"{file.relative_to(ROOT)} knows no {', '.join(unknown)}" if unknown else None


def _problem_of_words(script: str, words: list[str]) -> str | None:
    """Flags that the script doesn't know, overrides that don't compose."""
    try:
        if script in ("train.py", "scripts/prepare_data.py"):
            if any(word.startswith("resume=") for word in words):  # a run's folder says the rest
                return None
            line = read_command_line(words)
            job = sweep(line.overrides)[0] if line.multirun else line.overrides
            if not any(word.startswith("fork=") for word in job):  # its parent says the rest
                composer().compose(job)
            return None
        if script in ("scripts/cost.py", "scripts/run_grid.py"):
            own = {"price": "", "launcher": "local", "gpus": "all", "per_gpu": "1"}
            cellline.read(take_launcher(words)[0], own, single=script == "scripts/cost.py")
            return None
    except ValueError as error:
        return str(error)
    return _unknown_flags(ROOT / script, words)


@cache
def composer() -> Composer:
    return Composer()


def runnable(command: Command) -> list[str] | None:
    """The words to run in the sandbox; None for what isn't run."""
    words = shlex.split(placed(command.text), comments=True)
    files = {file: name for name, file in COMMANDS.items()}
    script = next((word for word in words if word in files), None)
    if words[:1] != ["python"] or script is None or any(part in command.text for part in TOO_LONG):
        return None
    if "data=text" in words and not {"data.vocab_size=300", "data.tokenizer=FOLDER"} & {*words}:
        words.append("data.vocab_size=300")  # the texts here are small
    given = [KEPT if word in MEASURED else word for word in words[words.index(script) + 1 :]]
    if files[script] == "train" and "init.from=FOLDER" not in given and not any(MIXED in word for word in given):
        jobs = [] if "dry_run=true" in given or "--help" in given else ["dry_run=true"]
        return None if "-m" in given else [sys.executable, script, *given, *jobs]
    if files[script] not in QUICK or any(MIXED in word for word in given):
        return None
    elsewhere = ["--cache", "floors.json"] if files[script] == "noise" else []
    return [sys.executable, script, *given, *elsewhere]


def sandbox(folder: Path) -> None:
    """Links to the checkout, texts, and a run called small, with checkpoints of steps 2 and 4."""
    for path in ROOT.iterdir():
        if path.name not in ("runs", "token_shards", ".git", "results"):
            (folder / path.name).symlink_to(path)
    (folder / "results").mkdir()
    for path in (ROOT / "results").iterdir():
        (folder / "results" / path.name).symlink_to(path)
    words = WORDS.split()
    for name in ("corpus/train-0", "corpus/val", "web/a", "books/a"):
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        texts = (" ".join(words[(i * k) % 17] for k in range(1, 90)) + f" {name} {i}" for i in range(300))
        path.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    (folder / "book.txt").write_text("".join(f"Chapter {i}. {' '.join(words)}.\n\n" for i in range(500)))
    done = run([sys.executable, "train.py", *RUN.split(), *TEXT.split()], folder)
    if done.returncode:
        raise RuntimeError(f"the small run failed: {done.stderr}")


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="words only; run nothing")
    args = parser.parse_args()
    found, wrong = list(dict.fromkeys(commands())), 0
    for command in found:
        if said := problem(command):
            wrong += 1
            print(f"{command.page}: {command.text}\n    {said}")
    print(f"{len(found)} commands in the pages, {wrong} with wrong words")
    if args.check:
        return int(wrong > 0)
    with tempfile.TemporaryDirectory(prefix="docs-") as folder:
        sandbox(Path(folder))
        ran = failed = 0
        for command in found:
            if words := runnable(command):
                done = run(words, Path(folder))
                ran, failed = ran + 1, failed + (done.returncode != 0)
                last = (done.stderr.strip().splitlines() or [""])[-1] if done.returncode else ""
                print(f"{'FAILED' if done.returncode else 'ok':6} {command.page}: {command.text}", flush=True)
                print(f"       {last}\n" if last else "", end="")
    print(f"{ran} run, {failed} failed; the others were checked only")
    return int(wrong + failed > 0)


if __name__ == "__main__":
    quiet_pipes()
    sys.exit(main())
