"""train: a model learns to need less, on the trainer of transformers; the plan then leaves the rest out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from pumice import __version__, recipe
from pumice.api import attach, sparsify
from pumice.arch.detect import detect
from pumice.calib import parallel
from pumice.errors import PumiceError
from pumice.eval.perplexity import Perplexity, combine
from pumice.hub.folder import check_target, replacing, same_permissions, told
from pumice.hub.save import save
from pumice.plan import Plan, fingerprint_model
from pumice.train.adapt import Adapt
from pumice.train.stage import Stage
from pumice.train.text import Lessons, lessons, padded, windows_of
from pumice.train.trainer import StageTrainer


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train, whatever the method."""

    epochs: float = 1.0
    steps: int = 0  # of the optimiser, all stages together; 0: as many as `epochs` take
    batch: int = 8  # examples of a forward, on each device
    accumulate: int = 1  # forwards of a step
    lr: float = 5e-5
    warmup: float = 0.06  # of a stage's steps
    schedule: str = "cosine"
    weight_decay: float = 0.0
    lora: int = 0  # rank of adapters on every linear layer; 0: all weights are trained
    bf16: bool = False
    save_every: int = 0  # steps; 0: ten times a stage
    report_to: str = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"epochs": 0.0, "steps": 0, "batch": 1, "accumulate": 1, "lora": 0, "save_every": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise PumiceError(f"{name} is {low:g} or more; got {getattr(self, name)}.")
        if not self.lr > 0 or not 0 <= self.warmup < 1 or not (self.steps or self.epochs):
            raise PumiceError("lr is above 0, warmup from 0 to below 1, and one of steps and epochs above 0.")


@dataclass(frozen=True)
class Trained:
    """What came of it: on text that was neither learnt nor calibrated on."""

    plan: Plan | None
    before: Perplexity
    dense: Perplexity  # of the trained weights without the plan
    sparse: Perplexity | None  # None: what is sparse are the weights themselves
    active: float | None  # share of units that ran on that text
    tokens: int  # that were learnt


def train(
    model: nn.Module,
    method: Any,
    data: Any,
    out: str | Path,
    *,
    tokenizer=None,
    window: int = 512,
    name: str | None = None,
    resume: bool = True,
    settings: Settings | None = None,
) -> Trained:
    """Train `model` in place and write it to `out`, an ordinary folder with its plan.

    `method`: one that trains (`lte`, `prosparse`, `qsparse`); one of `sparsify`, whose choices or zeros then hold in
    training (`cats`, `wanda`); or None for plain fine-tuning. `data`: a source, texts, token ids, or
    `file:PATH#prompt,answer`. A run that was killed goes on from its last checkpoint, in a hidden folder beside `out`
    that goes when all is written.
    """
    settings = settings or Settings()
    said = None if method is None else recipe.describe(method)
    if method is not None and not hasattr(method, "begin"):
        method = Adapt(method=method)
    out = check_target(out)
    text = lessons(data, tokenizer, window=window, seed=settings.seed)
    base = name or getattr(model, "name_or_path", "") or type(model).__name__
    stamp = _stamp(model, said, text, settings)
    before = scored(model, text.measure)
    dense = deepcopy(model).eval().requires_grad_(False) if getattr(method, "distill", 0) else None
    arch = detect(model)
    if method is not None:  # by every process for itself: what learns from samples is not shared among them
        arch = method.begin(model, arch, windows_of(text.calibrate, text.protocol))
    stages = method.stages(model, dense) if method is not None else [Stage()]
    with parallel.joined() as first:
        examples = settings.batch * settings.accumulate * parallel.world()  # of a step
        steps = settings.steps or max(1, round(settings.epochs * len(text.learn) / examples))
        work = Work(out, stamp, settings, resume)
        with adapted(model, settings.lora) as whole:
            for number, stage in enumerate(stages):
                work.run(number, stage, whole, model, arch, text, max(1, round(steps * stage.share)))
    model.eval()
    plan = None
    if method is not None:
        batches = [padded(part) for part in _parts(text.calibrate, settings.batch)]
        ready = method.finish(model, arch, stages, batches)
        plan = ready
        if not isinstance(ready, Plan):
            plan = sparsify(model, ready, windows_of(text.calibrate, text.protocol), resume=False, check=False)
        made = said | {"training": vars(settings)}
        plan = replace(plan, recipe=[made], base={**plan.base, "name": str(out), "trained_from": base})
    found = measured(model, plan, before, text, steps * examples)
    if first and plan is None:
        write_plain(model, tokenizer, out)
    elif first:
        save(model, tokenizer, replace(plan, measurements=figures(found)), out)
    work.remove(first)
    return found


def _stamp(model: nn.Module, method: dict | None, text: Lessons, settings: Settings) -> str:
    """What a run has to share with the one that it goes on from."""
    said = {"pumice": __version__, "weights": fingerprint_model(model), "text": text.protocol}
    said |= {"method": method, "settings": vars(settings)}
    return json.dumps(said, sort_keys=True)


