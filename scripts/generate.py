"""Sample text from a run's checkpoint, on the CPU, up to the end of the document.

python scripts/generate.py runs/NAME "The function returns" --tokens 100 --temperature 0.8
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from base.commands import parser_of
from base.terminal import any_letters, one_line_on_ctrl_c

if __name__ == "__main__":
    one_line_on_ctrl_c("generate")

from data.tokenizer import TextTokenizer
from training.checkpoint.storage import CheckpointError
from training.inference import load_trained, run_tokenizer, sample


def is_text(words: str) -> bool:
    try:
        words.encode()
    except UnicodeEncodeError:  # bytes of the command line that are not UTF-8
        return False
    return True


def continuation(tokenizer: TextTokenizer, prompt: list[int], ids: list[int]) -> str:
    """The text of `ids` behind the prompt's. Decoded together: alone, a SentencePiece text loses its first space."""
    before, whole = (tokenizer.tokenizer.decode(tokens) for tokens in (prompt, prompt + ids))
    return whole.removeprefix(before) if whole.startswith(before) else tokenizer.tokenizer.decode(ids)


def main() -> int:
    parser = parser_of(__file__, __doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("prompt", nargs="?", default="")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step", type=int, help="checkpoint; default the newest")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json; default the run's")
    arguments = parser.parse_args()
    if arguments.tokens < 1 or arguments.top_k < 1 or not 0 <= arguments.temperature < math.inf:
        parser.error("--tokens and --top-k need at least 1, --temperature at least 0")
    if not 0 <= arguments.seed < 2**63 or not is_text(arguments.prompt):
        parser.error("--seed needs 0 to 2^63 - 1, the prompt UTF-8")
    try:
        model, run, step = load_trained(arguments.run, arguments.step)
        tokenizer = run_tokenizer(run, arguments.tokenizer)
        if tokenizer is None:
            there = run.get("data_path") or "run.json names none"
            raise ValueError(f"the data of {run['name']} is gone ({there}); give --tokenizer FILE")
        prompt = tokenizer.ids(arguments.prompt)
    except (CheckpointError, OSError, ValueError) as error:
        print(f"generate.py: error: {error}", file=sys.stderr)
        return 1
    print(f"[{run['name']} at step {step}]", file=sys.stderr)
    start = [tokenizer.bos_id, *prompt]
    how = (arguments.tokens, arguments.temperature, arguments.top_k, arguments.seed)
    ids = list(sample(model, start, *how, stop=tokenizer.bos_id))
    ended = ids[-1] == tokenizer.bos_id  # the next document's
    print(arguments.prompt + continuation(tokenizer, prompt, ids[:-1] if ended else ids))
    if ended:
        print("[end of the document]", file=sys.stderr)
    return 0


if __name__ == "__main__":
    any_letters()
    sys.exit(main())
