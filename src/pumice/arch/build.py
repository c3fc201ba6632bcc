"""Readings of block structures to Sites with full names."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from pumice.arch.probe import is_transposed
from pumice.arch.read import Experts, Reading
from pumice.arch.units import Rows, Unit
from pumice.sites import Block, Part, Site, View


@dataclass
class Builder:
    """Builds Blocks; a weight that two modules share is listed under its first name only."""

    model: nn.Module
    owners: dict[int, str] = field(default_factory=dict)  # id of a parameter -> the module that was listed with it

    def block(self, index: int, name: str, module: nn.Module, reading: Reading) -> Block:
        refused = {f"{name}.{part}".rstrip("."): why for part, why in reading.refused.items()}
        sites: list[Site] = []
        one = _BlockBuilder(self.model, index, name, module)
        for linear, key in reading.linears.items():
            weight = module.get_submodule(linear).weight
            owner = self.owners.setdefault(id(weight), f"{name}.{linear}")
            if owner == f"{name}.{linear}":
                sites.append(one.linear(linear, key))
            else:
                refused[f"{name}.{linear}"] = f"its weight is that of {owner}"
        for unit in (*reading.heads, *reading.ffns):
            if shared := [rows.linear for rows in unit.parts.values() if f"{name}.{rows.linear}" in refused]:
                refused[one.title(unit)] = f"{shared[0]}: {refused[f'{name}.{shared[0]}']}"
            else:
                sites.append(one.unit(unit, reading.linears))
        for experts in reading.experts:
            sites += one.experts(experts)
        return Block(index=index, name=name, module=module, sites=_unique(sites), refused=refused)


def _unique(sites: list[Site]) -> tuple[Site, ...]:
    """Sites by name: two FFNs that lie in the same module are told apart by their last matrix."""
    named: dict[str, Site] = {}
    for site in sites:
        named[site.name if site.name not in named else f"{site.name}.{site.input.rpartition('.')[2]}"] = site
    return tuple(site if site.name == name else _renamed(site, name) for name, site in named.items())


def _renamed(site: Site, name: str) -> Site:
    return Site(**{key: getattr(site, key) for key in site.__dataclass_fields__} | {"name": name})


@dataclass(frozen=True)
class _BlockBuilder:
    model: nn.Module
    index: int
    name: str
    module: nn.Module

    def site(self, name: str, **fields) -> Site:
        return Site(name=name, block=self.index, root=self.model, **fields)

    def part(self, rows: Rows) -> Part:
        linear = f"{self.name}.{rows.linear}"
        view = View(f"{linear}.weight", transposed=is_transposed(self.module.get_submodule(rows.linear)))
        return Part(linear, view, rows.start, rows.stride, rows.width)

    def linear(self, name: str, key: str) -> Site:
        part = self.part(Rows(name))
        units = self.module.get_submodule(name).weight.numel()
        return self.site(part.module, kind="linear", parts={"weight": part}, units=units, input=f"{self.name}.{key}")

    def title(self, unit: Unit) -> str:
        return f"{self.name}.{unit.name or ('ffn' if 'down' in unit.parts else 'heads')}"

    def unit(self, unit: Unit, reads: dict[str, str]) -> Site:
        parts = {role: self.part(rows) for role, rows in unit.parts.items()}
        kind, out = ("ffn", "down") if "down" in parts else ("heads", "o")
        first = next(rows.linear for role, rows in unit.parts.items() if role != out)
        return self.site(
            self.title(unit),
            kind=kind,
            parts=parts,
            units=unit.units,
            input=parts[out].module,
            entry=f"{self.name}.{reads.get(first, first)}",
            activation=unit.activation,
            whole=f"{self.name}.{unit.name}" if unit.whole else "",
        )

    def experts(self, experts: Experts) -> list[Site]:
        """The module as one site, and two linears and an FFN for each expert in it."""
        module, layout = f"{self.name}.{experts.name}", experts.layout
        both = {name: Part(module, View(f"{module}.{name}")) for name in (layout.into, layout.down)}
        whole = self.site(module, kind="experts", parts=both, units=layout.experts, input=f"{module}.in")
        each = [site for expert in range(layout.experts) for site in self.expert(module, experts, expert)]
        return [whole, *each]

    def expert(self, module: str, experts: Experts, expert: int) -> list[Site]:
        layout = experts.layout
        owner = self.model.get_submodule(module)
        views = {n: View(f"{module}.{n}", expert, layout.transposed) for n in (layout.into, layout.down)}
        linears = [
            self.site(f"{module}.{name}[{expert}]", kind="linear", parts={"weight": Part(module, view)},
                      units=getattr(owner, name)[0].numel(), input=f"{module}[{expert}].{point}", expert=expert)
            for (name, view), point in zip(views.items(), ("in", "mid"), strict=True)
        ]  # fmt: skip
        parts = {
            role: Part(module, views[layout.into], r.start, r.stride, r.width) for role, r in experts.parts.items()
        }
        parts["down"] = Part(module, views[layout.down])
        ffn = self.site(f"{module}[{expert}]", kind="ffn", parts=parts, units=layout.units, expert=expert,
                        input=f"{module}[{expert}].mid", entry=f"{module}[{expert}].in",
                        activation=experts.activation)  # fmt: skip
        return [*linears, ffn]
