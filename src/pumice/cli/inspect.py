"""`pumice inspect`: what a model's sites are, and what a sparse folder holds of what its plan says."""

from __future__ import annotations

from pumice.cli.given import not_finite, open_model
from pumice.cli.say import emit, page, sparse_part


def inspect(model: str, as_json: bool) -> None:
    from pumice.arch.detect import detect

    loaded, plan = open_model(model, sound=False)
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
    _print_inspection(data)


def _zeros(loaded, arch, plan) -> dict:
    """Whether the weights are those of the plan, and how many zeros the stored matrices hold of those it asks for."""
    from pumice.forms import Mask
    from pumice.plan import fingerprint_model

    found = fingerprint_model(loaded.model)
    names = {plan.base.get("fingerprint"): "base", plan.base.get("applied"): "pruned"}
    masks = {name: form for name, form in plan.weights.items() if isinstance(form, Mask)}
    stored = {name: int((arch.sites[name].matrix() == 0).sum()) for name in masks if name in arch.sites}
    return {
        "weights": names.get(found, "other"),
        "fingerprint": found,
        "masked_matrices": len(masks),
        "masked_weights": sum(form.shape[0] * form.shape[1] for form in masks.values()),
        "planned_zeros": sum(form.removed for form in masks.values()),
        "zeros": sum(stored.values()),
        "sites_with_too_few_zeros": [name for name in masks if stored.get(name, 0) < masks[name].removed],
        "sites_not_in_the_model": sorted((plan.weights.keys() | plan.select.keys()) - arch.sites.keys()),
    }


def _print_inspection(data: dict) -> None:
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
        page.print("recipe: " + ", ".join(f"{key}={value}" for key, value in entry.items()))
    page.print(f"base: {data['base'].get('name')}, weights {data['base'].get('fingerprint')}")
    if data["calibration"]:
        page.print("calibrated on: " + ", ".join(f"{key}={value}" for key, value in data["calibration"].items()))
    page.print(f"achieved sparsity {data['sparsity']:.4f} of the {data['sparsity_of']}")
    if data["masked_weights"]:
        page.print(
            f"{data['zeros']:,} zeros in {data['masked_weights']:,} weights of pruned matrices; "
            f"the masks ask for {data['planned_zeros']:,}"
        )
    if data["sites_not_in_the_model"]:
        page.print(f"not in this model: {', '.join(data['sites_not_in_the_model'][:5])}. The plan is of another model.")
    if data["weights"] == "other":
        page.print(
            f"the weights here are others ({data['fingerprint']}): changed or fine-tuned since the plan was made."
        )
    if data["sites_with_too_few_zeros"]:
        lost = data["sites_with_too_few_zeros"]
        matrices = f"{len(lost)} of {data['masked_matrices']} matrices"
        page.print(f"zeros were lost in {matrices}: {', '.join(lost[:5])}. Fine-tuned without the mask?")
