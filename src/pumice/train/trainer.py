"""The trainer of transformers with a stage: its terms in the loss, its steering, its state in checkpoints."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback, TrainerState

from pumice.arch.detect import Arch
from pumice.errors import PumiceError
from pumice.train.shards import Whole
from pumice.train.stage import Stage

RAW = "parameters.safetensors"
UNSAID = ("grad_norm", "learning_rate", "epoch")


class StageTrainer(Trainer):
    """Trains under a stage; a loss that is NaN or infinite ends it, with the step and where it began.

    `bf16`: forwards under autocast, which the trainer's own flag would leave on the model for good. Checkpoints hold
    parameters by their own names: the layout of the hub has others for fused experts, and drops them at the return.
    """

    def __init__(self, *, stage: Stage, arch: Arch, bf16: bool = False, **settings) -> None:
        super().__init__(**settings)
        self.stage, self.arch, self.bf16 = stage, arch, bf16
        self.sums: dict[str, float] = {}
        self.forwards = 0
        self.whole: Whole | None = None  # of a run that shards the model
        for spoken in (PrinterCallback, ProgressCallback):  # they write to stdout
            self.remove_callback(spoken)
        self.callback_handler.callbacks.insert(0, Steering(self))  # before those that log what it adds
        self.add_callback(Bar(stage.name))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        stage = self.stage
        mask = inputs.get("attention_mask")
        stage.valid = None if mask is None else mask.bool()
        stage.progress = self.state.global_step / max(self.state.max_steps, 1)
        stage.before(inputs)
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.bf16):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            terms = stage.terms(outputs.logits, inputs)
        self.check(model, inputs, {"loss": loss, **terms})
        numbers = {name: term.item() for name, term in terms.items()} | stage.measured()
        # where the task's loss is a mean over the tokens of all accumulated batches, the trainer divides no more
        parts = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        numbers |= {"task": parts * loss.item()} if terms else {}
        for name, value in numbers.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.forwards += 1
        total = loss + sum(terms.values()) / parts if terms else loss
        return (total, outputs) if return_outputs else total

    def go(self, checkpoint: str | None) -> None:
        """Train from a checkpoint on; of that of the last step only the weights and numbers are taken."""
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
            if state.global_step >= self.args.max_steps:  # transformers would make one step more
                self._load_from_checkpoint(checkpoint)
                self.stage.restore(state.stateful_callbacks[Steering.__name__]["attributes"])
                return
        self.train(resume_from_checkpoint=checkpoint)

    def check(self, model: nn.Module, inputs: dict, losses: dict[str, Tensor]) -> None:
        bad = next((name for name, loss in losses.items() if not bool(loss.isfinite())), None)
        if bad is not None:
            where = "where it began is not looked for in shards"  # others would have to run that forward, too
            where = where if self.is_fsdp_enabled else first_not_finite(model, self.arch, inputs)
            raise PumiceError(
                f"{self.stage.name}: {bad} is {losses[bad].item()} at step {self.state.global_step + 1}; {where}. "
                "Lower --lr, or give smaller steps: a larger --batch or --accumulate."
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_fsdp_enabled:  # whose weights go with the optimiser's state, and are gathered for that
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not isinstance(self.model, PreTrainedModel):  # adapters
            return super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_model(self.model, str(folder / RAW))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not (Path(resume_from_checkpoint) / RAW).exists():
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_model(model or self.model, str(Path(resume_from_checkpoint) / RAW))

    def means(self) -> dict[str, float]:
        """What the stage measured since the last call, over all processes; then it begins anew."""
        names = sorted(self.sums)
        found = torch.tensor([self.sums[name] / self.forwards for name in names], dtype=torch.float64)
        if names and self.accelerator.num_processes > 1:
            found = self.accelerator.reduce(found.to(self.args.device), "mean").cpu()
        self.sums, self.forwards = {}, 0
        return dict(zip(names, found.tolist(), strict=True))


class Steering(TrainerCallback, ExportableState):
    """Tells the stage what it measured after every step, and keeps its numbers in the checkpoints."""

    def __init__(self, trainer: StageTrainer) -> None:
        self.trainer, self.last = trainer, {}

    def state(self) -> dict:
        return {"args": {}, "attributes": self.trainer.stage.state()}

    def on_train_begin(self, args, state, control, **_) -> None:
        if self.trainer.whole is not None:
            self.trainer.whole.free()
        kept = state.stateful_callbacks.get(type(self).__name__)
        if kept and state.global_step:
            self.trainer.stage.restore(kept["attributes"])

    def on_step_end(self, args, state, control, model=None, **_) -> None:
        # the fused optimiser changes parameters without it, and what is made of them would stay as it was
        torch.autograd.graph.increment_version([p for p in model.parameters() if p.requires_grad])
        self.last = self.trainer.means()
        if self.last:
            self.trainer.stage.stepped(self.last)
        last = state.global_step == state.max_steps
        control.should_log |= last
        if state.global_step % max(args.save_steps, 1) == 0 or last:
            bad = next((name for name, p in model.named_parameters() if not bool(p.isfinite().all())), None)
            if bad is not None:  # before a checkpoint of it takes the place of a sound one
                raise PumiceError(f"{bad} holds NaN or infinity after step {state.global_step}. Lower --lr.")

    def on_log(self, args, state, control, logs=None, **_) -> None:
        if logs is not None and "loss" in logs:
            numbers = self.last | self.trainer.stage.state()
            logs.update({name: round(value, 5) for name, value in numbers.items() if math.isfinite(value)})


class Bar(TrainerCallback):
    """A stage's progress, and a line of what was logged, on stderr."""

    def __init__(self, title: str) -> None:
        self.title, self.bar = title, None

    def on_train_begin(self, args, state, control, **_) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.title, unit="step")

    def on_step_end(self, args, state, control, **_) -> None:
        if self.bar is not None:
            self.bar.update()

    def on_log(self, args, state, control, logs=None, **_) -> None:
        if self.bar is not None and "loss" in (logs or {}):
            said = ", ".join(f"{name} {float(value):.4g}" for name, value in logs.items() if name not in UNSAID)
            tqdm.write(f"{self.title}, step {state.global_step} of {state.max_steps}: {said}", file=sys.stderr)

    def on_train_end(self, args, state, control, **_) -> None:
        if self.bar is not None:
            self.bar.close()


@torch.no_grad()
def first_not_finite(model: nn.Module, arch: Arch, inputs: dict) -> str:
    """Where NaN or infinity begins: the first weight that has it, else the first block whose output has."""
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            return f"{name} holds NaN or infinity since the step before"
    found: list[str] = []

    def look(name: str):
        def hook(module: nn.Module, args: tuple, output) -> None:
            out = output[0] if isinstance(output, tuple) else output
            if not bool(out.isfinite().all()):
                found.append(name)

        return hook

    handles = [block.module.register_forward_hook(look(block.name)) for block in arch.blocks]
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return f"{found[0]} is the first block whose output is not finite" if found else "every block's output is finite"
