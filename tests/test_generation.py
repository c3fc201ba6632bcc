"""Answers to prompts: who is asked, when an answer ends, and what it scores."""

import json

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import pumice
from pumice.errors import PumiceError
from pumice.eval.generation import Example, RougeL, answers, asked, examples, same
from pumice.methods.token.contribution import Contribution
from test_cli import write_tokenizer

CSV = '"mr","ref"\n"name[A]","A is a place."\n"name[A]","A, a ""place"""\n"name[B]","B is, too."\n'


def test_rows_with_one_prompt_are_its_references(tmp_path):
    (tmp_path / "a.csv").write_text(CSV)
    expected = [Example("name[A]", ("A is a place.", 'A, a "place"')), Example("name[B]", ("B is, too.",))]
    assert examples(f"{tmp_path / 'a.csv'}#mr,ref") == expected
    rows = [{"q": one.prompt, "a": reference} for one in expected for reference in one.references]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert examples(f"{tmp_path / 'a.jsonl'}#q, a") == expected
    prompts, chosen = asked(expected, 1, None)
    assert prompts == ["name[A]\nA is a place.\n\nname[B]\n"] and chosen == expected[1:]


@pytest.mark.parametrize("where,text,message", [
    ("a.csv", CSV, "names no columns"),
    ("a.csv#mr", CSV, "names no columns"),
    ("b.csv#mr,ref", CSV, "cannot read examples"),
    ("a.csv#mr,reff", CSV, "row 1 has no text in 'reff'. Its fields: mr, ref"),
    ("a.csv#mr,ref", '"mr","ref"\n', "holds no examples"),
    ("a.jsonl#q,a", '{"q": "x", "a": 3}\n', "row 1 has no text in 'a'"),
    ("a.jsonl#q,a", "[1]\n", "row 1 has no text"),
    ("a.csv#mr,ref", '"mr","reff"\na,b,c\n', "row 1 has no text in 'ref'. Its fields: mr, reff, None"),
    ("a.jsonl#q,a", "{", "cannot read examples"),
])  # fmt: skip
def test_files_that_hold_none_are_refused(tmp_path, where, text, message):
    (tmp_path / where.partition("#")[0].replace("b.csv", "a.csv")).write_text(text)
    with pytest.raises(PumiceError) as error:
        examples(str(tmp_path / where))
    assert message in str(error.value)


def test_line_ends_within_a_cell_stay(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'mr,ref\r\n"one\ntwo\x0c","x"\r\n')
    assert examples(f"{tmp_path / 'a.csv'}#mr,ref") == [Example("one\ntwo\x0c", ("x",))]
    (tmp_path / "a.jsonl").write_text('{"q": "one\u2028two", "a": "x"}\n', encoding="utf-8")
    assert examples(f"{tmp_path / 'a.jsonl'}#q,a") == [Example("one\u2028two", ("x",))]


def test_shots_leave_somebody_to_ask():
    with pytest.raises(PumiceError, match="leave none"):
        asked([Example("a", ("b",))], 1, None)


def test_the_same_tokens():
    assert same([1, 2, 3, 4], [1, 2, 9, 4]) == 0.5
    assert same([1, 2], [1, 2, 3]) == 1.0
    assert same([1, 2, 3, 4], [1]) == 0.25
    assert same([], []) == 1.0 and same([], [1]) == 0.0


def test_rouge_l_is_of_the_best_reference():
    pytest.importorskip("rouge_score")
    one = Example("", ("the cat sat on the mat", "a dog"))
    found = RougeL()(["the cat on mat", "a dog", ""], [one, one, one])
    assert found == pytest.approx([100 * 2 * 1 * (4 / 6) / (1 + 4 / 6), 100.0, 0.0])


def test_answers_are_greedy_and_sparse_where_the_twin_is(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=44, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    found = answers(model, tokenizer, ["once", "upon a time"], new=12)
    for prompt, answer in zip(["once", "upon a time"], found, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            for token in answer:
                assert model(ids).logits[0, -1].argmax() == token
                ids = torch.cat([ids, torch.tensor([[token]])], 1)
        assert len(answer) == 12 or tokenizer.decode(answer).endswith(("\n", "</s>"))
    ids = torch.randint(3, 96, (4, 20), generator=torch.Generator().manual_seed(3))
    twin = pumice.attach(model, pumice.sparsify(model, Contribution(sparsity=0.9), ids, resume=False))
    sparse = answers(twin, tokenizer, ["once", "upon a time"], new=12)
    assert sparse != found
    for runner, alone in ((model, found), (twin, sparse)):
        assert answers(runner, tokenizer, ["once", "upon a time"], new=12, batch=2) == alone
    model.generation_config.eos_token_id = found[1][3]  # one answer then ends before the other
    ended = answers(model, tokenizer, ["once", "upon a time"], new=12)
    assert len({len(answer) for answer in ended}) == 2
    assert answers(model, tokenizer, ["once", "upon a time"], new=12, batch=2) == ended
    assert answers(model, tokenizer, []) == []
    with pytest.raises(PumiceError, match="more than the 64"):
        answers(model, tokenizer, ["x" * 60], new=12)
