"""What the units of a site are worth for some tokens, by the loss of these tokens: the criteria of arXiv:2406.16635.

a: what the units give [spans, tokens, units, width];  g = ∂ℓ/∂a, ℓ the window's mean NLL.  Of an FFN without a gate, as
in the paper, z = W x + b before the activation, δ = ∂ℓ/∂z and ∂ℓ/∂W = Σ_t δ_t x_tᵀ stand in; of a gated FFN a and g do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pumice.arch.activations import ACTIVATIONS
from pumice.calib.gradients import mean, reverse
from pumice.calib.work import Work
from pumice.errors import PumiceError, unknown
from pumice.sites import Site


@dataclass(frozen=True, kw_only=True)
class Spans:
    """Some stretches of a window at one site, and what is known of their tokens."""

    a: Tensor  # [S, r, units, width]
    g: Tensor
    gold: Tensor  # [S, r], the token that follows each
    z: Tensor | None = None  # [S, r, units], of an FFN without a gate, as are the three below
    dz: Tensor | None = None
    x: Tensor | None = None  # [S, r, d]
    weight: Tensor | None = None  # [units, d]

    @property
    def neurons(self) -> bool:
        """Whether the paper's own formulas for an FFN's first matrix apply."""
        return self.weight is not None

    @property
    def alone(self) -> bool:
        """One token a span, whose ∂ℓ/∂W = δ xᵀ need not be made."""
        return self.neurons and self.x.shape[1] == 1

    def of_weights(self, worth: Callable[[Tensor], Tensor]) -> Tensor:
        """`worth` of ∂ℓ/∂W [units, d] of every span: [S, units]."""
        return torch.stack([worth(dz.T @ x) for dz, x in zip(self.dz, self.x, strict=True)])


def plainact(s: Spans) -> Tensor:
    """Σ_t |a·g|; of a matrix Σ_i |W·∂ℓ/∂W|."""
    if s.alone:
        return (s.dz.abs() * (s.x.abs() @ s.weight.abs().T))[:, 0]
    if s.neurons:
        return s.of_weights(lambda gradient: (s.weight * gradient).abs().sum(1))
    return (s.a * s.g).sum(-1).abs().sum(1)


def l2_norm(s: Spans) -> Tensor:
    """‖a‖, of a matrix ‖z‖, over tokens: what DejaVu looks at."""
    return s.z.norm(dim=1) if s.neurons else s.a.square().sum((1, 3)).sqrt()


def grad_norm(s: Spans) -> Tensor:
    """‖g‖ over tokens, of a matrix ‖∂ℓ/∂W‖."""
    if s.alone:
        return (s.dz.abs() * s.x.norm(dim=-1, keepdim=True))[:, 0]
    return s.of_weights(lambda gradient: gradient.norm(dim=1)) if s.neurons else s.g.square().sum((1, 3)).sqrt()


def fisher(s: Spans) -> Tensor:
    """mean_t Σ (a ⊙ g)², of a matrix mean_t (z·δ)²."""
    return (s.z * s.dz).square().mean(1) if s.neurons else (s.a * s.g).square().mean(1).sum(-1)


def snip(s: Spans) -> Tensor:
    """Σ_t |g|, of a matrix Σ_t |δ|: the released code's, which is the gradient of a mask of ones."""
    return s.dz.abs().sum(1) if s.neurons else s.g.abs().sum((1, 3))


def grasp(s: Spans) -> Tensor:
    """-mean_t a·g, of a matrix -mean_i W·∂ℓ/∂W: the released code's; GraSP itself asks for the Hessian."""
    if s.alone:
        return -(s.dz * (s.x @ s.weight.T))[:, 0] / s.weight.shape[1]
    if s.neurons:
        return s.of_weights(lambda gradient: -(s.weight * gradient).mean(1))
    return -(s.a * s.g).sum(-1).mean(1)


def nwot(s: Spans) -> Tensor:
    """Of a neuron log mean_t 1[a ≤ 0]; of a head log|det (1-x)ᵀ(1-x)/r + I·1e-3|, x = 1[a > 0] over its tokens."""
    asleep = 1 - ((s.z if s.neurons else s.a) > 0).float()
    if asleep.dim() == 3 or asleep.shape[-1] == 1:
        tokens = asleep.shape[1]
        return asleep.reshape(*asleep.shape[:3]).mean(1).clamp_min(0.5 / tokens).log()
    found = []
    for rows in asleep.transpose(1, 2):  # [units, r, width]; a span at a time, since kernels are large
        kernel = rows.transpose(-1, -2) @ rows / rows.shape[1]
        found.append(torch.linalg.slogdet(kernel + 1e-3 * torch.eye(kernel.shape[-1], device=kernel.device))[1])
    return torch.stack(found)