def _parts(rows: list, size: int) -> list[list]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


class Work:
    """The hidden folder of a run: a folder of checkpoints for every stage, and what says whose they are."""

    def __init__(self, out: Path, stamp: str, settings: Settings, resume: bool) -> None:
        self.folder, self.settings = out.with_name(f".{out.name}.train"), settings
        path = self.folder / "run.json"
        if parallel.rank() == 0:
            if not (resume and path.exists() and path.read_text() == stamp):
                shutil.rmtree(self.folder, ignore_errors=True)
            with told(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                path.write_text(stamp)
        parallel.agreed(stamp)  # nobody looks for checkpoints before

    def run(self, number: int, stage: Stage, whole, model, arch, text: Lessons, steps: int) -> None:
        """One stage, from its last checkpoint if there is one."""
        s, folder = self.settings, self.folder / f"stage-{number + 1}"
        arguments = TrainingArguments(
            str(folder), max_steps=steps, per_device_train_batch_size=s.batch, learning_rate=s.lr,
            gradient_accumulation_steps=s.accumulate, lr_scheduler_type=s.schedule, weight_decay=s.weight_decay,
            warmup_steps=int(s.warmup * steps), bf16=s.bf16, seed=s.seed + number, data_seed=s.seed + number,
            save_steps=s.save_every or max(1, steps // 10), save_total_limit=1, logging_steps=max(1, steps // 20),
            report_to=s.report_to, run_name=f"{self.folder.name}-{stage.name}", remove_unused_columns=False,
            use_cpu=next(model.parameters()).device.type == "cpu", dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = StageTrainer(
            stage=stage,
            arch=arch,
            model=whole,
            args=arguments,
            train_dataset=text.learn,
            data_collator=padded,
            callbacks=list(stage.callbacks),
        )
        last = get_last_checkpoint(str(folder)) if folder.exists() else None
        with stage.on(model, arch):
            if not (last and trainer.finished(last)):  # transformers would make one step more
                trainer.train(resume_from_checkpoint=last)

    def remove(self, first: bool) -> None:
        if first:
            shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def adapted(model: nn.Module, rank: int) -> Iterator[nn.Module]:
    """The model with LoRA adapters on every linear layer of its blocks, merged afterwards; itself for rank 0."""
    if not rank:
        model.train()
        yield model
        return
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise PumiceError("--lora needs peft: pip install 'pumice[train]'.") from error
    from pumice.train.methods.lte import ROUTERS

    names = {site.parts["weight"].module for site in detect(model).of_kind("linear")}
    routers = [f"{ROUTERS}.{name}" for name in getattr(model, ROUTERS, {})]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=sorted(names), modules_to_save=routers or None)
    whole = get_peft_model(model, config)
    whole.train()
    yield whole
    whole.merge_and_unload()


@torch.no_grad()
def scored(model: nn.Module, rows: list[dict[str, Tensor]], batch: int = 4) -> Perplexity:
    """Perplexity of what is to be learnt in some examples, each a window of the bootstrap."""
    training, device = model.training, model.get_input_embeddings().weight.device
    model.eval()
    losses, count = [], 0
    for some in _parts(rows, batch):
        part = {name: tensor.to(device) for name, tensor in padded(some).items()}
        logits = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"], use_cache=False).logits
        targets = part["labels"][:, 1:]
        nll = torch.nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, reduction="none")
        known = (targets != -100).sum(1)
        losses += (nll.sum(1) / known).tolist()
        count += int(known.sum())
    model.train(training)
    return combine(losses, count, {"examples": len(rows)})


def measured(model: nn.Module, plan: Plan | None, before: Perplexity, text: Lessons, examples: int) -> Trained:
    tokens = round(text.tokens / len(text.learn) * examples)
    dense = scored(model, text.measure)
    if plan is None or not plan.select:
        return Trained(plan, before, dense, None, None, tokens)
    twin = attach(model, plan, exec="reference", check=False)
    twin.pumice.counting = True
    border = text.measure[0]["input_ids"].shape[0] // 2 if plan.per_prompt else None
    with twin.pumice.phase(border):
        sparse = scored(twin, text.measure)
    counters = [selection.counter.density for selection in twin.pumice.selections.values()]
    return Trained(plan, before, dense, sparse, sum(counters) / len(counters), tokens)


def figures(found: Trained) -> dict:
    return {
        "perplexity_before": found.before.perplexity,
        "perplexity_dense": found.dense.perplexity,
        "perplexity_sparse": (found.sparse or found.dense).perplexity,
        "active_on_held_out": found.active,
        "tokens": found.tokens,
    }


def write_plain(model: nn.Module, tokenizer, out: Path) -> None:
    with replacing(out) as fresh:
        model.save_pretrained(fresh)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
        same_permissions(fresh)
