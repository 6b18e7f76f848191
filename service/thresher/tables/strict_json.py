"""JSON from files that anyone may have written: what is ambiguous or not JSON is an error."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, NoReturn


def loads(data: bytes, where: str) -> Any:
    """Parse UTF-8 JSON; repeated keys, NaN, infinities and endless nesting are errors.

    Args:
        data: the bytes.
        where: the file, as errors name it.

    Raises:
        ValueError: if it is not such JSON; names `where`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) != len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"the key {twice[:80]!r} stands there twice")
        return members

    def constant(text: str) -> NoReturn:
        raise ValueError(f"{text} is not JSON")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except RecursionError:
        raise ValueError(f"{where}: nested too deep") from None
    except ValueError as error:  # also of the decoding, of JSON's own and of numbers with thousands of digits
        raise ValueError(f"{where}: not valid JSON: {error}") from None
