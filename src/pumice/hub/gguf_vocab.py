"""The tokenizer of a model as GGUF metadata: tokens, their types, merges or scores, and the names of its rules.

A BPE of bytes (`gpt2` in a GGUF) carries its merges and the name of the rule that cuts text into words. A BPE of
characters (`llama`) carries a score for each token, and the pair whose union scores highest is merged first: minus the
rank of a token's merge is such a score.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from gguf import GGUFReader, GGUFValueType, TokenType

from pumice.errors import PumiceError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

SPACE = "▁"
ELSE = "Use `--to hf`, and convert that folder with llama.cpp's own convert_hf_to_gguf.py."
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
RULES = {  # steps of a pre-tokenizer -> what llama.cpp calls them
    ("words",): "gpt-2",
    ("digits", "words"): "smollm",
    (WORDS + r"\p{N}" + REST,): "qwen2",
    (WORDS + r"\p{N}{1,3}" + REST,): "llama-bpe",
}
SPECIAL = ("bos", "eos", "unk", "pad")


def add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int, origin: Path | None) -> None:
    """Write the metadata `tokenizer.*` for a model of `rows` embeddings.

    Where the weights came from a GGUF with the same tokens, `origin`, its metadata is taken over: it says more than
    what transformers makes of it.
    """
    if origin is not None and _take_over(writer, origin, tokenizer, rows):
        return
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    if data["model"]["type"] != "BPE":
        raise PumiceError(f"its tokenizer is a {data['model']['type']} model, and only BPE is known here. {ELSE}")
    tokens = _tokens(tokenizer, rows)
    added = {token["id"]: token for token in data["added_tokens"]}
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in data["model"]["merges"]]
    if data["model"]["byte_fallback"]:
        _characters(writer, tokens, added, merges, data["model"]["unk_token"])
    else:
        _bytes(writer, tokens, added, merges, data["pre_tokenizer"])
    _settings(writer, tokenizer)


def _take_over(writer: GGUFWriter, origin: Path, tokenizer: PreTrainedTokenizerBase, rows: int) -> bool:
    fields = {name: f for name, f in GGUFReader(origin).fields.items() if name.startswith("tokenizer.")}
    tokens = fields["tokenizer.ggml.tokens"].contents()
    own = _tokens(tokenizer, rows)
    if len(tokens) != rows or any(ours is not None and ours != token for ours, token in zip(own, tokens, strict=True)):
        return False
    for name, entry in fields.items():
        kind, *of = entry.types
        writer.add_key_value(name, entry.contents(), kind, of[-1] if kind == GGUFValueType.ARRAY else None)
    return True


def _tokens(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[str | None]:
    """Every token by its number; None where the embedding has a row and the tokenizer no token."""
    vocabulary = tokenizer.get_vocab()
    if (most := max(vocabulary.values())) >= rows:
        raise PumiceError(f"its tokenizer has a token number {most}, but the embedding has {rows} rows.")
    by_number = {number: token for token, number in vocabulary.items()}
    return [by_number.get(number) for number in range(rows)]


def _bytes(writer: GGUFWriter, tokens: list[str | None], added: dict, merges: list, steps: dict | None) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule_of(steps))
    names, types = _names(tokens, added)
    writer.add_token_list(names)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(part.replace(" ", "Ġ") for part in pair) for pair in merges])


def _characters(writer: GGUFWriter, tokens: list[str | None], added: dict, merges: list, unknown: str | None) -> None:
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    names, types = _names(tokens, added)
    for number, token in enumerate(names):
        if token == unknown:
            types[number] = TokenType.UNKNOWN
        elif re.fullmatch("<0x[0-9A-F]{2}>", token):
            types[number] = TokenType.BYTE
        elif types[number] == TokenType.USER_DEFINED:
            names[number] = token.replace(SPACE, " ")  # looked for in the text before its spaces are replaced
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(names)
    writer.add_token_scores([float(-ranks.get(token or "", 0)) for token in tokens])
    writer.add_token_types(types)


def _names(tokens: list[str | None], added: dict) -> tuple[list[str], list[int]]:
    names, types = [], []
    for number, token in enumerate(tokens):
        names.append(f"[PAD{number}]" if token is None else token)
        if token is None:
            types.append(TokenType.UNUSED)
        elif number in added:
            types.append(TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED)
        else:
            types.append(TokenType.NORMAL)
    return names, types


def rule_of(pre_tokenizer: dict | None) -> str:
    """llama.cpp's name for the way in which a byte BPE cuts text into words."""
    steps = tuple(filter(None, map(_step, (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}]))))
    if steps not in RULES:
        said = json.dumps(pre_tokenizer, ensure_ascii=False)
        raise PumiceError(f"its tokenizer cuts text in a way that has no known name in llama.cpp ({said}). {ELSE}")
    return RULES[steps]


def _step(step: dict) -> str | None:
    if step.get("type") == "ByteLevel":
        return "prefixed" if step["add_prefix_space"] else "words" if step["use_regex"] else None
    if step.get("type") == "Digits" and step["individual_digits"]:
        return "digits"
    if step.get("type") == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return step["pattern"].get("Regex", "?")
    return "?"


def _settings(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    """Special tokens, the chat template, and what is put before and after a text, as the tokenizer itself does it."""
    for name in SPECIAL:
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    first = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).tokens[0]
    writer.add_add_space_prefix(first.startswith(SPACE))
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
