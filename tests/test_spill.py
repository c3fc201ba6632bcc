"""Hidden states above the budget lie in files, with the same bits, and leave nothing behind."""

import gc

import pytest
import torch

import pumice
from pumice.calib.spill import Spill
from pumice.errors import PumiceError
from tiny import tiny

IDS = torch.randint(3, 96, (6, 24), generator=torch.Generator().manual_seed(1))


def test_the_budget_counts_what_is_still_in_use(tmp_path):
    spill = Spill(1e-6, tmp_path)  # 1,000 bytes
    first, second = torch.randn(200), torch.randn(200)
    assert spill.keep(first) is first and spill.used == 800
    kept = spill.keep(second)
    assert kept is not second and torch.equal(kept, second) and spill.used == 800
    del first
    gc.collect()
    assert spill.used == 0 and spill.keep(second) is second
    assert list(tmp_path.iterdir()) == []  # a file lives as long as its tensor


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "wanda+reconstruct"])
def test_masks_are_the_same_bits_from_files(method, tmp_path, monkeypatch):
    monkeypatch.setenv("PUMICE_CACHE", str(tmp_path))
    one, other = (pumice.sparsify(tiny("llama"), method, IDS, memory=memory, resume=False) for memory in (4.0, 0.0))
    assert (tmp_path / "spill").exists()
    for name, form in one.weights.items():
        assert torch.equal(form.bits, other.weights[name].bits), name
        assert form.values is None or torch.equal(form.values, other.weights[name].values), name


def test_a_full_disk_and_a_senseless_budget_are_errors(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(PumiceError, match=r"cannot keep hidden states.*No space left on device"):
        Spill(0, tmp_path).keep(torch.randn(10))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(PumiceError, match="number of gigabytes"):
        Spill(-1)
