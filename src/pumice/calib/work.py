"""One calibration: the model, its text, where its weights come from, and the files that let a killed run go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pumice import recipe
from pumice.arch.detect import Arch
from pumice.budget import apportion
from pumice.calib import parallel
from pumice.calib.block import BlockRun
from pumice.calib.data import Windows
from pumice.calib.journal import Journal
from pumice.calib.spill import Spill
from pumice.calib.stream import Source, stream
from pumice.disk import write
from pumice.errors import PumiceError
from pumice.forms import Form

if TYPE_CHECKING:
    from pumice.sites import Site


@dataclass(kw_only=True, eq=False)
class Work:
    """What an allocation or a chain of methods works on. `journals(what)` opens the journal of one part of the work."""

    model: nn.Module
    arch: Arch
    windows: Windows | None
    source: Source
    sites: list[Site]
    journals: Callable[[str], Journal | None] = lambda what: None
    spill: Spill = field(default_factory=Spill)
    notes: list[str] = field(default_factory=list)

    def stream(self, decide: Callable[[BlockRun], dict[str, Form]], what: str, **settings) -> dict[str, Form]:
        """Forms of the work's sites, block by block; `what` names this pass in the progress bar and the journal."""
        given = {"spill": self.spill, "notes": self.notes, "journal": self.journals(what), "sites": self.sites}
        given["title"] = f"{what}: blocks"
        return stream(self.model, self.arch, self.windows, self.source, decide, **{**given, **settings})

    def text(self, what: str) -> Windows:
        """The calibration text; having none is an error that names `what` needs it."""
        if self.windows is None:
            raise PumiceError(f"{what} needs calibration text: give `data`, such as 'builtin' or 'file:PATH'.")
        return self.windows

    def note_few_tokens(self) -> None:
        """Say where a Hessian will be of hardly more tokens than a matrix has inputs."""
        tokens, widest = int(self.text("this").valid.sum()), max(site.channels for site in self.sites)
        if tokens < 2 * widest:  # SmolLM2 at 50 % from one token an input: 118, where a mask alone (Wanda) has 87
            self.notes.append(
                f"{tokens:,} calibration tokens are few for matrices of {widest:,} inputs: a Hessian of them fits "
                "the text more than the model. Take several times as many, or a method that needs none (wanda)."
            )

    def shares(self, allocation: str, sparsity: float) -> dict[str, float]:
        """The sparsity of every site under an allocation, exact over all of them; `uniform` says nothing of any."""
        if allocation == "uniform":
            return {}
        way = recipe.allocation(allocation)
        wanted = self.once(f"allocation {way.name}", lambda: way.allocate(self, sparsity))
        return apportion(wanted, {site.name: site.units for site in self.sites}, sparsity)

    def once_tensors(self, what: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors that `make` gives, as `once`; notes that it makes are not kept."""
        journal = self.journals(what)
        if journal is None:
            return make()
        path, found = journal.folder / "tensors.safetensors", None
        with suppress(OSError, SafetensorError):  # damaged, as after a power cut: made again
            found = load_file(path)
        if parallel.agreed(found is not None) and found is not None:
            return found
        found = {name: tensor.contiguous() for name, tensor in make().items()}
        write(path, lambda part: save_file(found, part))
        return found

    def once(self, what: str, make: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The numbers that `make` gives, made once: a run that was killed afterwards finds them in its journal."""
        journal = self.journals(what)
        if journal is None:
            return make()
        path = journal.folder / "numbers.json"
        there = path.exists()
        if not (parallel.agreed(there) and there):
            before = len(self.notes)
            found = {"numbers": make(), "notes": self.notes[before:]}
            del self.notes[before:]
            write(path, lambda part: part.write_text(json.dumps(found)))
        found = json.loads(path.read_text())
        self.notes += found["notes"]
        return found["numbers"]
