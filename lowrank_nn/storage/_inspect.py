"""What is inside a file, without a model."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

from lowrank_nn.errors import FileFormatError
from lowrank_nn.layers import LAYERS
from lowrank_nn.storage._container import VERSION
from lowrank_nn.storage._encoding import DTYPES, Encoding
from lowrank_nn.storage._open import open_file
from lowrank_nn.storage._structure import LayerEntry, StoredTensor

WIDTH = 120


@dataclasses.dataclass(frozen=True)
class TensorSummary:
    """One tensor of a file.

    Attributes:
        key: Its state-dict key.
        dtype: Its dtype, by its name in the safetensors format.
        shape: Its shape.
        encoding: How it is stored, in words.
        stored_bytes: Bytes that its values take in the file.
        full_bytes: Bytes that it takes in memory.
        tied: Further keys of the same tensor.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    encoding: str
    stored_bytes: int
    full_bytes: int
    tied: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class FileSummary:
    """What a file holds. Printing it gives tables of at most 120 columns.

    Attributes:
        path: The file.
        version: Version of the format.
        file_bytes: Size of the file.
        layers: The compressed layers, each with path, class name, config (arguments of its constructor) and aliases
            (further paths where the model holds it).
        tensors: The tensors, in the order of the state dict.
    """

    path: str
    version: int
    file_bytes: int
    layers: tuple[LayerEntry, ...]
    tensors: tuple[TensorSummary, ...]

    @property
    def stored_bytes(self) -> int:
        """Bytes that the values of all tensors take in the file."""
        return sum(tensor.stored_bytes for tensor in self.tensors)

    @property
    def full_bytes(self) -> int:
        """Bytes that all tensors take in memory, shared ones once."""
        return sum(tensor.full_bytes for tensor in self.tensors)

    @property
    def overhead(self) -> int:
        """Bytes of the file that are no values: names, shapes, configs, checksums."""
        return self.file_bytes - self.stored_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-able values, totals included."""
        totals = {name: getattr(self, name) for name in ("stored_bytes", "full_bytes", "overhead")}
        return dataclasses.asdict(self) | totals

    def __str__(self) -> str:
        layers = [(layer.path or "(model)", layer.name, _options(layer)) for layer in self.layers]
        tensors = [
            (t.key, t.dtype, "x".join(map(str, t.shape)) or "-", t.encoding, f"{t.stored_bytes:,}", f"{t.full_bytes:,}")
            for t in self.tensors
        ]
        total = ("total", "", "", "", f"{self.stored_bytes:,}", f"{self.full_bytes:,}")
        lines = [
            _shortened(
                f"{self.path}: format {self.version}, {self.file_bytes:,} bytes, {self.overhead:,} of them no values"
            )
        ]
        if layers:
            lines += ["", *_table([("layer", "class", "options"), *layers])]
        lines += [
            "",
            *_table([("tensor", "dtype", "shape", "stored", "bytes", "in memory"), *tensors, total], numbers=2),
        ]
        shared = [f"{' = '.join((t.key, *t.tied))}: one tensor" for t in self.tensors if t.tied]
        shared += [f"{' = '.join((layer.path, *layer.aliases))}: one layer" for layer in self.layers if layer.aliases]
        return "\n".join([*lines, *(_shortened(line) for line in shared)])


def inspect(path: str | os.PathLike[str]) -> FileSummary:
    """Return what is inside a file that :func:`save` wrote; no model is needed, and no layer class.

    The checksums of all tensors are checked, their values are not decoded.

    Args:
        path: The file.

    Raises:
        FileFormatError: The file is not one that ``save`` wrote, is damaged, or is of a newer format.
        OSError: The file cannot be read.
    """
    file = open_file(path, "inspect")
    damaged = file.damaged()
    if damaged:
        keys = ", ".join(map(repr, damaged[:3])) + (", ..." if len(damaged) > 3 else "")
        raise FileFormatError(f"inspect: {str(path)!r} is damaged: no match with the checksums of {keys}.")
    tied: dict[str, list[str]] = {}
    for key, first in file.structure.tied.items():
        tied.setdefault(first, []).append(key)
    return FileSummary(
        path=str(path),
        version=VERSION,
        file_bytes=file.file_bytes,
        layers=file.structure.layers,
        tensors=tuple(
            _tensor_summary(key, stored, tuple(tied.get(key, ()))) for key, stored in file.structure.tensors.items()
        ),
    )


def _tensor_summary(key: str, stored: StoredTensor, tied: tuple[str, ...]) -> TensorSummary:
    encoding = stored.encoding
    full = math.prod(encoding.shape) * DTYPES[encoding.dtype].itemsize
    return TensorSummary(key, encoding.dtype, encoding.shape, _in_words(encoding), stored.nbytes, full, tied)


def _in_words(encoding: Encoding) -> str:
    words = []
    if encoding.mask is not None:
        words.append("where the mask is")
    if encoding.bitmap:
        words.append("bitmap")
    if encoding.gaps is not None:
        words.append(f"gaps ({encoding.gaps})")
    if encoding.bits is not None and encoding.bits[0] > 0:
        coder = "" if encoding.coder is None else f" ({encoding.coder})"
        words.append(f"{encoding.bits[0]} bits{coder}")
    return ", ".join(words) or "whole"


def _options(layer: LayerEntry) -> str:
    """Return the options that a report shows too; of a class that is not registered, all."""
    known = LAYERS.get(layer.name)
    names = layer.config if known is None else [name for name in known.main_options if name in layer.config]
    return " ".join(f"{name}={layer.config[name]}".replace(" ", "") for name in names if layer.config[name] is not None)


def _table(rows: list[tuple[str, ...]], numbers: int = 0) -> list[str]:
    """Return the rows as lines, ruled off below the head and above a total; the first and widest columns give way."""
    rows = [tuple(map(_in_a_line, row)) for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    while sum(widths) + 2 * (len(widths) - 1) > WIDTH:
        widths[widths.index(max(widths))] -= 1
    texts = len(widths) - numbers
    lines = [
        "  ".join(
            _shortened(cell, width).ljust(width) if i < texts else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    rule = "-" * max(map(len, lines))
    return [lines[0], rule, *lines[1:-1], rule, lines[-1]] if numbers else [lines[0], rule, *lines[1:]]


def _shortened(text: str, width: int = WIDTH) -> str:
    """Return the text in a line, its middle left out where it is wider than ``width``."""
    text = _in_a_line(text)
    if len(text) <= width:
        return text
    tail = max((width - 3) * 2 // 3, 0)  # the ends of paths tell more than their beginnings
    return text[: max(width - 3 - tail, 0)] + "..."[:width] + text[len(text) - tail :]


def _in_a_line(text: str) -> str:
    """Return the text without line breaks, and with other control characters escaped: names may hold anything."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
