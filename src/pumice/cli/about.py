"""What there is: the methods, and what this machine can do."""

from __future__ import annotations

from pumice.cli.say import emit, page, sheet
from pumice.errors import PumiceError


def methods(name: str | None, as_json: bool, as_markdown: bool) -> None:
    from pumice.report.methods import cards, markdown, one, table

    if name is not None and as_markdown:
        raise PumiceError("--markdown is the table of all methods: leave out the name.")
    if name is not None:
        card = one(name)
        return emit(card.summary()) if as_json else _one(card)
    if as_json:
        emit({"methods": [card.summary() for card in cards()]})
    elif as_markdown:
        print(markdown())
    else:
        sheet.print(table())


def _one(card) -> None:
    from rich.table import Table

    from pumice.report.methods import values

    page.print(f"{card.name}, decided {card.decided}, of {' and '.join(card.kinds)}. {card.text}\n")
    found = Table(box=None, pad_edge=False)
    for column in ("setting", "default", "values"):
        found.add_column(column, overflow="fold")
    for setting, default, choices, said in values(card.name):
        found.add_row(f"--{setting.replace('_', '-')}", str(default), ", ".join(choices) or said)
    sheet.print(found)


def doctor(as_json: bool) -> None:
    import importlib.util
    import shutil

    from pumice.disk import cache_dir
    from pumice.eval.speed import resident_bytes
    from pumice.kernels.cpu.library import describe
    from pumice.report.rows import machine

    extras = {"data": "datasets", "eval": "lm_eval", "plot": "matplotlib", "llamacpp": "xllamacpp"}
    cache = cache_dir()
    existing = next(parent for parent in (cache, *cache.parents) if parent.exists())
    data = {
        **machine(),
        "cpu_kernels": describe(),
        "extras": {extra: importlib.util.find_spec(module) is not None for extra, module in extras.items()},
        "cache": str(cache),
        "disk_free_GB": round(shutil.disk_usage(existing).free / 1e9, 1),
        "resident_MB": round(resident_bytes() / 1e6),
    }
    if as_json:
        return emit(data)
    for key, value in data.items():
        if key == "extras":
            value = ", ".join(f"{extra} {'yes' if found else 'no'}" for extra, found in value.items())
        page.print(f"{key.replace('_', ' '):22} {value}")
