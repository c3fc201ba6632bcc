"""`pumice inspect`: what a model's sites are, and what a sparse folder holds of what its plan says."""

from __future__ import annotations

from dataclasses import asdict

from pumice.cli.given import not_finite, open_model
from pumice.cli.say import emit, page, sheet, sparse_part


def inspect(model: str, every_site: bool, as_json: bool) -> None:
    from pumice.arch.detect import detect
    from pumice.hub.packed import packed_modules

    loaded, plan = open_model(model, sound=False)
    if packed := packed_modules(loaded.model):
        return _packed(model, loaded, packed, every_site, as_json)
    arch = detect(loaded.model)
    sites: dict[str, dict] = {}
    for site in arch.sites.values():
        entry = sites.setdefault(site.kind, {"sites": 0, "decided": 0})
        entry["sites"] += 1
        entry["decided"] += plan is not None and (site.name in plan.weights or site.name in plan.select)
    data = {
        "model": model,
        "class": type(loaded.model).__name__,
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "not_finite": not_finite(loaded.model),
        "blocks": len(arch.blocks),
        "sites": sites,
        "refused": arch.refused,
        **sparse_part(plan),
    }
    if plan is not None:
        data |= {"base": plan.base, "calibration": plan.calibration, **_zeros(loaded, arch, plan)}
    if as_json:
        return emit(data)
    _print_inspection(data, every_site)


def _said(entry: dict) -> str:
    """An entry of a recipe; how it was trained on a line of its own."""
    line = "recipe: " + ", ".join(f"{key}={value}" for key, value in entry.items() if key != "training")
    given = entry.get("training", {})
    given = {key: value for key, value in given.items() if not (key == "epochs" and given.get("steps"))}
    training = ", ".join(f"{key}={value}" for key, value in given.items())
    return f"{line}\n  trained: {training}" if training else line


def _packed(model: str, loaded, packed: dict, every_site: bool, as_json: bool) -> None:
    """A packed folder: its zeros cannot be lost, since they are not stored."""
    matrices = {name: module.packed for name, module in packed.items()}
    weights = sum(found.shape[0] * found.shape[1] for found in matrices.values())
    kept = sum(int(found.offsets[-1]) for found in matrices.values())
    config = loaded.model.config.quantization_config
    data = {
        "model": model,
        "class": type(loaded.model).__name__,
        "recipe": config.recipe,
        "base": config.base,
        "store": config.store,
        "packed": len(matrices),
        "weights": weights,
        "kept": kept,
        "sparsity": 1 - kept / weights,
        "bytes": sum(found.bytes for found in matrices.values()),
    }
    if as_json:
        sites = [
            {"site": name, "shape": found.shape, "kept": int(found.offsets[-1]), "bytes": found.bytes}
            for name, found in matrices.items()
        ]
        return emit(data | {"matrices": sites})
    page.print(f"{model}: {data['class']}, {len(matrices)} matrices packed as {config.store}")
    for entry in config.recipe:
        page.print(_said(entry))
    page.print(
        f"{kept:,} of {weights:,} weights are stored, in {data['bytes'] / 1e6:.1f} MB: sparsity {data['sparsity']:.4f}"
    )
    for name, found in matrices.items() if every_site else ():
        page.print(f"  {name}: {int(found.offsets[-1]):,} of {found.shape[0]}×{found.shape[1]}")


def _zeros(loaded, arch, plan) -> dict:
    """Whether the weights are those of the plan, and of each matrix how many of the zeros that its mask asks for."""
    from pumice.forms import Mask
    from pumice.hub.zeros import count
    from pumice.plan import fingerprint_model

    found = fingerprint_model(loaded.model)
    known = {"applied": "pruned", "fingerprint": "base", "slimmed": "smaller"}
    names = {plan.base.get(key): said for key, said in known.items()}
    rows = count(arch, plan) if loaded.folder == loaded.plan else []  # beside its base's weights a plan has no zeros
    return {
        "weights": names.get(found, "other"),
        "fingerprint": found,
        "masked_matrices": sum(isinstance(form, Mask) for form in plan.weights.values()),
        "masked_weights": sum(row.weights for row in rows),
        "planned_zeros": sum(row.planned for row in rows),
        "found_zeros": sum(row.found for row in rows),
        "zeros": sum(row.zeros for row in rows),
        "sites_with_too_few_zeros": [row.site for row in rows if not row.ok],
        "sites_not_in_the_model": sorted((plan.weights.keys() | plan.select.keys()) - arch.sites.keys()),
        "masks": [{**asdict(row), "lost": row.lost, "ok": row.ok} for row in rows],
    }


