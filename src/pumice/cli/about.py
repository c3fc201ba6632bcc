"""What there is: the methods, and what this machine can do."""

from __future__ import annotations

from pumice.cli.say import emit, page, sheet


def methods(as_json: bool, as_markdown: bool) -> None:
    from pumice.report.methods import cards, markdown, table

    if as_json:
        emit({"methods": [card.summary() for card in cards()]})
    elif as_markdown:
        print(markdown())
    else:
        sheet.print(table())


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
