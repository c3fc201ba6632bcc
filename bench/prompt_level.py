"""Claim: which prompt-level choice of FFN neurons keeps most quality at equal bytes, GRIFFIN's static twin beside it.

    python bench/prompt_level.py FILE [--also TRAIN]     FILE: raw WikiText-2 test text; SmolLM2, about 10 minutes

Window of 512 tokens: 256 are the prompt, the other 256 are scored with the neurons that the prompt chose. Calibrated on
`builtin` text, and with --also on text of the test's own kind (never the test's). Intervals of the ratio to dense are
a paired bootstrap over windows.

Expected from prototypes at 50 %: GRIFFIN 97, static 87, rank fusion 82, dense 24.5.
"""

import argparse
import json
from pathlib import Path

import pumice
from pumice.api import attach
from pumice.calib.data import tokens
from pumice.eval.perplexity import paired_ratio, perplexity
from pumice.report.rows import machine

RESULTS = Path(__file__).parent / "results"
METHODS = [
    {"method": "griffin"},
    {"method": "griffin", "select": "topk_sample"},
    {"method": "griffin", "select": "sample"},
    {"method": "griffin", "select": "random"},
    {"method": "static_topk"},
    {"method": "static_topk", "score": "magnitude"},
    {"method": "static_topk", "score": "fisher"},
    {"method": "glass"},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--also", metavar="FILE", help="a second calibration text, of the test's own kind")
    options = parser.parse_args()
    model, tokenizer = pumice.load("smollm2")
    windows = tokens(f"file:{options.file}", tokenizer, windows=options.windows, order="sequential")
    protocol = {**windows.protocol, "source": Path(options.file).name}
    dense = perplexity(model, windows, prompt=256)
    rows = [{"method": "dense", "perplexity": dense.perplexity, "standard_error": dense.standard_error}]
    print(f"dense {dense.perplexity:.2f}")
    texts = {"builtin": tokens("builtin", tokenizer, windows=16)}
    if options.also:
        texts[Path(options.also).name] = tokens(f"file:{options.also}", tokenizer, windows=16)
    for sparsity in options.sparsity:
        for settings, text in [(m, t) for m in METHODS for t in texts]:
            method = {**settings, "sparsity": sparsity}
            plan = pumice.sparsify(model, method, texts[text])
            if not plan.calibration and text != "builtin":
                continue  # it reads no calibration text
            method |= {"calibration": text} if plan.calibration else {}
            found = perplexity(attach(model, plan, check=False), windows, prompt=256)
            ratio, low, high = paired_ratio(found, dense)
            rows.append(method | {"perplexity": found.perplexity, "ratio": ratio, "ratio_95": [low, high]})
            rows[-1] |= {"achieved_sparsity": plan.sparsity(), "standard_error": found.standard_error}
            print(f"{method}: {found.perplexity:.2f}, {ratio:.2f}× dense [{low:.2f}, {high:.2f}]")
    data = {"protocol": protocol, "prompt": 256, "rows": rows, "machine": machine()}
    data["calibration"] = {name: {**text.protocol, "source": name} for name, text in texts.items()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "prompt_level.json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
