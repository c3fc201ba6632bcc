"""Kernel selection: what is timed is one FFN, and the answer is kept."""

import json

import pytest
import torch

from pumice.kernels import select


@pytest.fixture(autouse=True)
def own_table(tmp_path, monkeypatch):
    monkeypatch.setenv("PUMICE_CACHE", str(tmp_path))
    select._table.cache_clear()
    select.gather_pays.cache_clear()
    yield
    select._table.cache_clear()
    select.gather_pays.cache_clear()


def test_half_the_neurons_take_clearly_less_time_than_all():
    # a dense pass over fewer copies than the narrow one once made this 0.95
    assert select._time_gather(512, 4096, 2048, 3, 1, torch.float32, "cpu")["speedup"] > 1.2


def test_the_answer_is_kept_and_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(select, "_time_gather", lambda *_: {"speedup": 2.0})
    assert select.gather_pays(8, 16, 8, 3, 1, torch.float32, "cpu")
    (entry,) = json.loads((tmp_path / "kernels.json").read_text()).values()
    assert entry == {"speedup": 2.0}
    monkeypatch.setattr(select, "_time_gather", lambda *_: pytest.fail("timed again"))
    select._table.cache_clear()
    select.gather_pays.cache_clear()
    assert select.gather_pays(8, 16, 8, 3, 1, torch.float32, "cpu")


def test_timing_leaves_the_random_numbers_alone(monkeypatch):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    select.gather_pays(32, 64, 32, 3, 1, torch.float32, "cpu")
    assert torch.equal(torch.rand(3), expected)


def test_nothing_dropped_is_never_gathered():
    assert not select.gather_pays(8, 16, 16, 3, 1, torch.float32, "cpu")
