"""Words of error messages: the nearest known one to a mistyped one, the first few of many."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


def suggestion(word: str, known: Iterable[str], otherwise: str = "", cutoff: float = 0.5) -> str:
    """'; did you mean X?' where one of `known` is near, else '; ' and `otherwise`, else nothing."""
    near = get_close_matches(str(word), list(known), n=1, cutoff=cutoff)
    text = f"did you mean {near[0]}?" if near else otherwise
    return f"; {text}" if text else ""


def some(names: Sequence[str], most: int, between: str = ", ") -> str:
    """The first of them, and how many more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return between.join(names[:most]) + more
