"""What the commands say: figures on stdout, everything else on stderr; with `--json` one object on stdout."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console

PLAIN = {"highlight": False, "markup": False, "emoji": False}  # a path or a model's text may hold [bold] or :fire:
note = Console(stderr=True, soft_wrap=True, **PLAIN)
page = Console(soft_wrap=True, **PLAIN)
sheet = Console(**PLAIN)  # tables, which wrap by themselves


def emit(data: dict) -> None:
    """One JSON object on stdout; numbers that JSON lacks become null."""
    print(json.dumps(plain(data), ensure_ascii=False, allow_nan=False))


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def print_rows(rows: list, name: str) -> None:
    if not rows:
        return
    from pumice.report.tables import comparison, verdicts

    sheet.print(comparison(rows, f"{name}, decoding one token at a time", sheet.width))
    for line in verdicts(rows):
        page.print(line)


def print_notes(plan, most: int = 5) -> None:
    """What methods had to say of single matrices."""
    notes = plan.measurements.get("notes", [])
    for line in notes[:most]:
        page.print(f"note: {line}")
    if len(notes) > most:
        page.print(f"note: {len(notes) - most} more like these in pumice.json")


def print_nets(plan) -> None:
    """What the nets of a plan find, layer by layer, on text that they were not trained on."""
    forms = {name: form for name, form in plan.select.items() if getattr(form.score, "recall", None) is not None}
    nets = {name: form.score for name, form in forms.items()}
    if not nets:
        return
    note.print("nets that choose, on held-out tokens: recall and precision of the units that matter, ‖y_kept‖/‖y‖")
    width = max(map(len, nets))
    chance = {name: 1 - form.sparsity for name, form in forms.items()}
    for name, net in nets.items():
        found = f"recall {net.recall:.3f} (by chance {chance[name]:.3f})  precision {net.precision:.3f}"
        note.print(f"  {name:{width}}  {found}  output {net.captured:.3f}")
    recalls, outputs = ([getattr(net, part) for net in nets.values()] for part in ("recall", "captured"))
    count, low = len(nets), sum(net.recall < chance[name] + 0.02 for name, net in nets.items())
    mean = f"mean recall {sum(recalls) / count:.3f}, by chance {sum(chance.values()) / count:.3f}"
    note.print(f"  {mean}; output {sum(outputs) / count:.3f}")
    if low:
        note.print(f"  {low} of {count} nets find hardly more than chance would: what they choose means little")


def place(out: str, replaced: bool) -> str:
    return f"Saved in {out}, in place of the sparse model that was there" if replaced else f"Saved in {out}"


def recipe_name(plan) -> str:
    """`wanda 0.5`, `griffin 0.5 + wanda 0.5`: short names for tables."""
    names = []
    for entry in plan.recipe:
        pattern, allocation = entry.get("pattern") or "", entry.get("allocation", "uniform")
        said = [entry["method"], f"{entry['sparsity']:g}" if "sparsity" in entry else ""]
        said += [f"heads {entry['heads']:g}" if entry.get("heads") else ""]
        said += [pattern if ":" in pattern else "", allocation if allocation != "uniform" else ""]
        names.append(" ".join(filter(None, said)))
    return " + ".join(names)


def sparse_part(plan) -> dict:
    """What a plan makes sparse, for JSON; of a dense model nothing."""
    from pumice.report.rows import budget_of

    if plan is None:
        return {"recipe": [], "sparsity": 0.0}
    return {"recipe": plan.recipe, "sparsity": plan.sparsity(), "sparsity_of": budget_of(plan)}
