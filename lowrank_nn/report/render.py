"""A report as plain text of at most 120 columns, as Markdown and as HTML: one table, three dresses."""

from __future__ import annotations

import html
import textwrap
from typing import TYPE_CHECKING

from lowrank_nn.layers import LAYERS

if TYPE_CHECKING:
    from lowrank_nn.report.report import Report, Row

WIDTH = 120
_HEAD = ("layer", "became", "options", "error", "params", "", "MACs", "", "bytes")
_WORDS = 3  # the first columns hold words, aligned left; the others numbers


def to_text(report: Report) -> str:
    """Return the report as plain text, no line longer than 120 columns."""
    cells = [_HEAD, *(_cells(row) for row in report.rows), *_footer(report)]
    widths = _fitted([max(len(row[i]) for row in cells) for i in range(len(_HEAD))])
    lines = [_line(row, widths) for row in cells]
    rule = "-" * min(WIDTH, max(len(line) for line in lines))
    body = [report.title, rule, lines[0], rule, *lines[1:-2], rule, *lines[-2:], rule]
    return "\n".join([*body, *_summary(report), *_wrapped_notes(report)])


def to_markdown(report: Report) -> str:
    """Return the report as Markdown: a table of the layers, the ratios, and what was left."""
    rows = [_cells(row) for row in report.rows]
    head = ("layer", "became", "options", "error", "params", "of", "MACs", "of", "bytes")
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * 3 + " ---: |" * 6]
    lines += ["| " + " | ".join(_escape(cell) for cell in row) + " |" for row in [*rows, *_footer(report)]]
    lines += ["", *(f"- {line}" for line in _summary(report))]
    lines += [f"- {note}" for note in _notes(report)]
    return "\n".join(lines)


def to_html(report: Report) -> str:
    """Return the report as an HTML fragment for notebooks; replaced layers in bold."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in _HEAD)
    body = "".join(_html_row(_cells(row), bold=row.replaced) for row in report.rows)
    foot = "".join(_html_row(row, bold=False) for row in _footer(report))
    notes = "".join(f"<li>{html.escape(line)}</li>" for line in [*_summary(report), *_notes(report)])
    return (
        f"<table><caption>{html.escape(report.title)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody><tfoot>{foot}</tfoot></table><ul>{notes}</ul>"
    )


def count(number: float) -> str:
    """Return a count in at most seven characters: 512, 9.41k, 12.6M, 1.05G."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(number) >= limit:
            size = number / (1e3 if unit == "k" else limit)
            return f"{size:.3g}{unit}" if size < 999.5 else f"{size:.0f}{unit}"
    return str(int(number))


def _cells(row: Row) -> tuple[str, ...]:
    error = "" if row.error is None else f"{row.error:.3f}"
    given_compressed = row.was.split("+")[0] in LAYERS
    became = row.became if row.replaced or given_compressed else f"{row.was} (dense)"
    before, after = row.before, row.after
    params = (
        count(after.params) if after.nonzeros == after.params else f"{count(after.params)} nz {count(after.nonzeros)}"
    )
    return (
        row.path or "(model)",
        became,
        row.options,
        error,
        params,
        f"of {count(before.params)}",
        count(after.macs),
        f"of {count(before.macs)}",
        count(after.bytes),
    )


def _footer(report: Report) -> list[tuple[str, ...]]:
    rest, before, after = report.rest, report.before, report.after
    params = count(after.params)
    if after.nonzeros != after.params:
        params += f" nz {count(after.nonzeros)}"
    return [
        ("everything else", "", "", "", count(rest.params), "", count(rest.macs), "", count(rest.bytes)),
        (
            "total",
            "",
            "",
            "",
            params,
            f"of {count(before.params)}",
            count(after.macs),
            f"of {count(before.macs)}",
            count(after.bytes),
        ),
    ]


def _summary(report: Report) -> list[str]:
    rate, saving = report.compression_rate, report.index_space_saving
    lines = [
        "compression rate alpha = a/a*: " + ", ".join(f"{name} {ratio:.2f}x" for name, ratio in rate.items()),
        "index space saving beta = (a-a*)/a*: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in saving.items()),
    ]
    if report.file_bytes is not None:
        lines.append(f"saved file: {report.file_bytes[1]:,} bytes, dense {report.file_bytes[0]:,} bytes")
    if report.latency is not None:
        time = report.latency
        lines.append(
            f"speed-up delta = s/s*: {time.speedup:.2f}x ({time.before:.2f} ms -> {time.after:.2f} ms, median, "
            f"{time.device}, {time.threads} threads)"
        )
    return lines


def _notes(report: Report) -> list[str]:
    left = [f"left as they were ({reason}): {_listed(paths)}" for reason, paths in report.left.items()]
    return left + [f"{remark}: {_listed(paths)}" for remark, paths in report.remarks.items()]


def _wrapped_notes(report: Report) -> list[str]:
    lines = []
    for note in _notes(report):
        lines += textwrap.wrap(note, WIDTH, subsequent_indent="    ", break_long_words=True, break_on_hyphens=False)
    return lines


def _listed(paths: tuple[str, ...]) -> str:
    return ", ".join(path or "(model)" for path in paths)


def _fitted(widths: list[int]) -> list[int]:
    """Narrow the widest columns of words until a line fits."""
    widths = list(widths)
    while sum(widths) + len(widths) - 1 > WIDTH:
        widest = max(range(_WORDS), key=lambda column: widths[column])
        widths[widest] -= 1
    return widths


def _cut(text: str, width: int) -> str:
    """Shorten from the middle, so that both the stage and the layer's own name stay readable."""
    if len(text) <= width:
        return text
    tail = (width - 2) // 2
    return f"{text[: width - tail - 2]}..{text[len(text) - tail :]}"


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    words = [_cut(cell, width).ljust(width) for cell, width in zip(row[:_WORDS], widths[:_WORDS], strict=True)]
    numbers = [cell.rjust(width) for cell, width in zip(row[_WORDS:], widths[_WORDS:], strict=True)]
    return " ".join([*words, *numbers]).rstrip()


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|")


def _html_row(row: tuple[str, ...], *, bold: bool) -> str:
    tag = "b" if bold else "span"
    return "<tr>" + "".join(f"<td><{tag}>{html.escape(cell)}</{tag}></td>" for cell in row) + "</tr>"
