"""EvoPress: evolutionary search over the sparsities of blocks or matrices, judged by the whole model.  arXiv:2410.14649

child = parent after min(a, b) switches, a, b ~ U{1 … switches}: one unit loses some weights more, another as many less
fitness = mean KL(dense ‖ sparse) a token: of all children on `screen` tokens, of the best and the parent on `final`
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pumice.budget import removed
from pumice.calib import parallel
from pumice.calib.block import BlockRun
from pumice.calib.data import Windows
from pumice.calib.divergence import Divergence, pruned
from pumice.calib.stats import ColumnNorm
from pumice.calib.stream import stream
from pumice.calib.work import Work
from pumice.disk import write
from pumice.errors import PumiceError
from pumice.registry import method
from pumice.sites import Site

Counts = dict[str, int]  # unit -> weights that it loses
Judge = Callable[[list[Counts], list[int]], list[float]]  # candidates, numbers of pieces -> fitness
PIECE = 256  # tokens that run through the model at once
POOL = 16  # times `screen`: what the screening draws from


class Parts(NamedTuple):
    """Numbers of the pieces of text: for the final judgement, and for the screening, which draws `screen` of `pool`."""

    final: list[int]
    pool: list[int]
    screen: int


@method("evopress", kinds=["linear"])
class EvoPress:
    """The masks that are judged are Wanda's on the dense model's inputs, whatever method runs afterwards."""

    generations: int = 30
    offspring: int = 8  # children in a generation
    screen: int = 256  # tokens on which all children are compared, drawn anew in each generation
    survivors: int = 2  # children that are judged on `final`
    final: int = 1024  # tokens on which the best children are compared with their parent, the same throughout
    step: float = 0.05  # of a unit's weights: what a switch moves
    spread: float = 0.2  # how far a unit's sparsity may go from the request
    switches: int = 3
    per: Literal["block", "matrix"] = "block"
    seed: int = 0

    def __post_init__(self):
        counts = (self.offspring, self.screen, self.final, self.switches)
        if min(counts) < 1 or self.generations < 0 or not 1 <= self.survivors <= self.offspring:
            raise PumiceError(
                "evopress: offspring, screen, final and switches are at least 1, generations at least 0, survivors "
                "between 1 and offspring."
            )
        if not 0 < self.step <= 1 or not 0 <= self.spread <= 1:
            raise PumiceError(
                f"evopress: step is in 0 … 1, not 0, and spread in 0 … 1; got {self.step}, {self.spread}."
            )

    def allocate(self, work: Work, sparsity: float) -> dict[str, float]:
        if any(p.is_meta for p in work.model.parameters()):
            raise PumiceError(
                "the allocation evopress runs the whole model again and again, so it does not go with --stream. Take "
                "owl or sensitivity, which need one block in memory."
            )
        text = pieces(work.text("evopress"))
        parts = self.parts(*text.ids.shape)
        last = parts.pool[-1] + 1
        text = Windows(text.ids[:last], text.valid[:last], text.protocol)
        units: dict[str, list[Site]] = {}
        for site in work.sites:
            units.setdefault(site.name if self.per == "matrix" else f"block {site.block}", []).append(site)
        size = {unit: sum(site.units for site in sites) for unit, sites in units.items()}
        with pruned(work, column_norms(work)) as model:
            divergence = Divergence(work.model, text)

            def fitness(counts: Counts, texts: list[int]) -> float:
                model.set({site.name: counts[unit] / size[unit] for unit in units for site in units[unit]})
                return divergence.of(texts)

            journal = work.journals("evopress")
            found, said = self.search(size, sparsity, shared(fitness), parts, journal and journal.folder)
        work.notes.append(said)
        return {site.name: found[unit] / size[unit] for unit in units for site in units[unit]}

    def search(
        self, size: Counts, sparsity: float, judge: Judge, parts: Parts, folder: Path | None
    ) -> tuple[Counts, str]:
        """The fittest counts, and what to say of them. A search that was killed goes on after its last generation."""
        start = {unit: removed(n, sparsity) for unit, n in size.items()}
        history = read(folder)
        if not history:
            history = [{"counts": start, "fitness": judge([start], parts.final)[0]}]
            keep(folder, history)
        bar = tqdm(desc="evopress", unit="generation", initial=len(history) - 1, total=self.generations, leave=False)
        with bar:
            for generation in range(len(history), self.generations + 1):
                draw = random.Random(f"{self.seed} {generation}")
                parent = history[-1]
                children = [self.mutate(parent["counts"], size, sparsity, draw) for _ in range(self.offspring)]
                few = sorted(draw.sample(parts.pool, parts.screen))
                best = self.best(children, judge, few, parts.final)
                history.append(best if best["fitness"] < parent["fitness"] else parent)
                keep(folder, history)
                bar.set_postfix_str(f"KL {history[-1]['fitness']:.4f}, uniform {history[0]['fitness']:.4f}")
                bar.update()
        first, last = history[0]["fitness"], history[-1]["fitness"]
        said = f"evopress: KL to the dense model {first:.4f} where all are as sparse, {last:.4f} after "
        return history[-1]["counts"], said + f"{self.generations} generations"

    def best(self, children: list[Counts], judge: Judge, few: list[int], final: list[int]) -> dict:
        """All children on a few texts, then those that do best there on the final ones."""
        screened = judge(children, few)
        order = sorted(range(len(children)), key=screened.__getitem__)[: self.survivors]
        fitness, i = min(zip(judge([children[i] for i in order], final), order, strict=True))
        return {"counts": children[i], "fitness": fitness}

    def parts(self, texts: int, length: int) -> Parts:
        final, screen = -(-self.final // length), -(-self.screen // length)
        if texts < max(final, screen):
            raise PumiceError(
                f"evopress judges on {max(self.final, self.screen)} tokens, {max(final, screen)} pieces of {length}; "
                f"the calibration text fills {texts}. Use more windows, or lower its `final` and `screen`."
            )
        first = final if texts >= final + screen else 0
        return Parts(list(range(final)), list(range(first, min(texts, final + POOL * screen))), screen)

    def mutate(self, parent: Counts, size: Counts, sparsity: float, draw: random.Random) -> Counts:
        """A child that loses as many weights in all; where no switch is possible, the parent itself."""
        child, units = dict(parent), list(size)
        wanted = min(draw.randint(1, self.switches), draw.randint(1, self.switches))
        for _ in range(50 * wanted if len(units) > 1 else 0):
            more, less = draw.sample(units, 2)
            moved = max(removed(min(size[more], size[less]), self.step), 1)
            after = {more: child[more] + moved, less: child[less] - moved}
            if all(0 <= n <= size[u] and abs(n / size[u] - sparsity) <= self.spread + 1e-6 for u, n in after.items()):
                child |= after
                wanted -= 1
            if not wanted:
                break
        return child


def pieces(text: Windows) -> Windows:
    """The windows cut into pieces of PIECE tokens, the first of every window before the second of any."""
    length = min(PIECE, text.ids.shape[1])
    each = text.ids.shape[1] // length

    def cut(t: Tensor) -> Tensor:
        return t[:, : each * length].unflatten(1, (each, length)).transpose(0, 1).flatten(0, 1)

    ids, valid = cut(text.ids), cut(text.valid)
    full = valid.any(1)
    return Windows(ids[full], valid[full], text.protocol)


def column_norms(work: Work) -> dict[str, Tensor]:
    """‖x‖ of every input tensor that the sites read, on the dense model."""
    found: dict[str, Tensor] = {}

    def note(run: BlockRun) -> dict:
        reached = {site.input: site for site in run.sites if (site.input, ColumnNorm) in run.collected}
        found.update({key: run.stats(site)[ColumnNorm] for key, site in reached.items()})
        return {}

    given = {"sites": work.sites, "needs": (ColumnNorm,), "spill": work.spill, "title": "evopress: inputs"}
    stream(work.model, work.arch, work.windows, work.source, note, **given)
    return found


def shared(fitness: Callable[[Counts, list[int]], float]) -> Judge:
    """The fitness of several candidates, shared among the processes of a data-parallel run."""

    def judge(candidates: list[Counts], texts: list[int]) -> list[float]:
        found = torch.zeros(len(candidates), dtype=torch.float64)
        for i in range(parallel.rank(), len(candidates), parallel.world()):
            found[i] = fitness(candidates[i], texts)
        parallel.reduce_sum([found])
        return found.tolist()

    return judge


def read(folder: Path | None) -> list[dict]:
    """Every generation so far: the counts of the fittest, and its fitness."""
    history: list[dict] = []
    while folder is not None and (path := folder / f"generation-{len(history):05d}.json").exists():
        history.append(json.loads(path.read_text()))
    return history if parallel.agreed(len(history)) else []


def keep(folder: Path | None, history: list[dict]) -> None:
    if folder is not None:
        path = folder / f"generation-{len(history) - 1:05d}.json"
        write(path, lambda part: part.write_text(json.dumps(history[-1])))
