"""Neurons of an FFN in another order: the same function, with the rows of a group beside each other."""

from __future__ import annotations

import torch
from torch import Tensor

from pumice.sites import Site, owner


@torch.no_grad()
def reorder(site: Site, order: Tensor) -> None:
    """Neuron `i` becomes what `order[i]` was, in place: rows and biases of gate and up, columns of down."""
    every = torch.arange(site.units)
    moved: dict[str, Tensor] = {}  # parameter -> where each of its rows comes from
    for role in site.in_roles:
        part, matrix = site.parts[role], site.matrix(role)
        rows = moved.setdefault(part.view.parameter, torch.arange(matrix.shape[0]))
        rows[part.index(every)] = part.index(order.cpu())
    for role in site.in_roles:
        view = site.parts[role].view
        if view.parameter in moved:
            rows = moved.pop(view.parameter).to(site.matrix(role).device)
            site.matrix(role).copy_(site.matrix(role)[rows].clone())
            bias = getattr(site.root.get_submodule(owner(view.parameter)[0]), "bias", None)
            if bias is not None:
                bias.copy_(bias[rows].clone())
    part, down = site.parts["down"], site.matrix("down")
    down[:, part.index(every)] = down[:, part.index(order.cpu())].clone()
