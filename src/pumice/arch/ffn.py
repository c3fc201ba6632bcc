"""Feed-forward networks in a block: a `down` matrix whose every input is one neuron, and the matrices that make it.

    a = act(gate x) * (up x)        y = down a

A neuron is confirmed by perturbation: changing unit u of an input matrix at token t changes a[t, u] and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pumice.arch.activations import ACTIVATIONS, named
from pumice.arch.probe import Lab, close, is_affine, widths
from pumice.arch.units import Rows, Unit, common


def scopes(name: str) -> Iterator[str]:
    """`mlp.experts.0.down` -> `mlp.experts.0.`, `mlp.experts.`, `mlp.`, `` (the block)."""
    while name:
        name = name.rpartition(".")[0]
        yield f"{name}." if name else ""


def find_ffns(lab: Lab) -> tuple[list[Unit], dict[str, str]]:
    """The FFNs of a block, and why what looked like one is not."""
    found: list[Unit] = []
    refused: dict[str, str] = {}
    for down in lab.order:
        if widths(lab.linears[down])[0] not in lab.streams:
            continue
        for inputs in candidates(lab, down):
            rows, why = confirm(lab, down, inputs)
            if rows:
                name = common([down, *(part.linear for part in rows.values())])
                units, act = widths(lab.linears[down])[1], activation(lab, down, rows)
                whole = bool(act) and is_whole(lab, name, down, rows, act)
                found.append(Unit(name, units, {**rows, "down": Rows(down)}, act, whole))
                break
            if why:
                refused[down] = why
    return found, refused


def candidates(lab: Lab, down: str) -> Iterator[list[str]]:
    """Linears called before `down` with as many rows as it has columns, or twice as many, from near to far."""
    size = widths(lab.linears[down])[1]
    earlier = lab.order[: lab.order.index(down)]
    tried: set[str] = set()
    for scope in scopes(down):
        inside = [name for name in earlier if name.startswith(scope) and name in lab.held]
        inside = [name for name in inside if widths(lab.linears[name])[0] in (size, 2 * size)]
        if inside and set(inside) != tried:
            tried = set(inside)
            yield inside


def confirm(lab: Lab, down: str, candidates: list[str]) -> tuple[dict[str, Rows], str]:
    """Roles of the candidates that make the neurons of `down`, or why they are not neurons."""
    size = widths(lab.linears[down])[1]
    rows = [part for name in candidates for part in elementwise(lab, name, down, size)]
    if not rows:
        return {}, ""
    if not closed(lab, down, rows) or (len(rows) == 1 and affine(lab, down, rows[0])):
        return {}, ""  # a gate on something else, or a low-rank pair
    if len(rows) > 2 or down in lab.repeated:
        return {}, f"{len(rows)} matrices meet in one neuron, or it is called twice in a forward"
    parts = roles(lab, down, rows)
    why = cannot_narrow(lab, down, parts, size)
    return ({}, why) if why else (parts, "")


def elementwise(lab: Lab, name: str, down: str, size: int) -> list[Rows]:
    """How the rows of `name` map to the neurons of `down`: one to one, two halves, interleaved, or not at all."""
    base, z = lab.inputs[down], lab.held[name]
    picked = (lab.noise(z.shape) > 1).float()  # about one in six
    after = lab.run(lab.held | {name: z + 3 * lab.noise(z.shape) * picked}, stop=down).inputs[down]
    if after.shape != base.shape or base.numel() // size < 4:
        return []
    changed = (after != base).reshape(-1, size)
    if picked.numel() not in (changed.numel(), 2 * changed.numel()):
        return []
    picked = picked.reshape(changed.shape[0], -1).bool()
    if picked.shape[1] == size:
        return [Rows(name)] if covers(picked, changed) else []
    halves, pairs = picked.reshape(-1, 2, size), picked.reshape(-1, size, 2)
    if covers(halves.any(1), changed):
        return [Rows(name), Rows(name, start=size)]
    if covers(pairs.any(2), changed):
        return [Rows(name, 0, 2), Rows(name, 1, 2)]
    return []


def covers(picked: Tensor, changed: Tensor) -> bool:
    """Only picked neurons changed, and a fair part of them did (ReLU hides some)."""
    return not (changed & ~picked).any() and bool((changed & picked).sum() > 0.2 * picked.sum())


def closed(lab: Lab, down: str, rows: list[Rows]) -> bool:
    """The neurons depend on nothing but the rows: a gate on an attention's output passes `elementwise`, not this."""
    other = lab.call.with_hidden(lab.noise(lab.call.hidden.shape))
    after = lab.run({part.linear: lab.held[part.linear] for part in rows}, stop=down, call=other).inputs
    return down not in after or close(after[down], lab.inputs[down])  # the router may choose other experts


