"""The command line of train.py: a few flags, everything else is key=value."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path

from base.runfolder import RUN, RunError, read_json
from base.words import suggestion
from data.spec import hydra_value
from launcher import explain
from launcher.cells import CellError, refuse_twice
from launcher.compose import ConfigError, compose, groups, nearest_key
from launcher.schema import known_keys

FLAGS = ("--help", "-h", "--cfg", "--multirun", "-m", "--completion")
HELP = """Train a language model under one of the 4-bit recipes, or resume the run that the same command started.

  python train.py model=llama_30m quant=quartet2 data=text data.files='corpus/train-*.jsonl.zst' \\
      data.val_files=corpus/val.jsonl.zst tokens=3e9 seed=1
  python train.py experiment=quickstart quant=bf16          on a CPU, a minute or two
  python train.py -m quant=bf16,sr,quartet2 seed=0,1,2      every combination, one a GPU at once
  torchrun --nproc-per-node=4 train.py model=llama_1b9 ...  the same run on four GPUs
  python train.py resume=runs/NAME                          go on with a run whose command is lost
  python train.py quant=./mine.yaml                         a recipe from a file of one's own

Flags
  --help KEY       what a group's choices are, or what a key or section means: --help optim, --help quant
  --completion     a script for the shell that completes settings: eval "$(python train.py --completion)"
  --cfg job        print the composed configuration and stop
  -m, --multirun   key=a,b,c are several runs; one process each, as many at once as there are GPUs
  launcher=slurm   submit a SLURM job instead: slurm.timeout_min=1440 slurm.partition= slurm.nodes= slurm.gpus_per_node=
  dry_run=true     print the start screen (precision plan, batch split, expected memory) and stop; needs no GPU,
                   with launcher=slurm no SLURM: it shows the batch script, too, and submits nothing

Groups (group=choice)
{groups}

Experiments (experiment=grid cell=name; scripts/cost.py experiment=grid lists the cells and what they take)
{experiments}

Often used keys (all of them: --cfg job; --help KEY describes one)
  tokens=3e9 | steps=1000          length of the run: one of them (default: 20 tokens a parameter)
  batch.tokens= | batch.sequences= the batch of the whole job; batch.seq_len=512, batch.micro= sequences at a time
  optim.lr=1e-3  seed=0            peak learning rate (default: the model preset's)
  quant.dgrad=none                 a GEMM in high precision; quant.fprop.x.select=absmax: one field of one operand
  quant.high_precision.first=1     blocks kept in BF16; quant.rules='[{{match: "blocks.0.*", recipe: bf16}}]'
  evaluate.every=200  evaluate.tokens=1e6  evaluate.bf16=true
  checkpoint.every=500  checkpoint.keep_last=2
  run.name=mine  paths.runs=runs  paths.data=token_shards
  backend=auto|reference|triton|cutlass|scaled_mm|packed  compile=auto|true|false  parallel=auto|ddp|fsdp|hsdp
  cuda_graphs=auto|true|false
"""


@dataclass(frozen=True)
class CommandLine:
    """`text` is what to print instead of running anything, if that was asked for; `slurm` the options of a job to
    submit instead of running here (launcher=slurm), else None."""

    overrides: list[str] = field(default_factory=list)
    multirun: bool = False
    text: str | None = None
    slurm: dict[str, str] | None = None


def read_command_line(arguments: list[str]) -> CommandLine:
    """Raises ConfigError for an unknown flag and for a key given twice."""
    overrides, multirun, wants_config = [], False, False
    rest = iter(arguments)
    for word in rest:
        if word in ("--help", "-h"):
            return CommandLine(text=help_text(next(rest, None)))
        if word == "--completion":
            return CommandLine(text=explain.completion())
        if word in ("--multirun", "-m"):
            multirun = True
        elif word in ("--cfg", "--cfg=job"):
            if word == "--cfg" and next(rest, None) != "job":
                raise ConfigError("--cfg prints the composed configuration: write --cfg job")
            wants_config = True
        elif word.startswith("-"):
            key = word.partition("=")[0].lstrip("-").replace("-", "_")  # --dry-run and --lr=1, as other trainers have
            near = suggestion(word, FLAGS, cutoff=0.75) or nearest_key(key, known_keys())
            raise ConfigError(f"unknown flag {word}{near}; settings are key=value, see --help")
        else:
            overrides.append(word)
    try:
        refuse_twice(overrides)
    except CellError as error:
        raise ConfigError(str(error)) from error
    overrides, slurm = take_launcher(resumed(overrides))
    if wants_config and multirun:
        raise ConfigError("--cfg job prints one run's configuration: leave out --multirun, and give one value a key")
    if wants_config:
        return CommandLine(text=compose(overrides).yaml.rstrip())
    return CommandLine(overrides, multirun, slurm=slurm)


def take_launcher(words: list[str]) -> tuple[list[str], dict[str, str] | None]:
    """Split off launcher= and slurm.*= : they say where to run, not what. Raises ConfigError for another launcher."""
    own = [word for word in words if word.startswith(("launcher=", "slurm."))]
    for word in own:
        if "=" not in word:
            raise ConfigError(f"can't read {word!r}; write {word}=...")
    options = dict(word.removeprefix("slurm.").split("=", 1) for word in own)
    launcher = options.pop("launcher", "local")
    if launcher not in ("local", "slurm"):
        raise ConfigError(f"launcher={launcher}: write launcher=slurm, or leave it out to run here")
    if launcher == "local" and options:
        raise ConfigError(f"slurm.{next(iter(options))} without launcher=slurm")
    return [word for word in words if word not in own], options if launcher == "slurm" else None


def resumed(words: list[str]) -> list[str]:
    """resume=FOLDER written out: the words of the run's own command, run where its folder lies; `words` beside it come
    last. ConfigError for a folder that holds no run, and for a command that isn't kept."""
    folders = [Path(word.partition("=")[2]) for word in words if word.startswith("resume=")]
    if not folders:
        return words
    (folder,) = folders
    try:
        said = shlex.split(read_json(folder / RUN)["command"])
    except (OSError, RunError, KeyError, ValueError) as error:
        raise ConfigError(
            f"resume={folder}: no run with a command in its {RUN} ({error}); give a run's folder"
        ) from None
    own = said[2:] if said[:1] == ["nibble"] else said[1:]
    new = [word for word in words if not word.startswith("resume=")]
    new = [f"paths.runs={hydra_value(str(folder.parent))}", f"run.name={hydra_value(folder.name)}", *new]
    typed = {word.partition("=")[0] for word in new}
    return [*(word for word in own if word.partition("=")[0] not in typed), *new]


def help_text(key: str | None = None) -> str:
    if key is not None:
        return explain.key_help(key)
    width = max(map(len, groups()))
    lines = [f"  {name:<{width}}  {', '.join(options)}" for name, options in groups().items()]
    return HELP.format(groups="\n".join(lines), experiments=explain.options("experiment"))
