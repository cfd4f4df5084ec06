"""JSON that came from a file: parsed with care, and deflated."""

from __future__ import annotations

import json
import zlib
from typing import Any

from lowrank_nn.errors import FileFormatError

MAX_JSON = 100_000_000  # bytes; the limit that the safetensors library sets for its header
MAX_DEPTH = 32  # of nested lists and objects; what is written here has eight
MAX_RATIO = 64  # bytes of JSON that a byte may inflate to; of deep networks it does to 40, of deflate bombs to 1000
FREE_BYTES = 1 << 16  # and so many on top


def dump(value: Any) -> bytes:
    """Return ``value`` as JSON without spaces."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def parse(text: bytes, what: str) -> Any:
    """Return the value that ``text`` is the JSON of.

    Args:
        text: The JSON.
        what: What it is, for messages.

    Raises:
        FileFormatError: It is no JSON, has a name twice in an object, or is nested more than ``MAX_DEPTH`` deep.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
        _check_depth(value, MAX_DEPTH)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"the {what} is not valid JSON ({error}): not written by save, or damaged.") from error
    return value


def deflate(value: Any) -> bytes:
    """Return ``value`` as JSON, deflated: deep networks repeat the same words hundreds of times."""
    text = dump(value)
    deflated = zlib.compress(text, 9)
    return deflated if len(text) <= _inflated_limit(deflated) else zlib.compress(text, 0)


def inflate(data: bytes, what: str) -> Any:
    """Undo :func:`deflate`; what inflates to far more than a structure does is refused before it does.

    Args:
        data: The deflated JSON.
        what: What it is, for messages.

    Raises:
        FileFormatError: ``data`` is not of that form.
    """
    inflater = zlib.decompressobj()
    try:
        inflated = inflater.decompress(data, _inflated_limit(data))
    except zlib.error as error:
        raise FileFormatError(f"the {what} cannot be inflated ({error}): the file is damaged.") from error
    if not inflater.eof or inflater.unused_data:
        raise FileFormatError(f"the {what} is cut short, too long, or followed by something else.")
    return parse(inflated, what)


def _inflated_limit(deflated: bytes) -> int:
    return min(MAX_JSON, FREE_BYTES + MAX_RATIO * len(deflated))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a name occurs twice")
    return unique


def _check_depth(value: Any, left: int) -> None:
    if not isinstance(value, (dict, list)):
        return
    if left == 0:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    for item in value.values() if isinstance(value, dict) else value:
        _check_depth(item, left - 1)
