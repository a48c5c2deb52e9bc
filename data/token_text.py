"""The bytes of text that tokens stand for: by a table of the vocabulary, and by a text's own bytes where that is wrong.

The table is exact for tokenizers that give text back unchanged. Others (lower case, normal forms, unknown words, spaces
left out) have tokens that stand for more or fewer bytes from one text to another; there each token takes the bytes of
the text from the end of the token before it to its own end, and the sum is the text's size.
"""

from typing import Any

import numpy as np

from data.quoted import BYTE_PIECE, unknown_id

_METASPACE = "\u2581"


def table(description: dict[str, Any], vocab: dict[str, int]) -> dict[int, bytes]:
    """id -> the bytes that it stands for, of a tokenizer.json and its vocabulary; special tokens and the unknown
    one stand for none."""
    model = description["model"]
    added = {token["id"]: token for token in description["added_tokens"]}
    byte_level, falls_back = is_byte_level(description), bool(model.get("byte_fallback"))
    prefix = model.get("continuing_subword_prefix") or ""
    unknown = unknown_id(description, vocab)
    out = {}
    for name, index in vocab.items():
        if falls_back and BYTE_PIECE.fullmatch(name):  # special ones too: training tools make them so
            out[index] = bytes([int(name[3:5], 16)])
        elif index == unknown:
            out[index] = b""
        elif index in added:
            out[index] = b"" if added[index]["special"] else name.encode()  # its own text, in every kind of vocabulary
        elif byte_level:
            out[index] = bytes(_BYTE_OF.get(character, 0) for character in name)
        else:
            out[index] = name.removeprefix(prefix).replace(_METASPACE, " ").encode()
    return out


def true_sizes(text: str, ends: list[int]) -> np.ndarray:
    """Bytes of `text` that each token stands for, int64 [tokens]. `ends`: where tokens end, in characters.

    The library's positions may repeat (the bytes of one character), go back or lie before the end of the text (trimmed
    spaces): what a token covers begins where all before it have ended.
    """
    code = np.frombuffer(text.encode("utf-32-le"), "<u4")
    width = 1 + (code >= 0x80).astype(np.int64) + (code >= 0x800) + (code >= 0x10000)
    before = np.concatenate([[0], np.cumsum(width)])
    reached = np.maximum.accumulate(np.clip(np.array(ends, np.int64), 0, len(text)))
    if len(reached):
        reached[-1] = len(text)
    return np.diff(before[reached], prepend=0)


def is_byte_level(description: dict[str, Any]) -> bool:
    steps = [description.get("decoder") or {}, description.get("pre_tokenizer") or {}]
    steps += [step for whole in steps for step in whole.get("decoders", []) + whole.get("pretokenizers", [])]
    return any(step.get("type") == "ByteLevel" for step in steps)


def _byte_of() -> dict[str, int]:
    """A byte-level vocabulary's characters -> bytes (GPT-2, 2019): printable ones of Latin-1 stand for themselves, the
    others, in order, for U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_of()
