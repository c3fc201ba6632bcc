"""Find the decoder blocks of a model and the sites in them: structure first, numbers confirm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from pumice.arch.build import Builder
from pumice.arch.probe import BATCH, TOKENS, result_of
from pumice.arch.read import Reading, read
from pumice.arch.trace import Call, NotCalled, first_call, quiet, record, stand_ins
from pumice.errors import PumiceError
from pumice.sites import Block, Kind, Site


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

    @property
    def refused(self) -> dict[str, str]:
        """What has no site, over all blocks: name -> why."""
        return {name: why for block in self.blocks for name, why in block.refused.items()}


def detect(model: nn.Module) -> Arch:
    """Read the layout of a decoder-only language model.

    Blocks may be on the meta device; one block of each distinct structure is copied with random weights and probed.
    The model itself is only called with its blocks replaced by stubs, and left as it was.

    Raises PumiceError where no decoder blocks or no linear site can be found. What is not understood inside a block
    is listed in `Block.refused` with the reason.
    """
    if not hasattr(model, "config") or not hasattr(model, "get_input_embeddings"):
        raise PumiceError(f"{type(model).__name__} is not a Hugging Face language model: it has no config.")
    prefix, blocks, calls = decoder_blocks(model)
    readings: dict[tuple, Reading] = {}
    for block, call in zip(blocks, calls, strict=True):
        if call is not None and (key := structure(block)) not in readings:
            with quiet(block):
                readings[key] = read(block, call)
    uncalled = Reading(refused={"": "a forward on text alone does not call this block"})
    builder = Builder(model)
    arch = Arch(tuple(builder.block(index, f"{prefix}.{index}", block, readings.get(structure(block), uncalled))
                      for index, block in enumerate(blocks)))  # fmt: skip
    if not arch.of_kind("linear"):
        why = "; ".join(f"{name}: {reason}" for name, reason in list(arch.refused.items())[:4])
        raise PumiceError(f"No linear layer could be read in the {len(blocks)} blocks {prefix!r}. {why}")
    return arch


def decoder_blocks(model: nn.Module) -> tuple[str, list[nn.Module], list[Call | None]]:
    """The name and the modules of the ModuleList of decoder blocks, and one call for each.

    The list is the largest one of the configured depth that a forward on text alone reaches; an image encoder of the
    same depth is not.
    """
    names = {id(module): name for name, module in model.named_modules()}
    for blocks in candidates(model):
        try:
            return names[id(blocks)], list(blocks), recorded(model, list(blocks))
        except NotCalled:
            continue
    raise PumiceError(f"{type(model).__name__} has no list of decoder blocks that a forward on token ids calls.")


def candidates(model: nn.Module) -> list[nn.ModuleList]:
    """Lists of modules that may be the blocks, the likeliest first."""
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    inside = {id(module) for module in decoder.modules()}
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]

    def rank(blocks: nn.ModuleList) -> tuple:
        return id(blocks) in inside, len(blocks) == depth, sum(p.numel() for p in blocks.parameters())

    return sorted(lists, key=rank, reverse=True)


def recorded(model: nn.Module, blocks: list[nn.Module]) -> list[Call | None]:
    """One call for each block, on random tokens; None for a block that a forward on text alone does not reach."""
    ids = token_ids(model)
    with stand_ins(model, blocks):
        output = result_of(blocks[0], first_call(model, blocks[0], ids))
        calls, _ = record(model, blocks, ids, output, keep=True)
    return [mine[0] if mine else None for mine in calls]


def token_ids(model: nn.Module) -> torch.Tensor:
    """The same random sentence in every row of a batch, so that rows differ only by what a probe does to them."""
    table = next(model.get_input_embeddings().parameters())
    vocabulary = model.config.get_text_config().vocab_size
    row = torch.randint(3, vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    return row.expand(BATCH, -1).to("cpu" if table.is_meta else table.device)


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
