"""Tables for people: rows as rich tables, with bytes in MB and perplexity with its standard error."""

from __future__ import annotations

import math
from collections.abc import Callable

from rich import box
from rich.table import Table

from pumice.report.rows import Row

COLUMNS: dict[str, Callable[[Row], str]] = {
    "sparsity": lambda row: f"{row.sparsity:.4f}" if row.sparsity is not None else "",
    "decode\ntok/s": lambda row: f"{row.speed.decode_tokens_per_second:.1f}" if row.speed else "",
    "vs\ndense": lambda row: f"{row.speedup:.2f}×" if row.speedup else "",
    "bytes\nallow": lambda row: f"{row.bytes_bound:.2f}×" if row.bytes_bound else "",
    "FFN\nMB/tok": lambda row: f"{row.speed.ffn_bytes / 1e6:.1f}" if row.speed and row.speed.ffn_bytes else "",
    "all\nMB/tok": lambda row: f"{row.speed.effective_bytes / 1e6:.1f}" if row.speed else "",
    "perplexity": lambda row: (
        number(row.perplexity.perplexity, row.perplexity.standard_error) if row.perplexity else ""
    ),
    "dense\nppl": lambda row: number(row.dense_perplexity) if row.dense_perplexity else "",
}


def comparison(rows: list[Row], title: str, width: int = 80) -> Table:
    """The side-by-side table. `vs dense` is measured; `bytes allow` is the ratio of bytes read, the bound.

    It fits 80 columns; a column with nothing in it is left out.
    """
    table = Table(
        title=title, title_justify="left", title_style="bold", header_style="bold", box=box.SIMPLE_HEAD, show_edge=False
    )
    table.pad_edge, table.padding = False, (0, int(width >= 90), 0, 0)
    table.add_column("model", overflow="fold", min_width=8)
    filled = {name: cell for name, cell in COLUMNS.items() if any(cell(row) for row in rows)}
    for name in filled:
        table.add_column(name, justify="right", no_wrap=True)
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        ends = row.sparsity is None and after is not None and after.sparsity is not None
        table.add_row(row.name, *(cell(row) for cell in filled.values()), end_section=ends)
    return table


def number(value: float, error: float | None = None) -> str:
    """A perplexity with the digits that mean something."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞"
    if value >= 1e6:  # broken; the digits mean nothing
        return f"{value:.1e}"
    digits = 2 if value < 100 else 1 if value < 1000 else 0
    text = f"{value:,.{digits}f}"
    return text if error is None or not math.isfinite(error) else f"{text} ± {error:,.{digits}f}"


def verdicts(rows: list[Row]) -> list[str]:
    """What the figures say, in plain words: what gave no speed and where the model broke."""
    lines = []
    masks = [row for row in rows if row.ran == "dense storage"]
    if masks:
        lines.append(
            f"{_list(masks)}: no speed. The zeros of a Mask lie in dense storage and are read like any number; "
            "bytes per token are those of dense."
        )
        lines += [f"{row.name}: {row.why.rstrip('.')}." for row in masks if row.why]
    packed = [row for row in rows if row.ran in ("packed", "partly packed") and (row.speedup or 2) < 1.05]
    if packed:
        lines.append(
            f"{_list(packed)}: no speed to speak of. Each packed matrix was timed faster than its dense one, but what "
            "they save is spent around them, or lost in noise."
        )
    ours = ("packed", "partly packed", "skipping", "partly skipping")
    above = [row for row in rows if row.ran in ours and _above_its_bytes(row)]
    if above:
        lines.append(
            f"{_list(above)}: faster than the bytes allow. The kernel reads memory faster than torch's dense "
            "product does here; that part of the gain is the kernel's, not the zeros'."
        )
    formless = [row for row in rows if row.ran == "masked, no gathered form"]
    lines += [f"{row.name}: no speed: {row.why.rstrip('.')}. Dense work is done and masked."
              for row in formless if row.why]  # fmt: skip
    formless = [row for row in formless if not row.why]
    if formless:
        lines.append(
            f"{_list(formless)}: no speed. Fused experts, heads, small matrices and sets that "
            "differ from row to row have no faster form yet, so dense work is done and masked."
        )
    masked = [row for row in rows if row.ran == "masked"]
    if masked:
        lines.append(
            f"{_list(masked)}: no speed here. Reading the live units alone was measured no faster than dense at these "
            "shapes, so dense work is done and masked."
        )
    lines += [f"{row.name}: slower than dense, {row.speedup:.2f}×: what chooses is run for nothing."
              for row in rows if row.ran.startswith("masked") and (row.speedup or 1) < 0.95]  # fmt: skip
    even = [row for row in rows if row.ran == "gathered" and row.speedup is not None and row.speedup < 1.05]
    if even:
        lines.append(
            f"{_list(even)}: no speed to speak of. What the smaller matrices save is spent around them, "
            "or lost in noise."
        )
    for row in rows:
        if row.perplexity and row.dense_perplexity and not row.perplexity.perplexity < 2 * row.dense_perplexity:
            ratio = row.perplexity.perplexity / row.dense_perplexity
            what = f"{ratio:,.1f} times that of dense on the same tokens" if ratio < math.inf else number(ratio)
            lines.append(f"{row.name}: broken. Perplexity is {what}.")
    return lines


def _above_its_bytes(row: Row) -> bool:
    return bool(row.speedup and row.bytes_bound) and row.speedup > 1.05 * row.bytes_bound


def _list(rows: list[Row]) -> str:
    return ", ".join(row.name for row in rows)
