"""nibble COMMAND ...: train with 4-bit recipes, compare the runs, and what belongs to it."""

import ast
import runpy
import sys

from base.commands import COMMANDS, ROOT, spelled
from base.terminal import one_line_on_ctrl_c, quiet_pipes
from base.words import suggestion

MORE = "nibble COMMAND --help says more; nibble train --help lists the settings."


def listing() -> str:
    """Every command with the first line of its file's docstring."""
    texts = {name: ast.get_docstring(ast.parse((ROOT / file).read_text())) or "" for name, file in COMMANDS.items()}
    width = max(map(len, texts))
    lines = [f"  {name:<{width}}  {text.splitlines()[0]}" for name, text in texts.items()]
    return spelled("\n".join([__doc__, "", *lines, "", MORE]))


def main() -> int:
    """Run the command as its file would run by itself; it ends the process with its own exit code. 2 for no command."""
    name, *words = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        quiet_pipes()
        print(listing())
        return 0 if sys.argv[1:] else 2
    if name not in COMMANDS:
        near = suggestion(name, COMMANDS, otherwise="nibble --help lists them")
        print(f"nibble: no command {name!r}{near}", file=sys.stderr)
        return 2
    one_line_on_ctrl_c(f"nibble {name}")
    path = ROOT / COMMANDS[name]
    sys.argv = [str(path), *words]
    runpy.run_path(str(path), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
