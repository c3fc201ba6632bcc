"""What the command line gives: methods from flags or a recipe, and a model that is fit for the command."""

from __future__ import annotations

import logging
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

from pumice import recipe, registry
from pumice.cli.say import note, print_nets, recipe_name
from pumice.errors import PumiceError, unknown


def methods_from(method: str | None, recipe_file: str | None, rest: list[str], *, flags, seed: int) -> list[Any]:
    """Methods from `--method NAME --field value …` or `--recipe FILE`; `flags` are the command's own.

    A method that draws has a setting `seed` too: the command's `--seed` is its seed.
    """
    settings = parse_flags(rest)
    if (method is None) == (recipe_file is None):
        raise PumiceError("say what to do with --method NAME (see `pumice methods`) or --recipe FILE, one of the two.")
    if recipe_file:
        if settings:
            raise PumiceError(f"--{next(iter(settings))} belongs to a --method; with --recipe it stands in the file.")
        return recipe.read(Path(recipe_file))
    known = {field.name for name in method.split("+") for field in fields(registry.get(name))}
    for name in settings.keys() - known:
        raise unknown("flag", f"--{name}", [f"--{other}" for other in sorted({*known, *flags})])
    return recipe.build_all(method, settings | ({"seed": seed} if "seed" in known else {}))


def parse_flags(flags: list[str]) -> dict[str, str]:
    """`--sparsity 0.5 --pattern=2:4` -> {'sparsity': '0.5', 'pattern': '2:4'}."""
    settings, rest = {}, list(flags)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise PumiceError(f"unexpected {flag!r} on the command line; flags are --name value.")
        name, equals, value = flag[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise PumiceError(f"--{name} needs a value.")
            value = rest.pop(0)
        settings[name.replace("-", "_")] = value
    return settings


def quiet_libraries() -> None:
    """No log lines and no progress bars of libraries, but for downloads."""
    from pumice.hub.models import no_loading_bars

    no_loading_bars()
    for name in ("transformers", "huggingface_hub", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft asks transformers for it


def open_model(name: str, dtype: str | None = None, device: str = "cpu", *, sound: bool = True):
    """The base of MODEL, its tokenizer, and its plan (None for a dense model); `sound` refuses weights with NaN."""
    quiet_libraries()
    from pumice.hub.models import load
    from pumice.plan import Plan

    with note.status(f"loading {name}"):
        loaded = load(name, dtype=dtype, device=_device(device))
        bad = not_finite(loaded.model) if sound else {}
    if bad:
        first, more = next(iter(bad)), f" and {len(bad) - 1} more tensors" if len(bad) > 1 else ""
        raise PumiceError(
            f"{name} holds NaN or infinite weights: {sum(bad.values())} in {first}{more}. The file is damaged, or the "
            "model overflowed in training: get a sound copy. `pumice inspect` counts them all."
        )
    plan = Plan.load(loaded.plan) if loaded.plan else None
    if plan is not None:
        print_nets(plan)
    return loaded, plan


def _device(name: str) -> str:
    """`auto` is the accelerator where there is one; a device that is not there is refused with those that are."""
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    here = ["cpu", *([found.type] if found else [])]
    if name == "auto":
        return here[-1]
    if name.partition(":")[0] not in here:
        raise PumiceError(f"there is no device {name!r} here; there is {' and '.join(here)}.")
    return name


def not_finite(model) -> dict[str, int]:
    """How many values of each parameter are NaN or infinite, where any are."""
    import torch

    found = {}
    for name, parameter in model.named_parameters():
        # a sum reads every value without a second tensor, and NaN or infinity stay in it
        if not torch.isfinite(parameter.detach().sum(dtype=torch.float32)) and (
            count := int((~torch.isfinite(parameter.detach())).sum())
        ):
            found[name] = count
    return found


def check_length(loaded, tokens: int, flags: str) -> None:
    """Refuse more tokens than the model has positions: what comes after them is noise, or a crash."""
    positions = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if positions and tokens > positions:
        raise PumiceError(f"{tokens} tokens are more than the {positions} positions of {loaded.name}; lower {flags}.")


def is_plain(plan) -> bool:
    """Whether a folder with this plan holds a smaller model that is dense: where others may start from."""
    return plan is not None and bool(plan.base.get("slimmed")) and not plan.select


def is_trained(plan) -> bool:
    """Whether a folder with this plan holds weights that were trained for it, whole: where others may start from."""
    return plan is not None and bool(plan.base.get("trained_from")) and not plan.changes_weights


def refuse_sparse(model: str, plan) -> None:
    if is_trained(plan):
        note.print(f"{model} was trained for {recipe_name(plan)}: its weights are taken, without its plan")
    elif plan is not None and not is_plain(plan):
        base = plan.base.get("name")
        raise PumiceError(f"{model} is sparse already ({recipe_name(plan)}). Start from its base, {base}.")


def refuse_packed(loaded) -> None:
    """Packed matrices are no sites: nothing can be measured or decided in them."""
    from pumice.hub.packed import packed_modules

    if packed_modules(loaded.model):
        base = loaded.model.config.quantization_config.base.get("name")
        raise PumiceError(f"{loaded.name} is sparse and packed already. Start from its base, {base}.")


def check_exec(name: str) -> None:
    if name not in ("fast", "reference"):
        raise unknown("exec", name, ("fast", "reference"))
