"""Tables for people: rows as rich tables, with bytes in MB and perplexity with its standard error."""

from __future__ import annotations

import math

from rich.table import Table

from pumice.report.rows import Row


def comparison(rows: list[Row], title: str) -> Table:
    """The side-by-side table. `vs dense` is measured; `bytes allow` is the ratio of bytes read, the bound."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    table.add_column("model")
    for name in (
        "sparsity",
        "decode tok/s",
        "vs dense",
        "bytes allow",
        "FFN MB/tok",
        "all MB/tok",
        "perplexity",
        "dense",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row.name, *_cells(row), end_section=row.name.startswith("dense") or row.name.endswith("·"))
    return table


def _cells(row: Row) -> list[str]:
    speed, score = row.speed, row.perplexity
    return [
        f"{row.sparsity:.4f}" if row.sparsity is not None else "",
        f"{speed.decode_tokens_per_second:.1f}" if speed else "",
        f"{row.speedup:.2f}×" if row.speedup else "",
        f"{row.bound:.2f}×" if row.bound else "",
        f"{speed.ffn_bytes / 1e6:.1f}" if speed and speed.ffn_bytes else "",
        f"{speed.effective_bytes / 1e6:.1f}" if speed and speed.effective_bytes else "",
        number(score.perplexity, score.standard_error) if score else "",
        number(row.dense_perplexity) if row.dense_perplexity else "",
    ]


def number(value: float, error: float | None = None) -> str:
    """A perplexity with the digits that mean something."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞"
    digits = 2 if value < 1000 else 0
    text = f"{value:,.{digits}f}"
    return text if error is None or not math.isfinite(error) else f"{text} ± {error:,.{digits}f}"


def verdicts(rows: list[Row]) -> list[str]:
    """What the figures say, in plain words: what gave no speed and where the model broke."""
    lines = []
    masks = [row for row in rows if row.exec == "dense storage"]
    if masks:
        lines.append(
            f"{_list(masks)}: no speed. The zeros of a Mask lie in dense storage and are read like any number; "
            "bytes per token are those of dense."
        )
    slower = [row for row in rows if row.exec == "masked"]
    if slower:
        lines.append(
            f"{_list(slower)}: no speed here. Gathered matrices were measured no faster than dense at these shapes, so "
            "dense work is done and masked."
        )
    for row in rows:
        if row.perplexity and row.dense_perplexity and not row.perplexity.perplexity < 2 * row.dense_perplexity:
            ratio = row.perplexity.perplexity / row.dense_perplexity
            lines.append(f"{row.name}: broken. Perplexity is {ratio:,.1f} times that of dense on the same tokens.")
    return lines


def _list(rows: list[Row]) -> str:
    return ", ".join(row.name for row in rows)
