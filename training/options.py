"""Options of hooks and probes: each has a frozen dataclass of its own, that a mapping of the configuration fills."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from base.words import suggestion


@dataclass(frozen=True)
class NoOptions:
    """Of a hook or probe that has none."""


def read_options(section: str, table: Mapping[str, Any], name: str, values: Any) -> Any:
    """table[name].Options of a mapping, checked. `section`: hooks or probes, for the messages.

    Raises ValueError for an unknown name or option, with the nearest one, and what the dataclass itself raises.
    """
    if name not in table:
        known = ", ".join(table)
        near = suggestion(name, table, f"there are: {known}")
        raise ValueError(f"{section}.{name}: not one of the {section}{near}")
    options = table[name].Options
    known = [field.name for field in fields(options)]
    if not isinstance(values, Mapping | None):
        example = f"{section}.{name}.{known[0]}=..." if known else f"{section}.{name}={{}}"
        raise ValueError(f"{section}.{name}={values!r}: needs a mapping of its options; write {example}")
    for key in values or {}:
        if key not in known:
            near = suggestion(key, known, f"options: {', '.join(known) or 'none'}")
            raise ValueError(f"{section}.{name}.{key}: no such option{near}")
    return options(**(values or {}))
