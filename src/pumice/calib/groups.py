"""Groups of neurons of one size: balanced k-means, deterministic, after arXiv:2110.01786.

Centres by k-means++. Then, until the inertia stops falling: every neuron goes to its nearest centre that has room,
those first that would lose most by the second nearest; neurons change places where both together lie nearer then; and
each centre moves to the mean of its members.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from pumice.errors import PumiceError

ROUNDS, PATIENCE = 50, 4


def check_size(units: int, size: int, what: str) -> None:
    if size < 1 or units % size:
        fits = [n for n in range(1, units + 1) if units % n == 0 and n <= 256]
        raise PumiceError(f"{what}: {units} neurons are no whole number of groups of {size}. Sizes that fit: {fits}.")


def drawn(units: int, size: int, seed: int) -> Tensor:
    """The group of each unit [units], at random."""
    order = torch.randperm(units, generator=torch.Generator().manual_seed(seed))
    return torch.empty_like(order).scatter_(0, order, torch.arange(units) // size)


def balanced(features: Tensor, size: int, seed: int = 0, title: str = "") -> Tensor:
    """The group of each unit, int64 [units], numbered from 0, of the rows of features [units, d] at length 1."""
    units = len(features)
    check_size(units, size, title or "groups")
    if not bool(features.isfinite().all()):
        raise PumiceError(f"{title or 'groups'}: some features are NaN or infinite.")
    x = F.normalize(features.float(), dim=1)
    centres = _seeded(x, units // size, seed)
    best, found, waited = float("inf"), None, 0
    with tqdm(total=ROUNDS, desc=title or "groups", unit="round", leave=False, disable=None if title else True) as bar:
        for _ in range(ROUNDS):
            cost = _cost(x, centres)
            members = _exchanged(cost, _assigned(cost, size), size)
            inertia = cost.gather(1, members[:, None]).double().sum().item()
            waited = 0 if inertia < best * (1 - 1e-4) else waited + 1
            if inertia < best:
                best, found = inertia, members
            if waited == PATIENCE:
                break
            centres = means(x, members, len(centres))
            bar.set_postfix(inertia=f"{inertia / units:.4f}")
            bar.update()
    return found


def means(x: Tensor, members: Tensor, groups: int) -> Tensor:
    """The mean of each group's rows, [groups, d]."""
    total = x.new_zeros(groups, x.shape[1]).index_add_(0, members, x)
    return total / members.bincount(minlength=groups)[:, None]


def _cost(x: Tensor, centres: Tensor) -> Tensor:
    """‖x - c‖² but for ‖x‖ = 1, [units, groups]."""
    return centres.square().sum(1) - 2 * (x @ centres.T) + 1


def _seeded(x: Tensor, groups: int, seed: int) -> Tensor:
    """k-means++: each next centre drawn with probability in proportion to its squared distance from those before."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(x), (), generator=generator))]
    distance = x.new_full((len(x),), float("inf"))
    for _ in range(1, groups):
        distance = torch.minimum(distance, (2 - 2 * (x @ x[chosen[-1]])).clamp_min(0))
        distance[chosen[-1]] = 0
        odds = distance if bool(distance.sum() > 0) else torch.ones_like(distance)
        chosen.append(int(torch.multinomial(odds.cpu(), 1, generator=generator)))
    return x[chosen]


def _assigned(cost: Tensor, size: int) -> Tensor:
    """Greedy: the nearest group with room, the largest regret first."""
    units, groups = cost.shape
    if groups == 1:
        return torch.zeros(units, dtype=torch.long)
    two = cost.topk(2, dim=1, largest=False).values
    order = (two[:, 0] - two[:, 1]).argsort(stable=True).tolist()
    wanted = cost.argsort(dim=1, stable=True).cpu().numpy()
    room, members = [size] * groups, torch.empty(units, dtype=torch.long)
    for unit in order:
        group = next(g for g in wanted[unit] if room[g])
        room[group] -= 1
        members[unit] = int(group)
    return members


def _exchanged(cost: Tensor, members: Tensor, size: int, passes: int = 4) -> Tensor:
    """Units of two groups change places as long as that lowers the sum of their costs."""
    cost = cost.cpu()
    inside = members.argsort(stable=True).view(-1, size)  # [groups, size]
    nearest = cost.argmin(1)
    for _ in range(passes):
        now = cost.gather(1, members[:, None])[:, 0]
        waiting = (members != nearest).nonzero()[:, 0]
        changed = 0
        for unit in waiting[(now - cost.gather(1, nearest[:, None])[:, 0])[waiting].argsort(descending=True)].tolist():
            mine, theirs = int(members[unit]), int(nearest[unit])
            if mine == theirs:
                continue
            others = inside[theirs]
            gain = cost[unit, mine] - cost[unit, theirs] + cost[others, theirs] - cost[others, mine]
            at = int(gain.argmax())
            if gain[at] <= 1e-7:
                continue
            other = int(others[at])
            inside[mine, (inside[mine] == unit).nonzero()[0, 0]] = other
            inside[theirs, at] = unit
            members[unit], members[other] = theirs, mine
            changed += 1
        if not changed:
            break
    return members