def _print_inspection(data: dict, every_site: bool) -> None:
    page.print(
        f"{data['model']}: {data['class']}, {data['parameters'] / 1e6:.1f} M parameters, {data['blocks']} blocks"
    )
    for name, count in list(data["not_finite"].items())[:6]:
        page.print(f"  damaged   {name}: {count} values are NaN or infinite")
    for kind, entry in data["sites"].items():
        decided = f", {entry['decided']} decided by the plan" if data["recipe"] else ""
        page.print(f"  {kind:8} {entry['sites']:5} sites{decided}")
    for part, why in list(data["refused"].items())[:6]:
        page.print(f"  left out  {part}: {why}")
    if not data["recipe"]:
        return page.print("dense. Make it sparse with `pumice sparsify`; `pumice methods` lists the methods.")
    for entry in data["recipe"]:
        page.print(_said(entry))
    base = data["base"]
    trained = f", trained from {base['trained_from']}" if "trained_from" in base else ""
    name = "the weights in this folder" if trained else f"{base.get('name')}, weights"
    page.print(f"base: {name} {base.get('fingerprint')}{trained}")
    if data["calibration"]:
        page.print("calibrated on: " + ", ".join(f"{key}={value}" for key, value in data["calibration"].items()))
    page.print(f"achieved sparsity {data['sparsity']:.4f} of the {data['sparsity_of']}")
    if data["masks"]:
        _print_masks(data["masks"], every_site)
        _print_verdict(data)
    elif data["masked_matrices"]:
        page.print(f"{data['masked_matrices']} masks, saved without weights: they are written when the model runs.")
    if data["sites_not_in_the_model"]:
        page.print(f"not in this model: {', '.join(data['sites_not_in_the_model'][:5])}. The plan is of another model.")
    if data["weights"] == "smaller":
        page.print("a plain smaller model: its weights are without the removed units, and the plan says which stayed")
    if data["weights"] == "other":
        page.print(
            f"the weights here are others ({data['fingerprint']}): changed or fine-tuned since the plan was made."
        )


def _print_masks(rows: list[dict], every_site: bool) -> None:
    """Planned and found zeros as a table, a line for each block or each matrix."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("matrix" if every_site else "block")
    for name in ("weights", "zeros planned", "found", "lost"):
        table.add_column(name, justify="right")
    table.add_column("ok")
    groups: dict = {}
    for row in rows:
        groups.setdefault(row["site"] if every_site else str(row["block"]), []).append(row)
    for name, group in groups.items():
        sums = [sum(row[key] for row in group) for key in ("weights", "planned", "found", "lost")]
        table.add_row(name, *(f"{value:,}" for value in sums), "no" if sums[-1] else "yes")
    sheet.print(table)


def _print_verdict(data: dict) -> None:
    lost = [row for row in data["masks"] if not row["ok"]]
    if not lost:
        zeros, weights = f"{data['found_zeros']:,} zeros", f"{data['masked_weights']:,} weights of pruned matrices"
        page.print(f"every zero is there: {zeros} in {weights}, as the masks ask")
        return
    names = ", ".join(row["site"] for row in lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
    gone = f"{sum(row['lost'] for row in lost):,} of {data['planned_zeros']:,} zeros were lost"
    page.print(
        f"{gone}, in {len(lost)} of {data['masked_matrices']} matrices: {names}. Fine-tuned without the mask? "
        "`--sites` says how many in each."
    )
