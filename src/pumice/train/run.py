"""train: a model learns to need less, on the trainer of transformers; the plan then leaves the rest out."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm
from transformers import TrainingArguments, set_seed

from pumice import __version__, recipe
from pumice.api import attach, sparsify
from pumice.arch.detect import Arch, detect
from pumice.calib import parallel
from pumice.errors import PumiceError
from pumice.eval.perplexity import Perplexity
from pumice.hub.folder import check_target, replacing, same_permissions, told
from pumice.hub.save import save
from pumice.plan import Plan, fingerprint_model
from pumice.train import shards
from pumice.train.adapt import Adapt, Selecting
from pumice.train.methods.lte import ROUTERS
from pumice.train.score import parts, scored
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
    bf16: bool = False  # forwards under autocast
    fsdp: bool = False  # weights, gradients and the optimiser's state are sharded over the processes
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
    dense: Perplexity  # of the trained weights without what the plan selects
    sparse: Perplexity | None  # None: what is sparse are the weights themselves
    active: float | None  # share of units that ran on that text
    tokens: int  # that were learnt
    too_long: int  # examples that were left out


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
    settings, out = settings or Settings(), check_target(out)
    said = None if method is None else recipe.describe(method)
    text = lessons(data, tokenizer, window=window, seed=settings.seed)
    base = {"name": str(out), "trained_from": name or getattr(model, "name_or_path", "") or type(model).__name__}
    stamp = _stamp(model, said, text, settings)
    if settings.fsdp:
        shards.check(model, method)
    parallel.place()
    with whole_or_unchanged(model):
        fit = Fit(model, method, text, settings)
        with parallel.joined() as first:
            work = Work(out, stamp, settings, resume)
            fit.run(work)
        plan = fit.plan()
        if plan is not None:
            plan = replace(plan, recipe=[said | {"training": vars(settings)}], base={**plan.base, **base})
        found = fit.measured(plan)
    if first:
        write(model, tokenizer, found, out)
        work.remove()
    return found


class Fit:
    """A method's work on one model: what it changes first, its stages, and the plan for what came of them."""

    def __init__(self, model: nn.Module, method: Any, text: Lessons, settings: Settings) -> None:
        self.model, self.text, self.settings = model, text, settings
        self.method = method if method is None or hasattr(method, "begin") else Adapt(method=method)
        if 0 < settings.steps < (least := getattr(method, "least_steps", 1)):
            raise PumiceError(f"{method.name} trains in {least} stages: give it {least} steps or more.")
        say(text.describe())
        self.before = scored(model, text.measure)
        dense = deepcopy(model).eval().requires_grad_(False) if getattr(method, "distill", 0) else None
        self.arch, self.stages, self.examples = detect(model), [Stage()], 0
        if self.method is None:
            return
        say(f"before the first step: what {method.name} changes, and what it measures for that")
        # by every process for itself: what learns from samples is not shared among them
        self.arch = self.method.begin(model, self.arch, windows_of(text.calibrate, text.protocol))
        self.stages = self.method.stages(model, dense)
        selecting = next((stage for stage in self.stages if isinstance(stage, Selecting)), None)
        if selecting is not None and settings.lora:
            raise PumiceError(f"adapters cannot be trained under {method.name}: leave out --lora.")
        if selecting is not None and selecting.plan.per_prompt:
            self.before = scored(model, text.measure, prompts=True)

    def run(self, work: Work) -> None:
        """Every stage, and the adapters merged."""
        of_a_step = self.settings.batch * self.settings.accumulate * parallel.world()
        least = len(self.stages)
        steps = self.settings.steps or max(least, round(self.settings.epochs * len(self.text.learn) / of_a_step))
        self.examples = steps * of_a_step
        parts: list[int] = []
        for left, stage in zip(range(least - 1, 0, -1), self.stages, strict=False):  # each later one has a step, too
            parts.append(min(max(1, round(steps * stage.share)), steps - sum(parts) - left))
        with shards.asked_for_once(), adapted(self.model, self.arch, self.settings) as whole:
            for number, (stage, part) in enumerate(zip(self.stages, [*parts, steps - sum(parts)], strict=True)):
                trainer = work.trainer(number, stage, whole, self, part)
                checkpoint = newest(Path(trainer.args.output_dir))
                if checkpoint is not None:
                    step = Path(checkpoint).name.rpartition("-")[2]
                    say(f"{stage.name}: going on after step {step} of {part}, from {work.folder}")
                with stage.on(self.model, self.arch), shards.whole_afterwards(trainer):
                    trainer.go(checkpoint)

    def plan(self) -> Plan | None:
        self.model.eval()
        if self.method is None:
            return None
        say("the plan: calibrated on text that was not learnt")
        rows = self.text.calibrate
        batches = [padded(part) for part in parts(rows, self.settings.batch)]
        ready = self.method.finish(self.model, self.arch, self.stages, batches)
        if isinstance(ready, Plan):
            return ready
        return sparsify(self.model, ready, windows_of(rows, self.text.protocol), resume=False, check=False)

    def measured(self, plan: Plan | None) -> Trained:
        rows, long = self.text.measure, self.text.protocol.get("too_long", 0)
        tokens = round(self.text.tokens / len(self.text.learn) * self.examples)
        prompts = plan is not None and plan.per_prompt
        dense = scored(self.model, rows, prompts=prompts)
        if plan is None or not plan.select:
            return Trained(plan, self.before, dense, None, None, tokens, long)
        twin = attach(self.model, plan, exec="reference", check=False)
        twin.pumice.counting = True
        sparse = scored(twin, rows, prompts=prompts)
        return Trained(plan, self.before, dense, sparse, twin.pumice.density, tokens, long)


