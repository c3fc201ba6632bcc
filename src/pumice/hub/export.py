"""Export: a sparse model as a file that needs no Pumice: its zeros are in the weights, and no plan lies beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pumice.arch.detect import Arch, detect
from pumice.errors import PumiceError
from pumice.forms import Mask
from pumice.hub.folder import check_target, replacing, same_permissions
from pumice.hub.models import Loaded, load, locate
from pumice.hub.packed import packed_modules
from pumice.hub.zeros import count, masks_of
from pumice.plan import Plan, fingerprint_model


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model with every mask of its plan in its weights, ready to be written."""

    loaded: Loaded
    arch: Arch | None = None  # of a model with a plan
    plan: Plan | None = None
    notes: list[str] = field(default_factory=list)  # what of the plan cannot be in the file

    @property
    def recipe(self) -> list[dict]:
        return self.plan.recipe if self.plan is not None else []

    @property
    def gguf(self) -> Path | None:
        """The GGUF that the weights once came from, where it is still at hand."""
        if self.loaded.gguf is not None or self.plan is None:
            return self.loaded.gguf
        name = self.plan.base.get("name", "")
        if name != "smollm2" and not (name.endswith(".gguf") and Path(name).expanduser().is_file()):
            return None
        return locate(name).gguf


def open_source(name: str | Path) -> Source:
    """Load MODEL and see that its weights are what its plan says.

    Raises PumiceError for a plan that changes no weight, and for weights that lost zeros of their masks.
    """
    loaded = load(name)
    if packed_modules(loaded.model):
        raise PumiceError(f"{name} is packed already. Export the sparse folder that it was made from.")
    if loaded.plan is None:
        return Source(loaded=loaded)
    plan = Plan.load(loaded.plan)
    names = " + ".join(entry["method"] for entry in plan.recipe)
    left_out = f"{len(plan.select)} sites choose units while the model runs; no file can hold that: left out"
    if not plan.weights and "trained_from" in plan.base:
        return Source(loaded=loaded, notes=[f"these weights were trained for {names}. {left_out}"])
    if not plan.weights:
        raise PumiceError(
            f"{name} ({names}) chooses its units while it runs and changes no weight: written as a file it would be "
            f"its dense base, {plan.base.get('name')}. Run it with `pumice generate`, or export the base."
        )
    arch = detect(loaded.model)
    masks = [site for site, form in plan.weights.items() if isinstance(form, Mask)]  # units removed are not there
    if missing := sorted(set(masks) - arch.sites.keys()):
        raise PumiceError(f"the plan decides {missing[0]}, which this model does not have: it was made for another.")
    if loaded.folder == loaded.plan:
        _check_zeros(name, arch, plan)
    else:
        _write_masks(name, loaded.model, arch, plan)
    return Source(loaded=loaded, arch=arch, plan=plan, notes=[left_out] if plan.select else [])


def _check_zeros(name: str | Path, arch: Arch, plan: Plan) -> None:
    lost = [row for row in count(arch, plan) if not row.ok]
    if lost:
        raise PumiceError(
            f"{name}: {sum(row.lost for row in lost):,} weights that the plan removes are not zero any more, in "
            f"{len(lost)} matrices ({lost[0].site} first). It was fine-tuned without the masks; see `pumice inspect`, "
            "and sparsify it again."
        )


def _write_masks(name: str | Path, model: torch.nn.Module, arch: Arch, plan: Plan) -> None:
    """A plan saved alone, with masks: write them into its base, which was loaded for this."""
    other = [site for site, form in plan.weights.items() if not isinstance(form, Mask)]
    if other:
        raise PumiceError(f"{name} removes units of {other[0]} (Slim). Save it with its weights, then export that.")
    if plan.fits and fingerprint_model(model) not in plan.fits:
        raise PumiceError(f"{name} was made for other weights than those of {plan.base.get('name')} as it is now.")
    with torch.no_grad():
        for site, mask in masks_of(arch, plan).values():
            matrix = site.matrix()
            matrix.copy_(mask.reference(matrix))


def to_hf(source: Source, out: str | Path) -> dict:
    """An ordinary dense Hugging Face folder in the dtype of the weights: zeros where the masks are, and no plan."""
    with new_folder(out) as fresh:
        source.loaded.model.save_pretrained(fresh)
        source.loaded.tokenizer.save_pretrained(fresh)
    return {"bytes": size_of(out)}


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder that is not there yet, or empty: without a plan in it, nothing tells an export from a user's own."""
    with replacing(new_place(out)) as fresh:
        yield fresh
        same_permissions(fresh)


def new_place(out: str | Path) -> Path:
    """The path of a folder to be written."""
    place = Path(out).expanduser()
    if place.is_dir() and any(place.iterdir()):
        raise PumiceError(f"{place} is not empty; choose another folder, or remove it first.")
    return check_target(place)


def new_file(out: str | Path, suffix: str) -> Path:
    """The path of a file to be written; one that is there already is not replaced."""
    place = Path(out).expanduser()
    if place.suffix != suffix:
        raise PumiceError(f"--out names the file to write, FILE{suffix}; got {out}.")
    if place.exists():
        raise PumiceError(f"{place} exists already; choose another name, or remove it first.")
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def size_of(folder: str | Path) -> int:
    """Bytes of a folder's weights."""
    return sum(path.stat().st_size for path in Path(folder).expanduser().glob("*.safetensors"))
