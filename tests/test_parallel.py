"""Two processes that share the calibration text make the masks of one; the first writes and prints."""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

import pumice
from pumice import api
from pumice.calib import parallel
from pumice.calib import stream as streaming
from pumice.calib.journal import Journal
from pumice.errors import PumiceError
from pumice.methods.static.besa import BESA
from pumice.methods.static.sparsegpt import SparseGPT
from pumice.methods.static.wanda import Wanda
from pumice.methods.token.teal import Teal
from pumice.plan import Plan
from test_cli import pumice as command
from test_cli import write_tokenizer
from tiny import tiny

STORIES = Path(__file__).parents[1] / "../shared/models/stories260k"
IDS = torch.randint(3, 96, (10, 24), generator=torch.Generator().manual_seed(1))


def together(work, folder, world=2):
    """What `work(rank)` gives in each of `world` forked processes that are joined; an error is its text."""
    context = multiprocessing.get_context("fork")  # torch is loaded already
    results = context.Queue()

    def run(rank):
        try:
            torch.set_num_threads(1)
            store = f"file://{folder}/rendezvous-{os.getppid()}"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
            dist.barrier()
            results.put((rank, work(rank)))
        except Exception as error:
            known = isinstance(error, PumiceError)
            results.put((rank, str(error) if known else traceback.format_exc()))
        finally:
            parallel.finish()

    processes = [context.Process(target=run, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=100) for _ in processes)
    for process in processes:
        process.join()
    (folder / f"rendezvous-{os.getpid()}").unlink(missing_ok=True)
    return [found[rank] for rank in range(world)]


def masks(plan):
    """Plain data that crosses a process border: keep bits by site."""
    return {name: form.bits.numpy().tobytes() for name, form in plan.weights.items()}


def flips(one, other):
    """Entries of which one keeps what the other drops."""
    assert one.keys() == other.keys()
    return sum(
        (int.from_bytes(bits, "little") ^ int.from_bytes(other[name], "little")).bit_count()
        for name, bits in one.items()
    )


METHODS = {
    "wanda": Wanda(),
    "wanda 2:4": Wanda(pattern="2:4"),
    "sparsegpt": SparseGPT(),
    "owl": Wanda(allocation="owl(m=2)"),
    "sensitivity": Wanda(allocation="sensitivity"),
    "evopress": Wanda(allocation="evopress(generations=2,offspring=3,screen=40,final=90)"),
}


@pytest.mark.parametrize(
    ("family", "method"),
    [*(("llama", name) for name in METHODS), *(("qwen3_moe", name) for name in ("sparsegpt", "sensitivity"))],
)
def test_two_processes_make_the_masks_of_one(family, method, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "GROUP", 48)  # five groups of two windows: three for one process, two for the other
    model, method = tiny(family), METHODS[method]
    alone = masks(pumice.sparsify(model, method, IDS, resume=False))
    first, second = together(lambda rank: masks(pumice.sparsify(model, method, IDS, resume=False)), tmp_path)
    assert first == second
    # Sums of doubles in another order: the masks differ only where two scores are one to the last bit of a float.
    assert flips(alone, first) == 0


def test_every_group_of_windows_stays_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "GROUP", 48)
    groups = list(range(5))
    assert together(lambda rank: parallel.share(groups), tmp_path) == [[0, 2, 4], [1, 3]]
    model = tiny("llama")
    said = together(lambda rank: pumice.sparsify(model, Wanda(), IDS[:2], resume=False), tmp_path)
    assert said == ["1 groups of windows cannot be shared among 2 processes. Use more windows or fewer processes."] * 2


@pytest.mark.parametrize("method", [BESA(), "wanda+reconstruct"], ids=["besa", "reconstruct"])
def test_a_method_that_learns_from_samples_is_refused(method, tmp_path):
    model = tiny("llama")
    for said in together(lambda rank: pumice.sparsify(model, method, IDS, resume=False), tmp_path):
        assert re.match("(besa|reconstruct) learns from its samples", said) and "without torchrun" in said


@pytest.mark.parametrize("killed", ["stream", "owl"])
def test_processes_killed_at_different_blocks_begin_again(killed, tmp_path, monkeypatch):
    """One had written the journal of a block, the other had not."""
    monkeypatch.setattr(streaming, "GROUP", 48)
    monkeypatch.setenv("PUMICE_CACHE", str(tmp_path))
    model, method = tiny("llama"), Wanda(allocation="owl(m=2)")
    alone = masks(pumice.sparsify(model, method, IDS, resume=False))
    write = Journal.write

    def dies(rank):
        calls = []

        def then(self, block, *given):
            calls.append(block)
            if len(calls) == {"owl": 2, "stream": 3}[killed] - rank:  # the second process a block earlier
                raise PumiceError("killed")
            write(self, block, *given)

        Journal.write = then
        return pumice.sparsify(model, method, IDS)

    assert any("killed" in str(said) for said in together(dies, tmp_path))
    assert list(tmp_path.rglob("block-*")) or killed == "owl"
    first, second = together(lambda rank: masks(pumice.sparsify(model, method, IDS)), tmp_path)
    assert first == second and flips(alone, first) == 0


@pytest.mark.skipif(not STORIES.exists(), reason="needs shared/models/stories260k")
@pytest.mark.parametrize("method", [Wanda(sparsity=0.6), SparseGPT(sparsity=0.6)], ids=["wanda", "sparsegpt"])
def test_two_processes_on_a_trained_model(method, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "GROUP", 128)
    model, tokenizer = pumice.load(str(STORIES))
    text = pumice.tokens("builtin", tokenizer, window=64, windows=10)
    alone = masks(pumice.sparsify(model, method, text, resume=False))
    first, second = together(lambda rank: masks(pumice.sparsify(model, method, text, resume=False)), tmp_path)
    assert first == second and flips(alone, first) == 0


# ---- torchrun -------------------------------------------------------------------------------------------------------


def test_torchrun_writes_and_prints_once(tmp_path):
    model = tiny("llama", vocab_size=259)
    model.save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    given = ["sparsify", tmp_path / "model", "--method", "wanda", "--window", "64", "--windows", "64", "--no-measure"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pumice"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, *given, "--out", tmp_path / "two", "--json"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sparsity"] == 0.5  # one object: one process has printed
    assert command(*given, "--out", tmp_path / "one").code == 0
    one, two = Plan.load(tmp_path / "one"), Plan.load(tmp_path / "two")
    assert flips(masks(one), masks(two)) == 0 and one.base["applied"] == two.base["applied"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["eval", "smollm2"], "torchrun shares the work of sparsify and of train; run eval without it"),
        (["sparsify", "smollm2", "--method", "wanda", "--out", "x", "--stream"], "torchrun does not go with --stream"),
    ],
)
def test_what_torchrun_cannot_do_is_said(arguments, said, tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    result = command(*arguments)
    assert result.code == 1 and said in result.err


def test_two_processes_take_the_same_greedy_steps(tmp_path, monkeypatch):
    """Of all processes' text: the shares are those of one process."""
    for module in (api, streaming):
        monkeypatch.setattr(module, "GROUP", 48)
    model, method = tiny("llama"), Teal(sparsity=0.4, allocation="greedy(step=0.1, tokens=100000)")

    def shares(plan):
        return {name: form.sparsity for name, form in plan.select.items()}

    alone = shares(pumice.sparsify(model, method, IDS, resume=False))
    both = together(lambda rank: shares(pumice.sparsify(model, method, IDS, resume=False)), tmp_path)
    assert both[0] == both[1]
    assert both[0] == pytest.approx(alone, abs=2e-3)
