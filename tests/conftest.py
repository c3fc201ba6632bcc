"""One thread (tiny models gain nothing from more, and results stay the same bits) and a cache of the run's own."""

import os

import pytest
import torch

torch.set_num_threads(1)
os.environ.setdefault("TQDM_DISABLE", "1")


@pytest.fixture(autouse=True, scope="session")
def cache_folder(tmp_path_factory):
    if "PUMICE_CACHE" not in os.environ:
        os.environ["PUMICE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
