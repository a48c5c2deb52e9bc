"""Special tokens that a text quotes stay text, whatever the tokenizer's model.

`tokenizers` can leave out the search for special tokens (encode_special_tokens), but a Unigram, WordLevel or WordPiece
model, or a BPE with such merges, has "<s>" among its ordinary pieces too. Here these pieces get names that no text
holds; the ids of all tokens stay.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any

BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # SentencePiece's name of a single byte
# Rarely in anybody's vocabulary: where the unknown token comes out of text at all, it does here.
ODD_TEXT = "\u0001 \u00ff \u2603 \ue000 \U00010348 \U000e0041"


def control_ids(special: dict[int, str], unknown: int | None, bos_id: int) -> set[int]:
    """Ids that must not come out of text: BOS, and special tokens that only mean something to a program.

    Left out are the unknown token, which is the answer to some text, and special tokens that are text
    themselves: single bytes of byte fallback and single characters, such as a line feed.
    """
    names = {i: name for i, name in special.items() if len(name.strip()) > 1 and not BYTE_PIECE.fullmatch(name)}
    return (names.keys() - {unknown}) | {bos_id}


def unknown_id(description: dict[str, Any], vocab: dict[str, int]) -> int | None:
    """The id that the model gives to text it doesn't know, from a tokenizer.json's contents; None if it has none."""
    model = description["model"]
    return model["unk_id"] if "unk_id" in model else vocab.get(model.get("unk_token") or "")


def without_pieces(description: dict[str, Any], ids: Iterable[int]) -> str:
    """A tokenizer.json in which text can't give `ids`; every token keeps its id."""
    ids = set(ids)
    description = json.loads(json.dumps(description))
    model, salt = description["model"], _salt(description)
    pieces = model["vocab"]
    if isinstance(pieces, dict):
        names = {name for name, index in pieces.items() if index in ids}
        model["vocab"] = {f"{salt}{i}" if i in ids else name: i for name, i in pieces.items()}
    else:  # Unigram: a list of (piece, score)
        names = {pieces[i][0] for i in ids if i < len(pieces)}
        model["vocab"] = [[f"{salt}{i}" if i in ids else name, score] for i, (name, score) in enumerate(pieces)]
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if not names & _parts(pair)]
    for token in description["added_tokens"]:
        if token["id"] in ids:
            token["content"] = f"{salt}{token['id']}"
    return json.dumps(description | {"post_processor": None})


def _parts(pair: str | list[str]) -> set[str]:
    """A merge's two halves and what it makes."""
    left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
    return {left, right, left + right}


def _salt(description: dict[str, Any]) -> str:
    """Begins with a code point that is no character, and holds a hash of the tokenizer: no text has it by chance."""
    return "\ufdd0" + hashlib.sha256(json.dumps(description).encode()).hexdigest()[:16] + "/"
