"""Attention heads in a block: an output matrix `o`, and the rows of q, k and v behind each of its columns.

Nothing is taken from names. Rows of a matrix are rolled by one place within a chunk (this keeps the mean and the norm,
so that a norm over all heads passes nothing on) at one token, and the input of `o` is watched:

| changes                                   | the rows are                       |
|-------------------------------------------|------------------------------------|
| this token only, but not token 0          | q  (softmax over one key is 1)     |
| this token only, token 0 too, same places | a gate on the head outputs         |
| later tokens, not token 0 itself          | k                                  |
| later tokens and token 0, in proportion   | v                                  |

Columns of `o` that share a k, v or q belong together: under GQA the unit is the KV group.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pumice.arch.probe import Lab, widths
from pumice.arch.units import Rows, Unit, affine_rows, common

LATE = 2  # a token with others before and after it
ORDER = ("q", "gate", "k", "v")


@dataclass(frozen=True)
class Chunk:
    """What `size` rows of a linear from `start` on do to the input of `o`."""

    linear: str
    start: int
    size: int
    role: str  # q, gate, k, v, none; k* where it may be k or v
    columns: frozenset[int]  # chunks of columns of `o` that it changes
    spread: int  # columns of `o` that it changes


@dataclass(frozen=True)
class Watcher:
    """The input of one `o`, while every other linear of the block is held at its output."""

    lab: Lab
    o: str

    @property
    def before(self) -> list[str]:
        """Linears that are called before `o`."""
        return [name for name in self.lab.order[: self.lab.order.index(self.o)] if name in self.lab.held]

    @property
    def base(self) -> Tensor:
        return self._shaped(self.lab.inputs[self.o])

    def _shaped(self, x: Tensor) -> Tensor:
        return x.reshape(*self.lab.grid, -1)

    def output(self, name: str) -> Tensor:
        return self._shaped(self.lab.held[name])

    def _held(self, name: str, z: Tensor) -> dict[str, Tensor]:
        return self.lab.held | {name: z.reshape(self.lab.held[name].shape)}

    def change(self, name: str, z: Tensor) -> Tensor:
        """How the input of `o` moves when linear `name` gives z [batch, token, out]; [batch, token, columns]."""
        return self._shaped(self.lab.run(self._held(name, z), stop=self.o).inputs[self.o]) - self.base

    def feeds(self, name: str) -> list[str]:
        """Linears before `o` whose input depends on `name`: then it is a low-rank factor and has no rows per head."""
        others = [other for other in self.before if other != name]
        z = self.output(name)
        seen = self.lab.run(self._held(name, z + self.lab.noise(z.shape)), watch=others, stop=self.o).inputs
        return [other for other in others if other in seen and not torch.equal(seen[other], self.lab.inputs[other])]


def find_heads(lab: Lab, downs: set[str]) -> tuple[list[Unit], dict[str, str]]:
    """The attentions of a block, and why what mixes tokens otherwise is not one; `downs` end its FFNs."""
    found: list[Unit] = []
    refused: dict[str, str] = {}
    for o in lab.order:
        if o in downs or o in lab.repeated or widths(lab.linears[o])[0] not in lab.streams:
            continue
        watcher = _watcher(lab, o)
        sources = _sources(watcher) if watcher else []
        if not sources:
            continue
        unit, why = _attention(watcher, sources)
        if unit:
            found.append(unit)
        elif why:
            refused[o] = why
    return found, refused


def _watcher(lab: Lab, o: str) -> Watcher | None:
    if lab.outputs[o].numel() != math.prod(lab.grid) * widths(lab.linears[o])[0]:
        return None  # routed tokens: an expert
    watcher = Watcher(lab, o)
    return watcher if watcher.base.shape[-1] == widths(lab.linears[o])[1] else None


def _sources(watcher: Watcher) -> list[str]:
    """Linears that reach the input of `o` through no other linear."""
    found = []
    for name in watcher.before:
        z = watcher.lab.held[name]
        if z.numel() != math.prod(watcher.lab.grid) * z.shape[-1]:
            continue
        z = watcher.output(name)
        if (watcher.change(name, z + watcher.lab.noise(z.shape)) != 0).any():
            found.append(name)
    return found


def _attention(watcher: Watcher, sources: list[str]) -> tuple[Unit | None, str]:
    lab, o = watcher.lab, watcher.o
    beside = [name for name in lab.odd if name.rpartition(".")[0] == o.rpartition(".")[0]]
    if beside:
        return None, f"{beside[0]} beside it does not compute x Wᵀ + b"
    size = head_chunk(lab.module, [o, *sources], watcher.base.shape[-1])
    if not size and _mixes(watcher, sources):
        return None, "no attribute of its module tells the number of its heads; set `num_heads` or `head_dim` on it"
    if not size:
        return None, ""
    chunks = [chunk for name in sources if not watcher.feeds(name) for chunk in _chunks(watcher, name, size)]
    chunks = _settled(watcher, chunks)
    kinds = {chunk.role for chunk in chunks}
    if not kinds & {"k", "v"} and not all(chunk.role == "q" and chunk.spread > chunk.size for chunk in chunks):
        kinds = set()  # keys and values of another layer are only believed where every row is a query's
    if "q" not in kinds or len(kinds & {"k", "v"}) == 1:
        mixes = _mixes(watcher, sources)
        return None, "what it reads mixes tokens, but not by softmax attention over q, k and v" if mixes else ""
    chunks = _without_shared(chunks, watcher.base.shape[-1] // size)
    groups = _groups(chunks, watcher.base.shape[-1] // size)
    return _unit(watcher, chunks, groups, size)


def _mixes(watcher: Watcher, sources: list[str]) -> bool:
    """Whether any source at token 0 is seen at a later token."""
    for name in sources:
        z = watcher.output(name).clone()
        z[:, 0] += watcher.lab.noise(z[:, 0].shape)
        if (watcher.change(name, z)[:, 1:] != 0).any():
            return True
    return False


def head_chunk(module: nn.Module, names: list[str], columns: int) -> int:
    """A number of columns that divides every head: from the attributes about heads around `o` and its sources.

    It only sets how fine the probing is; what a head is follows from what is seen.
    """
    sizes: set[int] = set()
    above = {".".join(name.split(".")[:depth]) for name in names for depth in range(name.count(".") + 1)}
    owners = [module.get_submodule(name) for name in above]
    owners += [owner.config for owner in owners if hasattr(owner, "config")]
    for owner in owners:
        for name, value in vars(owner).items():
            if "head" in name and isinstance(value, int) and not isinstance(value, bool) and 0 < value < columns:
                is_size = "dim" in name or "size" in name or name == "d_head"
                sizes |= {value} if is_size else {columns // value} if columns % value == 0 else set()
    sizes = {size for size in sizes if columns % size == 0}
    return _halved(math.gcd(*sizes)) if sizes else 0


def _halved(size: int) -> int:
    """Half a head shows rows of two kinds inside one head."""
    return size // 2 if size % 2 == 0 and size > 2 else size


def _chunks(watcher: Watcher, name: str, size: int) -> list[Chunk]:
    """The role and reach of every chunk of rows of one linear."""
    z = watcher.output(name)
    rows = z.shape[-1]
    step = math.gcd(size, rows) if rows > 2 * size else 1  # a few rows: one for each head perhaps
    starts = list(range(0, rows, step))
    found = []
    batch = watcher.lab.grid[0]
    for first in range(0, len(starts), batch):
        group = starts[first : first + batch]
        first_token, late, twice = (
            watcher.change(name, _rolled(z, group, step, token, factor))
            for token, factor in ((0, 1.0), (LATE, 1.0), (LATE, 2.0))
        )
        for row, start in enumerate(group):
            role, columns = _role(first_token[row], late[row], twice[row], float(watcher.base.abs().max()))
            reach = frozenset((columns.nonzero().flatten() // size).tolist())
            found.append(Chunk(name, start, step, role, reach, int(columns.sum())))
    return found


def _settled(watcher: Watcher, chunks: list[Chunk]) -> list[Chunk]:
    """Roles that one chunk alone does not tell.

    Token 0 shows nothing special under attention sinks or without a causal mask. Then q is what spreads over a head
    where a gate stays in its place, and v is what makes everything zero when it is zero. Elsewhere what is neither a
    key nor in proportion is v behind a norm (Gemma 4).
    """
    kinds = {chunk.role for chunk in chunks}
    unsure = {chunk.linear for chunk in chunks if chunk.role == "k*"}
    values = unsure if "k" in kinds else {name for name in unsure if "v" not in kinds and _silences(watcher, name)}
    settled = []
    for chunk in chunks:
        role = chunk.role
        if role == "k*":
            role = "v" if chunk.linear in values else "k"
        if (
            role == "gate"
            and "q" not in kinds
            and kinds & {"k*", "v"}
            and (chunk.spread > chunk.size or chunk.size == 1)
        ):
            role = "q"
        settled.append(replace(chunk, role=role))
    return settled


def _silences(watcher: Watcher, name: str) -> bool:
    """Whether the input of `o` is zero when this linear gives zero."""
    moved = watcher.change(name, torch.zeros_like(watcher.output(name)))
    return bool((moved + watcher.base).abs().max() <= 1e-4 * watcher.base.abs().max())


def _rolled(z: Tensor, starts: list[int], step: int, token: int, factor: float) -> Tensor:
    """Batch row r: the chunk at starts[r] of `token` moved towards itself rolled by one place."""
    z = z.clone()
    for row, start in enumerate(starts):
        part = z[row, token, start : start + step]
        target = part.roll(1) if step > 1 else part + 1
        z[row, token, start : start + step] = part + factor * (target - part)
    return z


def _role(first: Tensor, late: Tensor, twice: Tensor, largest: float) -> tuple[str, Tensor]:
    """The role of a chunk from its effects [token, columns], and the columns that it reaches."""
    scale = max(first.abs().max(), late.abs().max())
    if scale <= 1e-6 * largest:
        return "none", torch.zeros(first.shape[-1], dtype=torch.bool)
    first_seen, late_seen = first.abs() > 1e-3 * scale, late.abs() > 1e-3 * scale
    columns = first_seen.any(0) | late_seen.any(0)
    elsewhere = first_seen[1:].any() or late_seen[:LATE].any() or late_seen[LATE + 1 :].any()
    if not elsewhere:
        return ("gate" if first_seen[0].any() else "q"), columns
    if not first_seen[0].any():
        return "k", columns
    proportional = (twice - 2 * late).abs().max() <= 1e-3 * late.abs().max()
    return ("v" if proportional else "k*"), columns


def _without_shared(chunks: list[Chunk], columns: int) -> list[Chunk]:
    """Drop keys that every head shares beside keys of its own (the rotary part of MLA): no unit owns them."""
    everywhere = {name for name in {chunk.linear for chunk in chunks}
                  if all(len(c.columns) == columns for c in chunks if c.linear == name)}  # fmt: skip
    own = {chunk.linear for chunk in chunks if chunk.role in ("k", "v")} - everywhere
    return [chunk for chunk in chunks if not own or chunk.linear not in everywhere]


def _groups(chunks: list[Chunk], columns: int) -> list[list[int]]:
    """Chunks of columns of `o` joined by what reaches them."""
    parent = list(range(columns))

    def root(column: int) -> int:
        while parent[column] != column:
            column = parent[column]
        return column

    for chunk in chunks:
        first, *rest = sorted(chunk.columns) or [0]
        for column in rest:
            parent[max(root(first), root(column))] = min(root(first), root(column))
    groups: dict[int, list[int]] = defaultdict(list)
    for column in range(columns):
        groups[root(column)].append(column)
    return list(groups.values())


def _unit(watcher: Watcher, chunks: list[Chunk], groups: list[list[int]], size: int) -> tuple[Unit | None, str]:
    """Rows per group and role, where they are of the form start + u*stride + (0 … width-1)."""
    o = watcher.o
    owner = {column: unit for unit, group in enumerate(groups) for column in group}
    columns = affine_rows(o, [[c * size + i for c in group for i in range(size)] for group in groups])
    if columns is None:
        return None, "the columns of one KV group do not lie side by side at equal distances"
    if len(groups) == 1 < len(owner) - 1 and any(2 * len(c.columns) > len(owner) for c in chunks if c.role == "q"):
        return None, "its heads are mixed before it (a norm over all of them)"
    parts: dict[str, Rows] = {}
    for (role, linear), rows in sorted(_rows(chunks, owner).items(), key=lambda item: ORDER.index(item[0][0])):
        fitted = affine_rows(linear, [rows[unit] for unit in range(len(groups))]) if len(rows) == len(groups) else None
        if fitted is None:
            return None, f"the rows of {role} in {linear} are not at equal distances from group to group"
        parts[role if role not in parts else f"{role}.{linear.rpartition('.')[2]}"] = fitted
    name = common([o, *(rows.linear for rows in parts.values())])
    return Unit(name, len(groups), {**parts, "o": columns}), ""


def _rows(chunks: list[Chunk], owner: Mapping[int, int]) -> dict[tuple[str, str], dict[int, list[int]]]:
    """(role, linear) -> unit -> rows; a gate that lies between the heads of q in one matrix counts as q."""
    rows: dict[tuple[str, str], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for chunk in chunks:
        if chunk.columns:
            unit = owner[min(chunk.columns)]
            rows[chunk.role, chunk.linear][unit] += range(chunk.start, chunk.start + chunk.size)
    for role, linear in [key for key in rows if key[0] == "gate" and ("q", key[1]) in rows]:
        both = {unit: sorted(rows["q", linear][unit] + rows[role, linear][unit]) for unit in rows["q", linear]}
        if affine_rows(linear, [both[unit] for unit in sorted(both)]):
            rows["q", linear] = both
            del rows[role, linear]
    return rows
