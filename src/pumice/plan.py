"""Plan: what is sparse in one model, as data. `pumice.json` says it, `pumice.safetensors` holds its tensors."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pumice.disk import write
from pumice.errors import PumiceError
from pumice.forms import Mask, Select, Slim, collector, decode, encode

VERSION = 1
JSON, TENSORS = "pumice.json", "pumice.safetensors"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Forms by site name, with the recipe that made them, the base they belong to and what was measured."""

    weights: dict[str, Mask | Slim] = field(default_factory=dict)
    select: dict[str, Select] = field(default_factory=dict)
    recipe: list[dict] = field(default_factory=list)
    calibration: dict = field(default_factory=dict)
    base: dict = field(default_factory=dict)  # name, fingerprint, and `applied`: the fingerprint with the masks written
    # (`slimmed`: the fingerprint of the smaller model saved with it, to which its Slim forms have been done already)
    measurements: dict = field(default_factory=dict)

    def __repr__(self) -> str:
        """A line: tensors of millions of weights are nothing to print."""
        forms = f"{len(self.weights)} of weights, {len(self.select)} selected at run time"
        return f"<Plan {_names(self)}: {forms}, sparsity {self.sparsity():.4f}, for {self.base.get('name', '?')}>"

    @property
    def changes_weights(self) -> bool:
        return bool(self.weights)

    @property
    def per_prompt(self) -> bool:
        """Whether a prompt chooses for the tokens after it, so that it matters which tokens are prompt."""
        return any(form.scope == "prompt" or form.every == 0 for form in self.select.values())

    def merge(self, later: Plan) -> Plan:
        """This plan followed by another; a site that both decide in the same way is refused with both recipes."""
        for ours, theirs in ((self.weights, later.weights), (self.select, later.select)):
            both = sorted(ours.keys() & theirs.keys())
            if both:
                raise decided_twice(_names(self), _names(later), both)
        notes = [*self.measurements.get("notes", []), *later.measurements.get("notes", [])]
        return replace(
            later,
            weights={**self.weights, **later.weights},
            select={**self.select, **later.select},
            recipe=self.recipe + later.recipe,
            calibration={**self.calibration, **later.calibration},
            base=self.base or later.base,
            measurements={**self.measurements, **later.measurements, **({"notes": notes} if notes else {})},
        )

    def without_values(self) -> Plan:
        """The plan beside weights that have its masks' new values already: it then fits no other weights."""
        kept = {n: form.without_values() if isinstance(form, Mask) else form for n, form in self.weights.items()}
        return replace(self, weights=kept)

    @property
    def fits(self) -> set[str]:
        """Fingerprints of the weights that it can run on: its base's, and those that it made of them."""
        updated = any(isinstance(form, Mask) and form.updated for form in self.weights.values())
        known = ("applied", "slimmed") + ("fingerprint",) * (not updated)
        return {self.base[key] for key in known if self.base.get(key)}

    def sparsity(self) -> float:
        """Fraction removed, over the weights of the masked matrices or the units of the selected sites."""
        masks = [form for form in self.weights.values() if isinstance(form, Mask)]
        if masks:
            return sum(form.removed for form in masks) / max(sum(math.prod(form.shape) for form in masks), 1)
        forms = {**self.select, **self.weights}.values()
        sizes = [form.units * getattr(form, "weights", 1) for form in forms]
        return sum(form.sparsity * size for form, size in zip(forms, sizes, strict=True)) / max(sum(sizes), 1)

    def applied(self, model: torch.nn.Module, **settings):
        """`with plan.applied(model):` runs the plan on the model itself; afterwards it is bit for bit what it was."""
        return import_module("pumice.api").applied(model, self, **settings)  # the runtime is a layer above

    def attach(self, model: torch.nn.Module, **settings) -> torch.nn.Module:
        """A twin of the model that runs the plan and shares every tensor that it leaves alone."""
        return import_module("pumice.api").attach(model, self, **settings)

    # ---- disk -------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write `pumice.json` and `pumice.safetensors` into an existing folder, each under a temporary name first."""
        tensors: dict[str, Tensor] = {}
        put = collector(tensors)
        data = {
            "pumice": VERSION,
            "base": self.base,
            "recipe": self.recipe,
            "calibration": self.calibration,
            "measurements": self.measurements,
            "weights": {name: encode(form, put, f"weights/{name}") for name, form in self.weights.items()},
            "select": {name: encode(form, put, f"select/{name}") for name, form in self.select.items()},
        }
        folder = Path(folder)
        write(folder / TENSORS, lambda path: save_file(tensors, path))
        text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
        write(folder / JSON, lambda path: path.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, folder: str | Path) -> Plan:
        """Read a plan; a missing, foreign or truncated file is an error that names it."""
        folder = Path(folder)
        data = read_json(folder)
        try:
            tensors = load_file(folder / TENSORS)
        except (OSError, SafetensorError) as error:
            raise PumiceError(
                f"{folder / TENSORS} is truncated or missing ({error}). Make it again, as it was made."
            ) from error

        def get(key: str) -> Tensor:
            if key not in tensors:
                raise PumiceError(
                    f"{folder / TENSORS} lacks the tensor {key!r} that {JSON} names. Make the plan again."
                )
            return tensors[key]

        try:
            return cls(
                weights={name: decode(form, get) for name, form in data["weights"].items()},
                select={name: decode(form, get) for name, form in data["select"].items()},
                recipe=data["recipe"],
                calibration=data["calibration"],
                base=data["base"],
                measurements=data["measurements"],
            )
        except PumiceError as error:
            raise PumiceError(f"{folder / JSON}: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PumiceError(
                f"{folder / JSON} is damaged: it lacks or misspells {error}. Make it again, as it was made."
            ) from error


