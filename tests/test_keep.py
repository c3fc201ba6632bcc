"""Fine-tuning with KeepMask: every zero stays zero, and a merged LoRA is what was trained."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

import pumice
from pumice.api import sparsify
from pumice.arch.detect import detect
from pumice.methods.static.magnitude import Magnitude
from pumice.plan import Plan
from pumice.train.keep import KeepMask
from tiny import tiny


def rows(count=16):
    ids = torch.randint(3, 96, (count, 12), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def trained(model, folder, *callbacks, lr=1e-2):
    settings = TrainingArguments(
        str(folder), max_steps=6, learning_rate=lr, weight_decay=0.1, per_device_train_batch_size=4,
        report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, seed=0,
    )  # fmt: skip
    Trainer(model=model, args=settings, train_dataset=rows(), callbacks=list(callbacks)).train()
    return model.eval()


def zeros(model, plan):
    sites = detect(model).sites
    return [sites[name].matrix().detach()[~mask.keep] for name, mask in plan.weights.items()]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_every_zero_stays_zero_and_the_rest_learns(family, tmp_path):
    model = tiny(family)
    plan = sparsify(model, Magnitude(sparsity=0.5))
    keep = KeepMask(model, plan)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trained(model, tmp_path, keep)
    assert all(not gone.any() for gone in zeros(model, plan))
    for site in detect(model).of_kind("linear"):
        mask = plan.weights[site.name].keep
        start = site.parts["weight"].view.of(before[site.parts["weight"].view.parameter])
        assert ((site.matrix().detach() != start)[mask].float().mean()) > 0.3  # an expert may see no token
    assert not keep.hooks


def test_without_it_the_zeros_are_lost(tmp_path):
    model = tiny("llama")
    plan = sparsify(model, Magnitude(sparsity=0.5))
    KeepMask(model, plan)
    trained(model, tmp_path)
    assert any(gone.any() for gone in zeros(model, plan))


def test_the_saved_folder_is_one_that_loads(tmp_path):
    model = tiny("llama")
    plan = sparsify(model, Magnitude(sparsity=0.5))
    keep = KeepMask(model, plan)
    trained(model, tmp_path / "run", keep)
    keep.save(model, None, tmp_path / "out")
    again = Plan.load(tmp_path / "out")
    with again.applied(model):  # it fits the weights that training made
        pass
    with pytest.raises(pumice.PumiceError, match="weights"), again.applied(tiny("llama")):
        pass
    next(iter(detect(model).sites.values())).matrix().data.fill_(1.0)
    with pytest.raises(pumice.PumiceError, match="not zero"):
        keep.save(model, None, tmp_path / "other")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_merged_lora_is_the_one_that_was_trained(family, tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny(family)
    plan = sparsify(model, Magnitude(sparsity=0.5))
    keep = KeepMask(model, plan)
    targets = ["q_proj", "up_proj"] if family == "llama" else ["c_attn", "c_fc"]
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=family == "gpt2", lora_dropout=0.1
    )
    adapted = trained(peft.get_peft_model(model, settings), tmp_path, keep)
    ids = torch.randint(3, 96, (2, 10))
    with torch.no_grad():
        base = KeepMask(tiny(family), plan)  # not the model in training: only its zeros are compared below
        adapters_on = adapted(ids).logits
        merged = keep.merge(adapted)
        assert torch.allclose(merged(ids).logits, adapters_on, atol=1e-4)
    assert all(not gone.any() for gone in zeros(merged, plan))
    assert any((p != q).any() for (p, _), (q, _) in zip(keep.kept, base.kept, strict=True))


def test_errors_say_what_to_do(tmp_path):
    model = tiny("llama")
    with pytest.raises(pumice.PumiceError, match="no masks"):
        KeepMask(model, Plan())
    plan = sparsify(model, Magnitude(sparsity=0.5))
    with pytest.raises(pumice.PumiceError, match="another model"):
        KeepMask(tiny("opt"), plan)
    with pytest.raises(pumice.PumiceError, match="same model"):
        trained(tiny("llama"), tmp_path, KeepMask(model, plan))
    with pytest.raises(pumice.PumiceError, match="no adapters"):
        KeepMask(model, plan).merge(model)
