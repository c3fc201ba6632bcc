"""Claim: `pumice eval` gives the perplexity that ten independent lines give, and the one known for this file.

    python bench/perplexity.py FILE          FILE: raw WikiText-2 test text; SmolLM2-135M-Instruct, about 3 minutes

Windows of 512 tokens without overlap, no BOS, the first 64, the text as it is, tokenised once. Known: 29.45 ± 0.02.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pumice.hub.models import locate
from pumice.report.rows import machine

RESULTS = Path(__file__).parent / "results"
KNOWN = 29.45


def by_hand(file: str) -> float:
    folder = locate("smollm2").folder
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(Path(file).read_bytes().decode(), add_special_tokens=False, return_tensors="pt").input_ids[0]
    losses = []
    with torch.no_grad():
        for window in ids[: 64 * 512].view(64, 512):
            logits = model(window[None]).logits[0, :-1].log_softmax(-1)
            losses.append(-logits.gather(1, window[1:, None]).mean().item())
    return math.exp(sum(losses) / len(losses))


def main() -> None:
    file = sys.argv[1]
    command = [sys.executable, "-m", "pumice.cli.main", "eval", "smollm2", "--data", f"file:{file}", "--json"]
    ours = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    theirs = by_hand(file)
    print(f"pumice eval {ours['perplexity']:.4f}, by hand {theirs:.4f}, known {KNOWN}")
    assert abs(ours["perplexity"] - theirs) < 1e-3, "pumice eval and the ten lines differ"
    assert abs(ours["perplexity"] - KNOWN) < 0.02, "the figure is not the known one"
    data = {"pumice_eval": ours["perplexity"], "standard_error": ours["standard_error"], "by_hand": theirs}
    data |= {"known": KNOWN, "window": 512, "windows": 64, "bos": False, "file": Path(file).name, "machine": machine()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "perplexity.json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
