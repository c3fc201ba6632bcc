"""The reverse pass gives the gradients of the whole model, with one block in memory."""

import pytest
import torch
import torch.nn.functional as F

import pumice
from pumice.arch.detect import detect
from pumice.arch.weights import Resident, Shards
from pumice.calib.data import Windows, tokens
from pumice.calib.gradients import fisher_trace, reverse, unit_fisher
from pumice.calib.spill import Spill
from pumice.calib.work import Work
from pumice.errors import PumiceError
from tiny import FAMILIES, tiny

IDS = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(1))


def work_on(model, windows=None, source=None, **settings):
    arch = detect(model)
    windows = tokens(IDS) if windows is None else windows
    sites = arch.of_kind("linear")
    return Work(model=model, arch=arch, windows=windows, source=source or Resident(model), sites=sites, **settings)


def whole(model, windows):
    """Gradients of every window by autograd on the whole model: [{name: gradient}]."""
    found = []
    for ids, valid in zip(windows.ids, windows.valid, strict=True):
        model.zero_grad()
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        logits = model(ids[None], attention_mask=None if bool(valid.all()) else valid[None].long()).logits
        nll = F.cross_entropy(logits[0, :-1], ids[1:], reduction="none")
        nll[valid[1:] & valid[:-1]].mean().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    return found


def padded():
    valid = torch.ones_like(IDS, dtype=torch.bool)
    valid[1, :4] = False
    return Windows(ids=IDS, valid=valid, protocol={"source": "test", "windows": 3, "window": 12})


@pytest.mark.parametrize("text", ["whole", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_whole_model(family, text):
    windows = tokens(IDS) if text == "whole" else padded()
    expected, model = whole(tiny(family), windows), tiny(family)
    before = {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    found = [{} for _ in IDS]
    assert reverse(work_on(model, windows), lambda block, i, gradients, taps: found[i].update(gradients)) == len(IDS)
    prefix = detect(model).blocks[0].name.rpartition(".")[0]
    for mine, theirs in zip(found, expected, strict=True):
        blocks = {name: g for name, g in theirs.items() if name.startswith(f"{prefix}.")}
        assert blocks.keys() <= mine.keys() or all(not g.any() for n, g in blocks.items() if n not in mine)
        for name, gradient in mine.items():
            scale = blocks[name].abs().max().clamp_min(1e-6)
            assert torch.allclose(gradient, blocks[name], rtol=1e-4, atol=1e-5 * float(scale)), name
    for name, p in model.named_parameters():
        assert (id(p), p.requires_grad) == before[name][:2] and torch.equal(p, before[name][2]) and p.grad is None


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mixtral"])
def test_fisher_trace_is_the_mean_square_gradient(family):
    expected, model = whole(tiny(family), tokens(IDS)), tiny(family)
    work = work_on(model)
    found = fisher_trace(work)
    for site in work.sites:
        view = site.parts["weight"].view
        squares = [view.of(g[view.parameter]).double().square().sum() for g in expected]
        assert found[site.name] == pytest.approx(float(sum(squares) / len(squares)), rel=1e-4, abs=1e-12), site.name


def test_unit_fisher_is_the_change_of_the_loss_when_a_unit_is_scaled():
    model = tiny("llama").double()
    work = work_on(model)
    ffn = [site for site in work.arch.of_kind("ffn") if site.block == 1]
    found = unit_fisher(work, [*ffn, *work.arch.of_kind("heads")])
    site, worth = ffn[0], torch.zeros(ffn[0].units, dtype=torch.float64)
    down = model.get_parameter(site.parts["down"].view.parameter)

    def loss(ids):
        return F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:])

    with torch.no_grad():
        for unit in range(0, site.units, 7):
            for ids in IDS:
                column = down[:, unit].clone()
                down[:, unit] = column * (1 + 1e-2)
                high = loss(ids)
                down[:, unit] = column * (1 - 1e-2)
                worth[unit] += ((high - loss(ids)) / 2e-2) ** 2 / len(IDS)
                down[:, unit] = column
            assert found[site.name][unit] == pytest.approx(float(worth[unit]), rel=2e-2)
    assert all(len(found[s.name]) == s.units for s in work.arch.of_kind("heads"))


def test_shards_and_files_give_the_same_gradients(tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    source = Shards(tmp_path / "model")
    streamed = fisher_trace(work_on(source.model, source=source, spill=Spill(0, tmp_path / "spill")))
    assert streamed == fisher_trace(work_on(model))
    assert all(parameter.is_meta for parameter in source.model.parameters())


def test_a_full_disk_leaves_the_model_as_it_was(monkeypatch):
    model, kept = tiny("llama").to(torch.bfloat16), []
    before = {name: (id(p), p.dtype) for name, p in model.named_parameters()}

    def keep(self, tensor):
        kept.append(tensor)
        if len(kept) > 5:
            raise PumiceError("no space")
        return tensor

    monkeypatch.setattr(Spill, "keep", keep)
    with pytest.raises(PumiceError, match="no space"):
        pumice.sparsify(model, {"method": "wanda", "allocation": "sensitivity"}, IDS, resume=False)
    assert {name: (id(p), p.dtype) for name, p in model.named_parameters()} == before
