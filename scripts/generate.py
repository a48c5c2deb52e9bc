"""Sample text from a run's checkpoint, on the CPU.

python scripts/generate.py runs/NAME "The function returns" --tokens 100 --temperature 0.8
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.tokenizer import TextTokenizer
from training.inference import load_trained, sample
from training.storage import CheckpointError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("prompt", nargs="?", default="")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step", type=int, help="checkpoint; default the newest")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json; default the run's")
    arguments = parser.parse_args()
    try:
        model, run, step = load_trained(arguments.run, arguments.step)
        tokenizer = TextTokenizer(arguments.tokenizer or Path(run["data_path"]) / "tokenizer.json")
    except (CheckpointError, OSError) as error:
        print(f"generate.py: error: {error}", file=sys.stderr)
        return 1
    print(f"[{run['name']} at step {step}]", file=sys.stderr)
    prompt = [tokenizer.bos_id, *tokenizer.tokenizer.encode(arguments.prompt, add_special_tokens=False).ids]
    ids = sample(model, prompt, arguments.tokens, arguments.temperature, arguments.top_k, arguments.seed)
    print(arguments.prompt + tokenizer.tokenizer.decode(list(ids)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
