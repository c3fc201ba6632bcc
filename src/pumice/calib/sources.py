"""Where text comes from: `builtin`, `wikitext2`, `c4` and `file:PATH`, each as a list of documents."""

from __future__ import annotations

import ast
import importlib.util
import json
from itertools import islice
from pathlib import Path

from pumice.errors import PumiceError, unknown

MODULES = {
    "train": (
        "_pydecimal",
        "argparse",
        "collections",
        "difflib",
        "doctest",
        "inspect",
        "ipaddress",
        "logging",
        "turtle",
    ),
    "test": ("smtplib", "socketserver", "statistics", "threading", "typing"),
}


def read(source: str, split: str = "train") -> list[str]:
    """The documents of a named source."""
    if source.startswith("file:"):
        return _file(source.removeprefix("file:"))
    if source not in SOURCES:
        raise _no_source(source)
    return SOURCES[source](split)


def check(source: str) -> None:
    """Refuse an unknown source and a file that is not there, without reading any text: before a model is loaded."""
    if not source.startswith("file:"):
        if source not in SOURCES:
            raise _no_source(source)
    elif not (path := _place(source.removeprefix("file:"))[0]).is_file():
        why = "it is a folder" if path.is_dir() else "no such file"
        raise PumiceError(f"cannot read {path}: {why}. Check the path after `file:`.")


def _no_source(said: str) -> PumiceError:
    if _place(said[:255])[0].is_file():
        return PumiceError(f"{said!r} is a file: name it as file:{said}.")
    if len(said) > 60:
        return PumiceError(f"{said[:60]!r}… is no data source. Texts themselves go in a list; a file is file:PATH.")
    return unknown("data source", said, [*SOURCES, "file:PATH"])


def _place(where: str) -> tuple[Path, str | None]:
    """`PATH#field` -> the path and the field; a file whose own name has a `#` is taken as it is."""
    if not Path(where).expanduser().exists() and "#" in where:
        name, _, field = where.rpartition("#")
        return Path(name).expanduser(), field
    return Path(where).expanduser(), None


def _file(where: str) -> list[str]:
    path, field = _place(where)
    try:
        text = path.read_bytes().decode("utf-8")  # bytes: newlines stay as they are
    except UnicodeDecodeError as error:
        raise PumiceError(f"{path} is not UTF-8 text (byte {error.start}). Convert it first.") from error
    except OSError as error:
        raise PumiceError(f"cannot read {path}: {error.strerror}. Check the path after `file:`.") from error
    if path.suffix == ".jsonl":
        return [
            _field(path, number, line, field or "text")
            for number, line in enumerate(text.split("\n"), 1)
            if line.strip()
        ]
    if field is not None:
        if "," in field:
            raise PumiceError(f"{path}: #PROMPT,ANSWER (#{field}) is for `train` and `eval --generate` alone.")
        raise PumiceError(f"{path}: a field (#{field}) is for .jsonl files; leave it out.")
    return [text]


def _field(path: Path, number: int, line: str, field: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise PumiceError(
            f"{path}, line {number} is not JSON ({error.msg}). One object per line is expected."
        ) from error
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        texts = [key for key, value in record.items() if isinstance(value, str)] if isinstance(record, dict) else []
        there = (
            f"Fields with text: {', '.join(texts)}. Name one: file:{path}#{texts[0]}."
            if texts
            else "It has no text fields."
        )
        raise PumiceError(f"{path}, line {number} has no text in the field {field!r}. {there}")
    return record[field]


def _builtin(split: str) -> list[str]:
    """English that ships with every CPython: the language reference by topic, then docstrings of the library.

    The first 80 % of the topics and `MODULES["train"]` are train. Topics repeat each other's paragraphs: each paragraph
    is used once, and train has it first, so that no paragraph of test was seen in train.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise PumiceError("this Python comes without pydoc_data; use another source, such as file:PATH.") from error
    names = sorted(topics)
    border = len(names) * 4 // 5
    train = [topics[name] for name in names[:border]] + [_docstrings(module) for module in MODULES["train"]]
    test = [topics[name] for name in names[border:]] + [_docstrings(module) for module in MODULES["test"]]
    seen: set[str] = set()
    documents = [_unseen(text, seen) for text in train + test]
    return [text for text in (documents[: len(train)] if split == "train" else documents[len(train) :]) if text]


def _docstrings(module: str) -> str:
    """The docstrings of a library module, read from its source without importing it; none where it has no source."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.origin or not spec.origin.endswith(".py") or not Path(spec.origin).exists():
        return ""
    tree = ast.parse(Path(spec.origin).read_bytes())
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    return "\n\n".join(text for text in found if len(text) > 200)


def _unseen(text: str, seen: set[str]) -> str:
    paragraphs = [p for p in text.split("\n\n") if p.strip() not in seen]
    seen.update(p.strip() for p in paragraphs)
    return "\n\n".join(paragraphs)


def _wikitext2(split: str) -> list[str]:
    """The rows joined by two newlines, as the pruning papers read them: not the text of `wiki.test.raw`."""
    return ["\n\n".join(_hub("Salesforce/wikitext", None, name="wikitext-2-raw-v1", split=split))]


def _c4(split: str) -> list[str]:
    shard = {"train": "en/c4-train.00000-of-01024.json.gz", "test": "en/c4-validation.00000-of-00008.json.gz"}[split]
    if split == "test":  # the papers' 1,100 documents, joined by a space
        return [" ".join(_hub("allenai/c4", 1100, data_files={split: shard}, split=split, streaming=True))]
    return _hub("allenai/c4", 4096, data_files={split: shard}, split=split, streaming=True)


def _hub(repository: str, first: int | None, **options) -> list[str]:
    """The `first` texts (None: all) of a dataset of the hub.

    A missing network is found out in seconds: the libraries' own retries take minutes.
    """
    instead = "Use --data builtin, or --data file:PATH with a .txt or .jsonl file."
    try:
        import datasets
        from huggingface_hub import HfApi, constants
    except ImportError as error:
        raise PumiceError(f"{repository} needs `pip install pumice[data]`. {instead}") from error
    try:
        if not constants.HF_HUB_OFFLINE:
            HfApi().dataset_info(repository, timeout=10)
        return [row["text"] for row in islice(datasets.load_dataset(repository, **options), first)]
    except Exception as error:
        offline = "" if constants.HF_HUB_OFFLINE else " HF_HUB_OFFLINE=1 reads an earlier download."
        raise PumiceError(f"cannot get {repository} ({type(error).__name__}: {error}).{offline} {instead}") from error


SOURCES = {"builtin": _builtin, "wikitext2": _wikitext2, "c4": _c4}
