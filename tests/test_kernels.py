"""Kernel selection: what is timed is one FFN, and the answer is kept."""

import json

import pytest
import torch

from pumice.kernels import select
from pumice.kernels.cpu.library import describe


@pytest.fixture(autouse=True)
def own_table(tmp_path, monkeypatch):
    monkeypatch.setenv("PUMICE_CACHE", str(tmp_path))
    select._table.cache_clear()
    select.gather_pays.cache_clear()
    select.packed_pays.cache_clear()
    yield
    select._table.cache_clear()
    select.gather_pays.cache_clear()
    select.packed_pays.cache_clear()


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


@pytest.mark.skipif(describe().startswith("absent"), reason=describe())
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "int4"])
def test_packed_is_timed_against_dense_in_the_same_kind(kind):
    found = select._time_packed(64, 96, 50, 2, kind, kind == "fp32")
    assert found["speedup"] == found["dense_us"] / found["packed_us"] and found["packed_us"] > 0


def test_a_packed_answer_is_kept_by_shape_share_rows_and_kind(tmp_path, monkeypatch):
    monkeypatch.setattr(select, "_time_packed", lambda *a: {"speedup": 2.0 if a[3] == 1 else 0.5})
    assert select.packed_pays(8, 16, 50, 1, "fp32") and not select.packed_pays(8, 16, 50, 4, "fp32")
    one, four = json.loads((tmp_path / "kernels.json").read_text())
    assert one.endswith("fp32/8x16:50%/rows1") and four.endswith("fp32/8x16:50%/rows4")
