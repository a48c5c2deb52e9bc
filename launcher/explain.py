"""What --help says of one group or key, and the words that a shell can complete. From the files themselves: the first
sentence of a YAML file's comment, and the comments beside the fields of the schema."""

import inspect
import re
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import configs
from base.words import suggestion
from launcher.compose import ConfigError, groups, nearest_key
from launcher.schema import FREE_FORM, known_keys
from training.config import TrainConfig
from training.options import read_options

FIELD = re.compile(r"^    (\w+): ([^=#\n]+?)(?: = (.*?))?(?:  # (.*))?$", re.MULTILINE)
WIDEST = 110  # characters of a sentence
# bash asks with the line up to the cursor; it splits words at "=", so that only what follows it is answered.
COMPLETION = """# Tab completion of settings in bash: eval "$(python train.py --completion)"
# In zsh first: autoload -U bashcompinit && bashcompinit
_nibble_words="{words}"
_nibble_complete() {{
  local line="${{COMP_LINE:0:COMP_POINT}}"
  [[ $line == *train.py* || $line == *"nibble train"* ]] || return
  local word="${{line##* }}"
  COMPREPLY=($(compgen -W "$_nibble_words" -- "$word"))
  [[ $word == *=* ]] && COMPREPLY=("${{COMPREPLY[@]#*=}}")
}}
complete -o nospace -o bashdefault -o default -F _nibble_complete python python3 nibble torchrun"""


def described(path: Path) -> str:
    """The first sentence of the comment at the top of a YAML file; "" without one."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment: list[str] = []
    for line in lines:
        if not line.startswith("#"):
            break
        if not line.startswith("# @"):
            comment.append(line.removeprefix("#").strip())
    first = re.match(r".*?[\w)]\.(?=\s|$)", " ".join(comment))
    text = re.sub(r" \(docs/[^)]*\)", "", first[0] if first else " ".join(comment)).rstrip(".:")
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3].rsplit(' ', 1)[0]} ..."


def options(group: str) -> str:
    """One line an option of a group: its name and what it is."""
    names = groups()[group]
    width = max(map(len, names))
    return "\n".join(f"  {name:<{width}}  {described(configs.FOLDER / group / f'{name}.yaml')}" for name in names)


def key_help(word: str) -> str:
    """What `--help word` prints: a group's options, a section's keys, or one key. ConfigError for none of them."""
    word = word.partition("=")[0]
    found = []
    if word in groups():
        found.append(f"{word}=choice, one of\n{options(word)}")
    if word in known_keys():
        found.append("\n".join(_lines(word)))
    section, _, rest = word.partition(".")
    if section in FREE_FORM and (rest or section in ("hooks", "probes")):
        found.append(_free_form(section, rest))
    if not found:
        near = nearest_key(word, [*known_keys(), *groups()])
        raise ConfigError(f"--help {word}: no such group or key{near}; --help alone lists the groups")
    return "\n\n".join(found)


def _free_form(section: str, rest: str) -> str:
    """What may stand in a section that its owners check. ConfigError for a hook, probe or option that isn't there."""
    if section == "quant":
        return f"quant.{rest}: of a recipe: a slot or its fields (kernels/spec.py), rules, phases; docs/add.md"
    if section == "init":
        return _line("init", TrainConfig, "init")
    from training.hooks import HOOKS  # they import torch, which other keys need not wait for
    from training.probes import PROBES

    table = PROBES if section == "probes" else HOOKS
    name, _, option = rest.partition(".")
    if name:
        try:
            read_options(section, table, name, {})
        except ValueError as error:
            raise ConfigError(f"--help: {error}") from error
    if option and option not in (known := [field.name for field in fields(table[name].Options)]):
        near = suggestion(option, known, f"options: {', '.join(known) or 'none'}")
        raise ConfigError(f"--help: {section}.{rest}: no such option{near}")
    return "\n".join(_owner(section, one, table[one]) for one in ([name] if name else table))


def _owner(section: str, name: str, owner: type) -> str:
    """What to type for a hook or probe, its options at their defaults, and the first paragraph of its file."""
    options = ", ".join(f"{field.name}: {_default(field.default)}" for field in fields(owner.Options))
    about = (inspect.getdoc(inspect.getmodule(owner)) or "").partition("\n\n")[0]
    return f"{section}.{name}={{{options}}}  {' '.join(about.split())}"


def _default(value: Any) -> str:
    return "null" if value is None else str(list(value) if isinstance(value, tuple) else value)


def _lines(key: str) -> list[str]:
    """A key with its type, default and comment; a section with all of its keys."""
    owner, kind = TrainConfig, TrainConfig
    for part in key.split("."):
        owner, kind = kind, get_type_hints(kind)[part]
    if not is_dataclass(kind):
        return [_line(key, owner, key.rpartition(".")[2])]
    about = inspect.getdoc(kind) or ""
    texts = [] if about.startswith(f"{kind.__name__}(") else [" ".join(about.split())]
    return [*texts, *(f"  {_line(f'{key}.{item.name}', kind, item.name)}" for item in fields(kind))]


def _line(key: str, owner: type, name: str) -> str:
    found = _written(owner).get(name)
    if found is None:
        return key
    default = f" = {_shown(found[3])}" if found[3] else ""
    return f"{key}: {found[2]}{default}" + (f"  {found[4]}" if found[4] else "")


@cache
def _written(owner: type) -> dict[str, re.Match]:
    """The lines of a class's fields in its source."""
    return {found[1]: found for found in FIELD.finditer(inspect.getsource(owner))}


def _shown(default: str) -> str:
    """A default as it is typed: null for None, a list for the function that makes one."""
    default = re.sub(r"field\(default_factory=lambda: (.*)\)", r"\1", default)
    made = {"field(default_factory=list)": "[]", "field(default_factory=dict)": "{}"}
    return (made | {"None": "null", "True": "true", "False": "false"}).get(default, default)


def completion() -> str:
    """A script for the shell: groups with their options, and keys."""
    words: list[Any] = [f"{group}={name}" for group, names in groups().items() for name in names]
    words += [f"{key}=" for key in known_keys() if "." in key or key not in groups()]
    return COMPLETION.format(words=" ".join(words))
