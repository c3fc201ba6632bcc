"""`pumice export`: a sparse model as a file that others read."""

from __future__ import annotations

from typing import get_args

from pumice.cli.given import quiet_libraries
from pumice.cli.say import emit, note, page, recipe_name
from pumice.errors import PumiceError, unknown

KINDS = ("hf", "gguf", "packed")


def export(model: str, to: str, out: str, *, type: str | None, store: str | None, as_json: bool) -> None:
    """Write MODEL as an ordinary folder, a GGUF file, or a packed folder; say its bytes and what was left out."""
    if to not in KINDS:
        raise unknown("kind of export", to, KINDS)
    for flag, value, kind in (("type", type, "gguf"), ("store", store, "packed")):
        if value is not None and to != kind:
            raise PumiceError(f"--{flag} goes with --to {kind}.")
    quiet_libraries()
    from pumice.hub.export import open_source, to_hf

    _check_out(to, out, type, store)
    with note.status(f"loading {model}"):
        source = open_source(model)
    with note.status(f"writing {out}"):
        if to == "hf":
            done = to_hf(source, out)
        elif to == "gguf":
            from pumice.hub.to_gguf import to_gguf

            done = to_gguf(source, out, type or "f16")
        else:
            from pumice.hub.to_packed import to_packed

            done = to_packed(source, out, store)
    data = {"model": model, "to": to, "out": out, "recipe": source.recipe, **done}
    data["notes"] = source.notes + done.get("notes", [])
    if source.plan is not None:
        data["sparsity"] = source.plan.sparsity()
    emit(data) if as_json else _print(data, source.plan)


def _check_out(to: str, out: str, type: str | None, store: str | None) -> None:
    """Refuse a place or a type before minutes of loading."""
    if to == "gguf":
        from pumice.hub.export import new_file
        from pumice.hub.to_gguf import TYPES

        new_file(out, ".gguf")
        if type is not None and type not in TYPES:
            raise unknown("GGUF type", type, TYPES)
    else:
        from pumice.hub.export import new_place
        from pumice.store import Kind

        new_place(out)
        if store is not None and store not in get_args(Kind):
            raise unknown("storage", store, get_args(Kind))


def _print(data: dict, plan) -> None:
    what = f"{recipe_name(plan)}, sparsity {plan.sparsity():.4f}" if plan is not None else "dense"
    page.print(f"{data['model']} ({what}) written to {data['out']}: {data['bytes'] / 1e6:.1f} MB of weights.")
    for line in data["notes"]:
        page.print(f"note: {line}")
    out, masked = data["out"], plan is not None and any(hasattr(form, "bits") for form in plan.weights.values())
    if data["to"] == "hf":
        zeros = ": the zeros are in the weights, and save neither time nor bytes" if masked else ""
        page.print(f"An ordinary dense folder{zeros}.")
    elif data["to"] == "gguf":
        zeros = ", which reads its zeros like any number" if masked else ""
        page.print(f"For llama.cpp{zeros}: llama-cli -m {out}")
    else:
        page.print(f"{data['packed']} matrices packed as {data['store']}: {data['packed_bytes'] / 1e6:.1f} MB, where "
                   f"dense they were {data['dense_bytes'] / 1e6:.1f} MB.")  # fmt: skip
        page.print(
            "Load it with pumice, or `import pumice.hub.packed` before transformers, which without it would make these "
            "matrices random."
        )
