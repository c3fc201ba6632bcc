"""How well a net tells the units that matter, on tokens that it was not trained on."""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from pumice.calib.units import weights_of_unit
from pumice.forms import Magnitude, Predicted, Select, Threshold, Tokens
from pumice.sites import Site


def needed_units(site: Site, a: Tensor, sparsity: float) -> Tensor:
    """The units of the largest outputs, bool [rows, units]: all but `sparsity` of them over all rows.

    Of a neuron |a_j|·‖down_:,j‖, of a KV group the norm of what its heads give.
    """
    weight = site.weight_of("down").norm(dim=0) if site.kind == "ffn" else None
    size = Magnitude(units=site.units, weight=weight).of_tokens(Tokens(a=lambda: a))
    return Threshold.removing(size, sparsity).keep(size)


def judged(site: Site, net: Predicted, cut, a: Tensor, live: Tensor, needed: Tensor, **settings) -> Select:
    """The Select of a trained net, with what it finds on held-out tokens: live and needed [rows, units]."""
    found = overlap(live, needed) | {"captured": captured(a, live, site.weight_of(site.out_role))}
    net = replace(net, **found)
    return Select(score=net, cut=cut, units=site.units, scope="token", weights=weights_of_unit(site), **settings)


def overlap(live: Tensor, needed: Tensor) -> dict[str, float]:
    """recall: of what is needed, the share that is live; precision: of what is live, the share that is needed."""
    both, wanted, kept = (int(t.sum()) for t in (live & needed, needed, live))
    return {"recall": both / wanted if wanted else 1.0, "precision": both / kept if kept else 1.0}


def captured(a: Tensor, live: Tensor, out: Tensor) -> float:
    """mean_t ‖W (a_t ⊙ live_t)‖ / ‖W a_t‖ of activations a [rows, channels], W [out, channels]."""
    live = live.repeat_interleave(a.shape[-1] // live.shape[-1], dim=-1)
    kept, whole = (F.linear(v, out).norm(dim=-1) for v in (a * live, a))
    return (kept / whole.clamp_min(1e-12)).mean().item()
