"""Find the decoder blocks of a model and the sites in them: structure first, numbers confirm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from pumice.arch.ffn import Rows, Unit, find_ffns
from pumice.arch.probe import Lab, is_transposed
from pumice.arch.trace import Call, first_call, hidden_of, quiet, record
from pumice.errors import PumiceError
from pumice.sites import Block, Kind, Part, Site, View

BATCH, TOKENS = 8, 6


@dataclass(frozen=True)
class Arch:
    """How a model is laid out: its decoder blocks and every site in them."""

    blocks: tuple[Block, ...]

    @cached_property
    def sites(self) -> Mapping[str, Site]:
        """Every site by name, in the order of the blocks."""
        return MappingProxyType({site.name: site for block in self.blocks for site in block.sites})

    def of_kind(self, *kinds: Kind) -> list[Site]:
        return [site for block in self.blocks for site in block.of_kind(*kinds)]

    def block_of(self, site: Site | str) -> Block:
        return self.blocks[(self.sites[site] if isinstance(site, str) else site).block]

    @property
    def refused(self) -> dict[str, str]:
        """What has no site, over all blocks: name -> why."""
        return {name: why for block in self.blocks for name, why in block.refused.items()}


@dataclass
class Reading:
    """What is known of one block structure, in names relative to the block."""

    linears: dict[str, str] = field(default_factory=dict)  # linear -> key of its input
    ffns: list[Unit] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def detect(model: nn.Module) -> Arch:
    """Read the layout of a decoder-only language model.

    Blocks may be on the meta device; one block of each distinct structure is copied with random weights and probed.
    The model itself is only called with its blocks replaced by stubs, and left as it was.

    Raises PumiceError where no decoder blocks or no linear site can be found. What is not understood inside a block
    is listed in `Block.refused` with the reason.
    """
    prefix, blocks = decoder_blocks(model)
    calls = recorded(model, blocks)
    readings: dict[tuple, Reading] = {}
    for block, call in zip(blocks, calls, strict=True):
        if (key := structure(block)) not in readings:
            with quiet(block):
                readings[key] = read(block, call)
    built = _Build(model)
    arch = Arch(tuple(built.block(i, f"{prefix}.{i}", b, readings[structure(b)]) for i, b in enumerate(blocks)))
    if not arch.of_kind("linear"):
        why = "; ".join(f"{name}: {reason}" for name, reason in list(arch.refused.items())[:4])
        raise PumiceError(f"No linear layer could be read in the {len(blocks)} blocks {prefix!r}. {why}")
    return arch


def decoder_blocks(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """The name and the modules of the ModuleList of decoder blocks."""
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    depth = getattr(config, "num_hidden_layers", None)
    inner = model.get_decoder() if hasattr(model, "get_decoder") else None
    names = {id(module): name for name, module in model.named_modules()}
    for root in filter(None, (inner, model)):
        lists = [module for module in root.modules() if isinstance(module, nn.ModuleList) and len(module)]
        lists = [module for module in lists if len({type(child) for child in module}) <= len(module)]
        exact = [module for module in lists if len(module) == depth]
        if exact or lists:
            best = max(exact or lists, key=lambda module: sum(p.numel() for p in module.parameters()))
            return names[id(best)], list(best)
    raise PumiceError(f"{type(model).__name__} has no list of decoder blocks.")


def recorded(model: nn.Module, blocks: list[nn.Module]) -> list[Call | None]:
    """One call for each block, None for a block that a text-only forward does not reach."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(min(3, vocabulary - 1), vocabulary, (1, TOKENS), generator=generator)
    ids = row.expand(BATCH, -1).to(model.get_input_embeddings().weight.device)
    call = first_call(model, blocks[0], ids)
    lab = Lab.of(blocks[0], call)
    with torch.no_grad():
        output = lab.call(lab.module)
    calls, _ = record(model, blocks, ids, output)
    return [mine[0] if mine else None for mine in calls]


def structure(block: nn.Module) -> tuple:
    """Equal for blocks that are read alike: classes, shapes and settings, but not the number of the layer."""
    shapes = tuple((name, tuple(p.shape)) for name, p in block.named_parameters(remove_duplicate=False))
    return tuple((name, type(part).__qualname__, settings(part)) for name, part in block.named_modules()), shapes


def settings(module: nn.Module) -> tuple:
    """The scalar attributes of a module; of a float only whether it is zero, since many depend on the depth."""
    kept: list[tuple[str, Any]] = []
    for name, value in sorted(vars(module).items()):
        if isinstance(value, bool | str) or (isinstance(value, int) and not name.endswith(("idx", "index", "_id"))):
            kept.append((name, value))
        elif isinstance(value, float):
            kept.append((name, value != 0))
    return tuple(kept)


def read(block: nn.Module, call: Call | None) -> Reading:
    """Probe one block."""
    reading = Reading()
    if call is None:
        reading.refused[""] = "a forward on text alone does not call this block"
        return reading
    try:
        lab = Lab.of(block, call)
    except Exception as error:  # any family's code may fail here, and the user is told which block and why
        reading.refused[""] = f"a copy of the block does not run ({type(error).__name__}: {error})"
        return reading
    for name in [*lab.order, *(name for name in lab.linears if name not in lab.reads)]:
        if name not in lab.reads:
            reading.refused[name] = "a forward on text alone does not call it"
        elif not lab.computes_linear(name):
            reading.refused[name] = f"{type(lab.linears[name]).__name__} does not compute x Wᵀ + b"
        else:
            reading.linears[name] = lab.reads[name]
    width = hidden_of(lab.call.hidden).shape[-1]
    reading.ffns, refused = find_ffns(lab, width)
    reading.refused |= {f"{name} (ffn)": why for name, why in refused.items()}
    return reading


@dataclass
class _Build:
    """Readings to sites with full names; a parameter that two blocks share is listed once."""

    model: nn.Module
    owners: dict[int, str] = field(default_factory=dict)

    def block(self, index: int, name: str, module: nn.Module, reading: Reading) -> Block:
        sites, refused = [], {f"{name}.{part}".rstrip("."): why for part, why in reading.refused.items()}
        for linear, key in reading.linears.items():
            full = f"{name}.{linear}"
            owner = self.owners.setdefault(id(module.get_submodule(linear).weight), full)
            if owner == full:
                sites.append(self.site(full, "linear", index, {"weight": self.part(name, module, Rows(linear))}, 0,
                                       f"{name}.{key}"))  # fmt: skip
            else:
                refused[full] = f"its weight is that of {owner}"
        for ffn in reading.ffns:
            if all(f"{name}.{rows.linear}" not in refused for rows in ffn.parts.values()):
                parts = {role: self.part(name, module, rows) for role, rows in ffn.parts.items()}
                full = f"{name}.{ffn.name or 'ffn'}"
                sites.append(self.site(full, "ffn", index, parts, ffn.units, parts["down"].module))
        return Block(index=index, name=name, module=module, sites=tuple(sites), refused=refused)

    def part(self, block: str, module: nn.Module, rows: Rows) -> Part:
        linear = f"{block}.{rows.linear}"
        view = View(f"{linear}.weight", transposed=is_transposed(module.get_submodule(rows.linear)))
        return Part(linear, view, rows.start, rows.stride, rows.width)

    def site(self, name: str, kind: Kind, index: int, parts: dict, units: int, key: str) -> Site:
        if kind == "linear":
            weight = self.model.get_submodule(parts["weight"].module)
            units = weight.weight.numel()
        return Site(name=name, kind=kind, block=index, parts=parts, units=units, input=key, root=self.model)
