"""Tokenize text for training.

Takes the same overrides as train.py, of which only data.* and paths.data matter.

    python scripts/prepare_data.py data=text data.files='corpus/train-*.jsonl.zst' data.val_files=corpus/val.jsonl.zst

Prints the token folder on standard output, everything else on standard error. Can be killed and run again; when the
folder is there already, all its checksums are compared.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from base.commands import spelled
from base.terminal import one_line_on_ctrl_c

if __name__ == "__main__":
    one_line_on_ctrl_c("prepare_data")

from data.packing import load_layout
from data.prepare import prepare
from data.tokens import TokenSet
from launcher.compose import compose


def main(overrides: list[str]) -> int:
    """Prepare, pack if asked, print the folder; returns the exit status."""
    try:
        config = compose(overrides, typed=False).config  # the command that an error prints lists all that a text says
        folder = prepare(config.data, config.paths.data)
        if config.data.packing == "bos_bestfit":
            for split in ("train", "val"):
                load_layout(TokenSet(folder), split, config.batch.seq_len + 1)
    except (ValueError, RuntimeError, OSError) as error:  # ValueError: what the command asks for, or the text, is wrong
        print(f"error: {spelled(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
    print(folder)
    return 0


if __name__ == "__main__":
    if set(sys.argv[1:]) & {"-h", "--help"}:
        print(spelled(__doc__))
    else:
        sys.exit(main(sys.argv[1:]))