def say(text: str) -> None:
    """To whoever waits, past the progress bars."""
    if not int(os.environ.get("RANK", "0")):
        tqdm.write(text, file=sys.stderr)


def _stamp(model: nn.Module, method: dict | None, text: Lessons, settings: Settings) -> str:
    """What a run has to share with the one that it goes on from."""
    said = {"pumice": __version__, "weights": fingerprint_model(model), "text": text.protocol}
    return json.dumps(said | {"method": method, "settings": vars(settings)}, sort_keys=True)


def _differing(one: str, other: str) -> str:
    """In what two stamps differ, for a message: `other settings: lr (0.001), steps (400)`."""
    try:
        a, b = (stamp | stamp.pop("settings") for stamp in map(json.loads, (one, other)))
    except (ValueError, KeyError, TypeError):  # not whole, or of another version
        return "other settings"
    found = {name: a.get(name) for name in b if a.get(name) != b[name]}
    names = (name if isinstance(value, (dict, str)) else f"{name} ({value})" for name, value in found.items())
    return f"other settings: {', '.join(names)}"


class Work:
    """The hidden folder of a run: a folder of checkpoints for every stage, and what says whose they are."""

    def __init__(self, out: Path, stamp: str, settings: Settings, resume: bool) -> None:
        self.folder, self.settings = out.with_name(f".{out.name}.train"), settings
        path = self.folder / "run.json"
        if parallel.rank() == 0:
            before = path.read_text() if resume and path.exists() else stamp
            if before != stamp and any(newest(stage) for stage in self.folder.glob("stage-*")):
                raise PumiceError(
                    f"{self.folder} holds an unfinished run with {_differing(before, stamp)}. Its own command goes on "
                    "with it; --no-resume (resume=False) begins anew and drops it."
                )
            if before != stamp or not (resume and path.exists()):
                shutil.rmtree(self.folder, ignore_errors=True)
            with told(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                path.write_text(stamp)
        parallel.agreed(stamp)  # nobody looks for checkpoints before

    def trainer(self, number: int, stage: Stage, whole: nn.Module, fit: Fit, steps: int) -> StageTrainer:
        s, device = self.settings, next(fit.model.parameters()).device
        arguments = TrainingArguments(
            str(self.folder / f"stage-{number + 1}"), max_steps=steps, per_device_train_batch_size=s.batch,
            learning_rate=s.lr, gradient_accumulation_steps=s.accumulate, lr_scheduler_type=s.schedule,
            weight_decay=s.weight_decay, warmup_steps=int(s.warmup * steps), seed=s.seed + number,
            data_seed=s.seed + number, save_steps=s.save_every or max(1, steps // 10), save_total_limit=2,
            logging_steps=max(1, steps // 20), report_to=s.report_to, run_name=f"{self.folder.name}-{stage.name}",
            remove_unused_columns=False, use_cpu=device.type == "cpu", dataloader_pin_memory=False,
            use_cache=fit.model.config.use_cache, fsdp=s.fsdp or None,
        )  # fmt: skip
        arguments._n_gpu = 1  # hooks are of one model: the other devices of a machine are for torchrun
        return StageTrainer(
            stage=stage, arch=fit.arch, bf16=s.bf16, model=whole, args=arguments, train_dataset=fit.text.learn,
            data_collator=padded, callbacks=list(stage.callbacks),
        )  # fmt: skip

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def newest(folder: Path) -> str | None:
    """The last whole checkpoint, whose state is written last. What a kill left half-written goes."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    while found:
        with suppress(OSError, ValueError):
            json.loads((found[-1] / "trainer_state.json").read_text())
            return str(found[-1])
        shutil.rmtree(found.pop(), ignore_errors=True)
    return None


@contextmanager
def whole_or_unchanged(model: nn.Module) -> Iterator[None]:
    """After an error the model has no routers and is in the mode that it was; what was trained of it stays.

    One that was sharded is lost: a process has its shard.
    """
    training = model.training
    try:
        yield
    except BaseException:
        model._modules.pop(ROUTERS, None)
        model.train(training)
        raise


@contextmanager
def adapted(model: nn.Module, arch: Arch, settings: Settings) -> Iterator[nn.Module]:
    """The model with LoRA adapters on the linear layers of its blocks, merged afterwards; itself for rank 0.

    Fused experts have none.
    """
    model.train()
    if not settings.lora:
        yield model
        return
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise PumiceError("--lora needs peft: pip install 'pumice[train]'.") from error
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    set_seed(settings.seed)  # of the adapters' start
    names = {site.parts["weight"].module for site in arch.of_kind("linear") if site.expert is None}
    routers = [f"{ROUTERS}.{name}" for name in getattr(model, ROUTERS, {})]
    config = LoraConfig(r=settings.lora, lora_alpha=2 * settings.lora, target_modules=sorted(names),
                        modules_to_save=routers or None)  # fmt: skip
    whole = get_peft_model(model, config)
    whole.train()
    try:
        yield whole
    finally:
        if not shards.in_shards(whole):  # after an error others may not come to put them together
            whole.merge_and_unload()
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in trained)


def write(model: nn.Module, tokenizer, found: Trained, out: Path) -> None:
    """The folder, with its plan and figures if there is one."""
    if found.plan is not None:
        figures = {
            "perplexity_before": found.before.perplexity,
            "perplexity_dense": found.dense.perplexity,
            "perplexity_sparse": (found.sparse or found.dense).perplexity,
            "active_on_held_out": found.active,
            "tokens": found.tokens,
        }
        save(model, tokenizer, replace(found.plan, measurements={**found.plan.measurements, **figures}), out)
        return
    with replacing(out) as fresh:
        model.save_pretrained(fresh)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
        same_permissions(fresh)
