"""Token windows: the two protocols, the sources, and errors that say what to do."""

import json
import sys
from pathlib import Path

import pytest
import torch

from pumice.calib import sources
from pumice.calib.data import tokens
from pumice.errors import PumiceError

STORIES = Path(__file__).parents[1] / "../shared/models/stories260k"


class Letters:
    """A tokenizer whose tokens are the characters themselves, so that windows can be read back."""

    bos_token_id = 1

    def __call__(self, texts, add_special_tokens, verbose):
        assert not add_special_tokens and not verbose
        return {"input_ids": [[ord(c) for c in text] for text in texts]}


def text(ids) -> str:
    return "".join(map(chr, ids.flatten().tolist()))


def test_sequential_is_the_text_as_it_is(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b" = A =\r\n \n" + bytes(range(97, 117)))
    got = tokens(f"file:{path}", Letters(), window=5, windows=None, order="sequential")
    assert text(got.ids) == path.read_bytes().decode()
    assert got.ids.shape == (6, 5) and got.valid.all() and got.valid.shape == got.ids.shape
    assert got.protocol["tokens"] == got.protocol["characters"] == 30
    assert "sequential" in got.describe() and "no BOS" in got.describe() and "\n" not in got.describe()


def test_sequential_skip_and_windows():
    got = tokens(["abcdefghij"], Letters(), window=2, windows=2, skip=1, order="sequential")
    assert text(got.ids) == "cdef"


def test_bos_takes_one_place_of_each_window():
    got = tokens(["abcdefghij"], Letters(), window=3, windows=None, order="sequential", bos=True)
    assert got.ids[:, 0].eq(1).all() and text(got.ids[:, 1:]) == "abcdefghij"


def test_random_is_seeded_disjoint_and_joined_by_newlines():
    documents = [f"{i:03d}" * 3 for i in range(100)]
    first = tokens(documents, Letters(), window=20, windows=30, seed=3)
    again = tokens(documents, Letters(), window=20, windows=30, seed=3)
    other = tokens(documents, Letters(), window=20, windows=30, seed=4)
    assert torch.equal(first.ids, again.ids) and first.protocol == again.protocol
    assert not torch.equal(first.ids, other.ids)
    pieces = [p for row in first.ids for p in text(row).split("\n")[1:-1]]
    assert set(pieces) <= set(documents) and len(set(pieces)) == len(pieces)


def test_builtin_splits_share_no_paragraph():
    train, test = sources.read("builtin", "train"), sources.read("builtin", "test")
    paragraphs = [{p.strip() for d in documents for p in d.split("\n\n")} - {""} for documents in (train, test)]
    assert not paragraphs[0] & paragraphs[1]
    assert sum(map(len, train)) > 300_000 and sum(map(len, test)) > 100_000


def test_token_ids_and_windows_pass_through():
    ids = torch.arange(12).view(3, 4)
    got = tokens(ids)
    assert torch.equal(got.ids, ids) and got.protocol["window"] == 4 and "token ids" in got.describe()
    assert tokens(got) is got
    with pytest.raises(PumiceError, match=r"LongTensor \[N, T\]"):
        tokens(ids.float())


def test_jsonl_field(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": "ab", "story": "xyz", "n": 1}) for _ in range(9)) + "\n")
    assert sources.read(f"file:{path}") == ["ab"] * 9
    assert sources.read(f"file:{path}#story") == ["xyz"] * 9
    with pytest.raises(PumiceError, match=r"'body'.*text, story"):
        sources.read(f"file:{path}#body")
    path.write_text('{"text": "a"}\n{broken\n')
    with pytest.raises(PumiceError, match="line 2 is not JSON"):
        sources.read(f"file:{path}")


@pytest.mark.parametrize(
    "content,message", [(b"", "empty"), (b" \n ", "empty"), (b"abc", "3 tokens"), (b"\xff\xfe", "UTF-8")]
)
def test_bad_text(tmp_path, content, message):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(PumiceError, match=message):
        tokens(f"file:{path}", Letters(), window=8, windows=1)


def test_errors_teach(tmp_path):
    with pytest.raises(PumiceError, match="wikitext2"):
        tokens("wikitext", Letters())
    with pytest.raises(PumiceError, match="No such file"):
        tokens(f"file:{tmp_path / 'none.txt'}", Letters())
    with pytest.raises(PumiceError, match="fill 2 windows of 4; 5 asked"):
        tokens(["abcdefghij"], Letters(), window=4, windows=5)
    with pytest.raises(PumiceError, match="got list"):
        tokens([1, 2, 3], Letters())
    with pytest.raises(PumiceError, match="tokenizer"):
        tokens("builtin")


def test_without_datasets_the_other_sources_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source in ("wikitext2", "c4"):
        with pytest.raises(PumiceError, match=r"pumice\[data\].*builtin"):
            tokens(source, Letters())


@pytest.mark.skipif(not STORIES.exists(), reason="needs shared/models/stories260k")
def test_real_tokenizer_without_length_warning(caplog):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    tokenizer.model_max_length = 16
    got = tokens(["Once upon a time there was a little stone. " * 20], tokenizer, window=32, windows=None, bos=True)
    assert got.ids[:, 0].eq(tokenizer.bos_token_id).all() and not caplog.records
