"""Tables for people: they fit, nothing is cut, and the verdicts say what the figures say."""

import io
import math
from dataclasses import replace

import pytest
from rich.console import Console

from pumice.eval.perplexity import Perplexity
from pumice.eval.speed import Speed
from pumice.report.methods import about, cards, markdown, table
from pumice.report.rows import Row
from pumice.report.tables import comparison, number, verdicts


def speed(tokens_per_second: float, ffn: float, total: float) -> Speed:
    return Speed(
        prefill_tokens_per_second=100,
        decode_tokens_per_second=tokens_per_second,
        decode_ms=1000 / tokens_per_second,
        effective_bytes=int(total),
        ffn_bytes=int(ffn),
        resident_bytes=10**9,
    )


def score(value: float, error: float = 1.2) -> Perplexity:
    return Perplexity(perplexity=value, standard_error=error, losses=(1.0,), tokens=10, protocol={"window": 8})


def row(name: str, ran: str, perplexity: float) -> Row:
    return Row(
        name=name,
        sparsity=0.5,
        speed=speed(115.6, 310.5e6, 1538e6),
        speedup=1.12,
        bytes_bound=1.34,
        perplexity=score(perplexity, perplexity / 10),
        dense_perplexity=17.3,
        ran=ran,
    )


DENSE = [Row(name="dense", speed=speed(13.6, 318.5e6, 1538e6), speedup=1.0, perplexity=score(18.8))]
DENSE += [Row(name="dense, 2nd half", perplexity=score(17.3))]
SPARSE = [row("griffin 0.5", "gathered", 20), row("static_topk 0.5", "masked", 12_600)]
SPARSE += [row("magnitude 0.5", "dense storage", math.nan)]


def drawn(what, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, markup=False, highlight=False)
    console.print(what)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_comparison_fits_and_no_row_wraps(width):
    lines = drawn(comparison([*DENSE, *SPARSE], "m", width), width)
    assert max(map(len, lines)) <= width and not any("…" in line for line in lines)
    assert sum(any(r.name in line for r in SPARSE) for line in lines) == 3
    assert any("static_topk 0.5" in line and "12,600 ± 1,260" in line and "17.30" in line for line in lines)


def test_a_column_with_nothing_in_it_is_left_out():
    text = "\n".join(drawn(comparison([Row(name="dense", speed=speed(13.6, 1e6, 2e6), speedup=1.0)], "m"), 80))
    assert "tok/s" in text and "perplexity" not in text and "sparsity" not in text


def test_perplexities_have_the_digits_that_mean_something():
    assert number(17.312, 1.234) == "17.31 ± 1.23"
    assert number(512.34, 50.51) == "512.3 ± 50.5"
    assert number(12_345.6, 1200.4) == "12,346 ± 1,200"
    assert (number(math.nan), number(math.inf), number(5.0, math.nan)) == ("NaN", "∞", "5.00")


def test_verdicts_name_what_gave_no_speed_and_what_broke():
    said = verdicts([*DENSE, *SPARSE])
    assert said[0].startswith("magnitude 0.5: no speed") and said[1].startswith("static_topk 0.5: no speed here")
    assert said[2].startswith("static_topk 0.5: broken") and said[3] == "magnitude 0.5: broken. Perplexity is NaN."
    assert not any(line.startswith("griffin") for line in said)


def test_a_mask_that_ran_dense_says_why_and_a_packed_one_has_no_such_verdict():
    masked = replace(row("wanda 0.5", "dense storage", 20), why="packed was measured no faster")
    assert verdicts([*DENSE, masked])[1] == "wanda 0.5: packed was measured no faster."
    packed = row("wanda 0.5", "packed", 20)
    assert verdicts([*DENSE, packed]) == []
    (said,) = verdicts([*DENSE, replace(packed, speedup=1.3, bytes_bound=1.1)])
    assert "faster than the bytes allow" in said and "the kernel's" in said
    (said,) = verdicts([*DENSE, replace(packed, speedup=1.0)])
    assert said.startswith("wanda 0.5: no speed to speak of") and "dense storage" not in said


def test_a_choice_without_a_kernel_says_why():
    lacking = row("cats 0.5", "masked, no gathered form", 20)
    assert "have no faster form yet" in verdicts([*DENSE, lacking])[0]
    (said,) = verdicts([*DENSE, replace(lacking, why="the kernels are for CPUs")])
    assert said == "cats 0.5: no speed: the kernels are for CPUs. Dense work is done and masked."


def test_a_row_as_json_is_flat_and_leaves_out_what_was_not_measured():
    found = SPARSE[0].summary()
    assert found["decode_tokens_per_second"] == 115.6 and found["perplexity"] == 20 and found["tokens_scored"] == 10
    assert not any(isinstance(value, dict) for name, value in found.items() if name != "protocol")
    assert Row(name="dense").summary() == {"name": "dense", "ran": "dense"}


@pytest.mark.parametrize("width", [80, 120])
def test_the_methods_fit(width):
    lines = drawn(table(), width)
    assert max(map(len, lines)) <= width and "…" not in "".join(lines)
    assert all(any(line.startswith(card.name) for line in lines) for card in cards())


def test_what_a_method_does_is_its_first_sentence_without_the_name():
    assert about("Wanda: in each row drop |w|·‖x‖.  arXiv:2306.11695") == "in each row drop |w|·‖x‖"
    assert about("Drop everything.") == "Drop everything"


def test_markdown_escapes_bars():
    lines = markdown().splitlines()
    assert len(lines) == 2 + sum(card.decides != "third party" for card in cards())
    assert {line.replace("\\|", "").count("|") for line in lines} == {6}
