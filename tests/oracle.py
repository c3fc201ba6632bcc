"""What the papers say, written again without Pumice: the other side of every comparison in these tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

BLOCKS = {"gpt2": "transformer.h", "bloom": "transformer.h", "falcon": "transformer.h", "opt": "model.decoder.layers",
          "gpt_neox": "gpt_neox.layers"}  # fmt: skip


def prefix(family: str) -> str:
    return BLOCKS.get(family, "model.layers")


def blocks(model: nn.Module, family: str) -> list[tuple[str, nn.Module]]:
    name = prefix(family)
    return [(f"{name}.{i}", block) for i, block in enumerate(model.get_submodule(name))]


def experts_in(block: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in block.named_modules() if isinstance(getattr(m, "gate_up_proj", None), nn.Parameter)}


def matrices(name: str, block: nn.Module) -> dict[str, Tensor]:
    """Site name -> [out, in], sharing memory with the block."""
    found = {}
    for key, module in block.named_modules():
        if isinstance(module, Conv1D):
            found[f"{name}.{key}"] = module.weight.data.T
        elif isinstance(module, nn.Linear):
            found[f"{name}.{key}"] = module.weight.data
    for key, module in experts_in(block).items():
        for expert in range(module.gate_up_proj.shape[0]):
            found[f"{name}.{key}.gate_up_proj[{expert}]"] = module.gate_up_proj.data[expert]
            found[f"{name}.{key}.down_proj[{expert}]"] = module.down_proj.data[expert]
    return found


def expert_tensors(module: nn.Module, hidden: Tensor, index: Tensor, expert: int) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, inputs, activations) of one SwiGLU expert."""
    tokens = (index == expert).any(-1).nonzero().flatten()
    x = hidden.reshape(-1, hidden.shape[-1])[tokens]
    gate, up = (x @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
    return tokens, x, F.silu(gate) * up


@contextmanager
def inputs_of(name: str, block: nn.Module, valid: Tensor) -> Iterator[dict[str, list[Tensor]]]:
    """Collect, while it is open, the rows that enter each matrix of a block; `valid` [B, T] says which count."""
    seen: dict[str, list[Tensor]] = {}

    def note(key: str) -> Callable:
        return lambda module, args: seen.setdefault(key, []).append(args[0].reshape(valid.numel(), -1)[valid.flatten()])

    def note_experts(key: str) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            hidden, index = args[:2]
            for expert in range(module.gate_up_proj.shape[0]):
                tokens, x, a = expert_tensors(module, hidden, index, expert)
                kept = valid.flatten()[tokens]
                seen.setdefault(f"{key}.gate_up_proj[{expert}]", []).append(x[kept])
                seen.setdefault(f"{key}.down_proj[{expert}]", []).append(a[kept])

        return hook

    handles = [
        module.register_forward_pre_hook(note(f"{name}.{key}"))
        for key, module in block.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    ]
    handles += [m.register_forward_pre_hook(note_experts(f"{name}.{k}")) for k, m in experts_in(block).items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def prune(model: nn.Module, family: str, ids: Tensor, keep_of: Callable, valid: Tensor | None = None) -> dict:
    """Prune `model` in place, block after block, so that each sees the pruned blocks before it.

    `keep_of(weight [out, in], inputs [tokens, in])` gives the keep mask as numpy; returns them by site name.
    """
    mask = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
    kept = {}
    for name, block in blocks(model, family):
        with inputs_of(name, block, mask) as seen:
            model(ids, attention_mask=None if valid is None else valid.long(), use_cache=False)
        for key, weight in matrices(name, block).items():
            kept[key] = keep_of(weight.numpy(), torch.cat(seen[key]).numpy())
            weight[torch.from_numpy(~kept[key])] = 0
    return kept


def keep(score: np.ndarray, pattern: str, sparsity: float) -> np.ndarray:
    """row, free or N:M: drop the lowest, the first of equals first."""
    if pattern == "free":
        return keep(score.reshape(1, -1), "row", sparsity).reshape(score.shape)
    if ":" in pattern:
        n, m = map(int, pattern.split(":"))
        groups = [score[:, i : i + m] for i in range(0, score.shape[1], m)]
        return np.concatenate([_drop(g, g.shape[1] * (m - n) // m) for g in groups], axis=1)
    each, more = divmod(int(score.size * sparsity + 1e-9), len(score))
    kept = _drop(score, each)
    following = np.where(kept, score, np.inf).min(1)  # the matrix's exact share: one more from the rows of least next
    for row in np.argsort(following, kind="stable")[:more]:
        kept[row, np.argmin(np.where(kept[row], score[row], np.inf))] = False
    return kept


def _drop(score: np.ndarray, k: int) -> np.ndarray:
    kept = np.ones(score.shape, dtype=bool)
    for row, order in enumerate(np.argsort(score, axis=1, kind="stable")):
        kept[row, order[:k]] = False
    return kept


def wanda(pattern: str, sparsity: float) -> Callable:
    """|W_ij|·‖X_j‖₂"""

    def of(weight: np.ndarray, inputs: np.ndarray) -> np.ndarray:
        norm = np.sqrt((inputs.astype(np.float64) ** 2).sum(0)).astype(np.float32)
        return keep(np.abs(weight) * norm[None, :], pattern, sparsity)

    return of


def magnitude(pattern: str, sparsity: float) -> Callable:
    return lambda weight, inputs: keep(np.abs(weight), pattern, sparsity)


# ---- FFN activations and GRIFFIN ------------------------------------------------------------------------------------

DOWN = {"opt": "fc2", "gpt2": "mlp.c_proj", "gpt_neox": "mlp.dense_4h_to_h", "falcon": "mlp.dense_4h_to_h",
        "bloom": "mlp.dense_4h_to_h"}  # fmt: skip


@torch.no_grad()
def activations(model: nn.Module, family: str, ids: Tensor, valid: Tensor) -> dict[str, list[Tensor]]:
    """What enters the last matrix of each FFN, for each row of the batch: [valid tokens that reach it, units] in fp64.

    Keys are the FFN's module, or `module[expert]`.
    """
    found: dict[str, list[Tensor]] = {}
    rows, width = ids.shape
    handles = []

    def note(key: str) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            z = args[0].reshape(rows, width, -1).double()
            found[key] = [z[row][valid[row]] for row in range(rows)]

        return hook

    def note_experts(key: str) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            for expert in range(module.gate_up_proj.shape[0]):
                tokens, _, z = expert_tensors(module, *args[:2], expert)
                mine = [(tokens // width == row) & valid.flatten()[tokens] for row in range(rows)]
                found[f"{key}[{expert}]"] = [z[m].double() for m in mine]

        return hook

    for name, block in blocks(model, family):
        for key, module in experts_in(block).items():
            handles.append(module.register_forward_pre_hook(note_experts(f"{name}.{key}")))
        down = DOWN.get(family, "mlp.down_proj")
        if down in dict(block.named_modules()):
            ffn = f"{name}.{down.rpartition('.')[0] or 'ffn'}"
            handles.append(block.get_submodule(down).register_forward_pre_hook(note(ffn)))
    try:
        model(ids, attention_mask=valid.long(), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def griffin(z: Tensor) -> np.ndarray:
    """s_j = ‖ z_tj/‖z_t‖ ‖ over tokens, [units]; a token that is zero says nothing."""
    norm = z.norm(dim=1, keepdim=True)
    return torch.where(norm > 0, z / norm, 0).square().sum(0).sqrt().numpy()


def live(score: np.ndarray, sparsity: float) -> np.ndarray:
    return keep(score[None], "row", sparsity)[0]


def rank(score: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(score, kind="stable"), kind="stable")


@contextmanager
def masked(model: nn.Module, family: str, sets: dict[str, np.ndarray], border: int | list[int]) -> Iterator[None]:
    """While open, the dead units of each row are zero from position `border` on; for forwards without a cache.

    `sets`: live units [rows, units] by FFN. Where a batch has more rows, each one is repeated (beams).
    """
    shape: list[int] = []  # rows and positions of this forward

    def dead_of(key: str) -> Tensor:
        rows, width = shape
        live = torch.from_numpy(sets[key]).repeat_interleave(rows // len(sets[key]), dim=0)
        first = torch.as_tensor(border).reshape(-1).expand(len(sets[key])).repeat_interleave(rows // len(sets[key]))
        return ~live[:, None, :] & (torch.arange(width)[None] >= first[:, None])[..., None]  # [rows, width, units]

    def note_shape(module: nn.Module, args: tuple, kwargs: dict) -> None:
        shape[:] = (args[0] if args else kwargs["input"]).shape[:2]

    def zero(key: str) -> Callable:
        def hook(module: nn.Module, args: tuple) -> tuple:
            a = args[0]
            return (torch.where(dead_of(key).reshape(*a.shape), 0, a),)

        return hook

    def experts(key: str, module: nn.Module) -> Callable:
        def forward(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            out = torch.zeros_like(hidden)
            for expert in range(module.gate_up_proj.shape[0]):
                tokens, _, a = expert_tensors(module, hidden, index, expert)
                if f"{key}[{expert}]" in sets:
                    a = torch.where(dead_of(f"{key}[{expert}]").flatten(0, 1)[tokens], 0, a)
                share = (weights * (index == expert)).sum(-1)[tokens]
                out[tokens] += share[:, None] * (a @ module.down_proj[expert].T)
            return out

        return forward

    handles = [model.get_input_embeddings().register_forward_pre_hook(note_shape, with_kwargs=True)]
    replaced = []
    for name, block in blocks(model, family):
        down = DOWN.get(family, "mlp.down_proj")
        ffn = f"{name}.{down.rpartition('.')[0] or 'ffn'}"
        if ffn in sets:
            handles.append(block.get_submodule(down).register_forward_pre_hook(zero(ffn)))
        for key, module in experts_in(block).items():
            module.forward = experts(f"{name}.{key}", module)
            replaced.append(module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in replaced:
            del module.forward