def roles(lab: Lab, down: str, rows: list[Rows]) -> dict[str, Rows]:
    """`up` is the part in which the neuron is affine, `gate` the other; of two affine parts the first is the gate."""
    if len(rows) == 1:
        return {"up": rows[0]}
    first, second = rows
    if affine(lab, down, first) and not affine(lab, down, second):
        first, second = second, first
    return {"gate": first, "up": second}


def affine(lab: Lab, down: str, part: Rows) -> bool:
    """Whether the neurons are affine in the rows of one part."""
    size = widths(lab.linears[down])[1]
    rows = part.index(torch.arange(size))

    def scaled(factor: float) -> Tensor:
        z = lab.held[part.linear].clone()
        z[..., rows] *= factor
        return lab.run(lab.held | {part.linear: z}, stop=down).inputs[down]

    return is_affine(scaled)


def cannot_narrow(lab: Lab, down: str, parts: dict[str, Rows], size: int) -> str:
    """Why the block with half of the neurons is not the block with the other half masked; empty if it is."""
    kept = torch.randperm(size, generator=lab.generator)[: max(1, size // 2)].sort().values
    mask = torch.zeros(size, device=lab.call.hidden.device)
    mask[kept] = 1
    masked = lab.run(enter={down: lambda a: a * mask}).result
    rows: dict[str, list[Tensor]] = {}
    for part in parts.values():
        rows.setdefault(part.linear, []).append(part.index(kept))
    merged = {name: torch.cat(index).sort().values for name, index in rows.items()}
    try:
        with lab.narrowed(merged, {down: kept}):
            narrow = lab.run().result
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        return f"its code does not run at another width ({str(error).splitlines()[0][:120]})"
    return "" if close(narrow, masked) else "fewer neurons do not give the result of masked neurons"


def activation(lab: Lab, down: str, parts: dict[str, Rows]) -> str:
    """The name of act where the neurons are act(gate)·up, or act(up) without a gate; empty where they are not."""
    units = torch.arange(widths(lab.linears[down])[1])
    gate, up = parts.get("gate", parts["up"]), parts["up"]
    z = {name: lab.noise(lab.held[name].shape) for name in {gate.linear, up.linear}}

    def neurons(factor: float) -> Tensor:
        held = {name: value.clone() for name, value in z.items()}
        if "gate" in parts:
            held[up.linear][..., up.index(units)] = factor
        return lab.run(lab.held | held, stop=down).inputs[down].reshape(-1, len(units))

    one = neurons(1.0)
    if "gate" in parts and not close(neurons(-2.0), -2 * one, 1e-6):
        return ""
    return named(z[gate.linear][..., gate.index(units)].reshape(-1, len(units)), one)


@torch.no_grad()
def is_whole(lab: Lab, name: str, down: str, parts: dict[str, Rows], act: str) -> bool:
    """Whether the module `name` is the FFN: called with x alone it gives down(act(gate x)·up x)."""
    if not name:
        return False
    module, units = lab.module.get_submodule(name), torch.arange(widths(lab.linears[down])[1])
    x = lab.noise((2, 3, widths(lab.linears[parts["up"].linear])[1]))
    made = {role: lab.linears[part.linear](x)[..., part.index(units)] for role, part in parts.items()}
    a = ACTIVATIONS[act](made["gate"]) * made["up"] if "gate" in made else ACTIVATIONS[act](made["up"])
    try:
        found = module(x)
    except Exception:  # it takes more than x
        return False
    return isinstance(found, Tensor) and close(found, lab.linears[down](a))