def jacov(s: Spans) -> Tensor:
    """-Σ log(|λ|+ε) + 1/(|λ|+ε) of the correlations among the gradients of up to 200 tokens, mean of ten draws."""
    _heads(s, "jacov")
    rows = s.g.transpose(1, 2)
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(10):
        drawn = torch.randperm(rows.shape[2], generator=generator)[:200].to(rows.device)
        size = torch.linalg.eigvalsh(_correlated(rows[:, :, drawn])).abs() + 1e-5
        found.append(-(size.log() + 1 / size).sum(-1))
    return torch.stack(found).mean(0)


def epenas(s: Spans) -> Tensor:
    """Σ over pairs of gold tokens |C_i - C_j|, C_k = Σ log|correlations| of the gradients at token k, five or more."""
    _heads(s, "epenas")
    found = s.g.new_zeros(s.g.shape[0], s.g.shape[2], dtype=torch.float64)
    for i, gold in enumerate(s.gold):
        tokens, counts = gold.unique(return_counts=True)
        sizes = []
        for token in tokens[counts >= 5]:
            size = _correlated(s.g[i, gold == token].transpose(0, 1)).abs() + 1e-5  # [units, n, n]
            sizes.append(size.log().sum((1, 2)))
        for k, one in enumerate(sizes):
            found[i] += sum((one - other).abs() for other in sizes[:k])
    return found


CRITERIA = {
    function.__name__: function for function in (plainact, l2_norm, grad_norm, fisher, snip, grasp, nwot, jacov, epenas)
}
OF_NEURONS = tuple(name for name in CRITERIA if name not in ("jacov", "epenas"))


def _heads(s: Spans, name: str) -> None:
    if s.neurons or s.a.shape[-1] == 1:
        raise PumiceError(f"{name} compares the gradients of a head's channels and says nothing of a neuron.")
    if s.a.shape[1] < 5:
        raise PumiceError(f"{name} compares tokens; {s.a.shape[1]} at a time are too few (every=0 takes more).")


def _correlated(rows: Tensor) -> Tensor:
    """Correlations [.., n, n] among rows [.., n, width], in fp64: more tokens than channels leave eigenvalues of 0."""
    rows = rows.double()
    rows = rows - rows.mean(-1, keepdim=True)
    rows = rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return rows @ rows.transpose(-1, -2)


def worth(criterion: str, site: Site, taps: dict[str, tuple[Tensor, Tensor]], at: Tensor, gold: Tensor) -> Tensor:
    """A criterion of every unit over the tokens `at` [S, r] of one window: [S, units], fp32.

    `taps`: values and gradients [tokens, width] by the site's `input`, and by its `entry` for an FFN without a gate.
    """
    if criterion not in CRITERIA:
        raise unknown("criterion", criterion, CRITERIA)
    a, g = (t.float()[at].unflatten(-1, (site.units, -1)) for t in taps[site.input])  # [S, r, units, width]
    plain = {}
    if site.kind == "ffn" and "gate" not in site.parts and site.activation:
        weight, bias = site.rows("up"), site.bias("up")
        rows = site.parts["up"].index(torch.arange(site.units, device=weight.device))
        x = taps[site.entry][0].float()[at]
        with torch.enable_grad():
            z = F.linear(x, weight, None if bias is None else bias[rows]).requires_grad_()
            (dz,) = torch.autograd.grad(ACTIVATIONS[site.activation](z), z, g[..., 0])
        plain = {"z": z.detach(), "dz": dz, "x": x, "weight": weight}
    return CRITERIA[criterion](Spans(a=a, g=g, gold=gold.to(at.device)[at], **plain)).float()


def mean_worth(work: Work, criterion: str, sites: list[Site]) -> dict[str, Tensor]:
    """A criterion of every unit over all tokens of a window but the last, mean over windows: [units] by site, fp64."""
    by_block: dict[int, list[Site]] = {}
    for site in sites:
        by_block.setdefault(site.block, []).append(site)
    total = {site.name: torch.zeros(site.units, dtype=torch.float64) for site in sites}

    def visit(block, i: int, gradients: dict, taps: dict[str, tuple[Tensor, Tensor]]) -> None:
        for site in by_block.get(block.index, []):
            at = torch.arange(len(taps[site.input][0]) - 1)[None]
            total[site.name] += worth(criterion, site, taps, at, work.windows.ids[i])[0].double().cpu()

    return mean(total, reverse(work, visit, taps=True, title=f"{criterion}: blocks"))
