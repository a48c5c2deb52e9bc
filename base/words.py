"""The nearest known word to a mistyped one, for error messages."""

from collections.abc import Iterable
from difflib import get_close_matches


def suggestion(word: str, known: Iterable[str], otherwise: str = "", cutoff: float = 0.5) -> str:
    """'; did you mean X?' where one of `known` is near, else '; ' and `otherwise`, else nothing."""
    near = get_close_matches(str(word), list(known), n=1, cutoff=cutoff)
    text = f"did you mean {near[0]}?" if near else otherwise
    return f"; {text}" if text else ""