def read_json(folder: Path) -> dict:
    """The JSON half of a plan, checked for being one."""
    path = Path(folder) / JSON
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PumiceError(
            f"{folder} is no sparse model folder: it has no {JSON}. Make one with `pumice sparsify`."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PumiceError(f"{path} is damaged ({error}). Make the plan again.") from error
    except OSError as error:
        raise PumiceError(f"{path} cannot be read: {error.strerror}.") from error
    if not isinstance(data, dict) or data.get("pumice") != VERSION:
        found = data.get("pumice") if isinstance(data, dict) else None
        raise PumiceError(f"{path} has plan version {found!r}; this pumice reads version {VERSION}.")
    return data


def slims_of(plan: Plan) -> dict[str, Slim]:
    return {name: form for name, form in plan.weights.items() if isinstance(form, Slim)}


def decided_twice(one: str, other: str, sites: list[str]) -> PumiceError:
    more = f" (and {len(sites) - 1} more sites)" if len(sites) > 1 else ""
    return PumiceError(
        f"{one} and {other} both decide {sites[0]}{more}. Keep one of them, or give each its own sites with `where`."
    )


def _names(plan: Plan) -> str:
    return " + ".join(entry["method"] for entry in plan.recipe) or "a plan"


# ---- fingerprint ----------------------------------------------------------------------------------------------------

SAMPLES = 1024  # values per tensor: every fine-tuning changes some of them


def tensor_digest(name: str, tensor: Tensor) -> bytes:
    """A digest of a tensor's name, shape and 1024 spread values, rounded to bf16 so that fp32 and bf16 loads agree.

    The values lie at steps of the golden ratio, which no row or column length divides: a change of 1 % of a tensor is
    seen if it is one run, some rows or some columns, and one of single values with a probability above 0.9999.
    """
    flat = tensor.detach().reshape(-1)
    values = flat[_spread(flat.numel()).to(flat.device)].to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes()
    return hashlib.sha256(f"{name}|{tuple(tensor.shape)}|".encode() + values).digest()


def _spread(n: int) -> Tensor:
    """Which of `n` values are read: all of a few, else 1024."""
    if n <= SAMPLES:
        return torch.arange(n)
    return (torch.arange(SAMPLES, dtype=torch.float64) * 0.6180339887498949 % 1 * n).long()


def fingerprint(digests: Iterable[bytes]) -> str:
    """One fingerprint of a model's weights from its tensors' digests, in any order."""
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()[:32]


def fingerprint_model(model: torch.nn.Module) -> str:
    return fingerprint(tensor_digest(name, parameter) for name, parameter in model.named_parameters())
