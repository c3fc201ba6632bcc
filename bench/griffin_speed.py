"""Claim: GRIFFIN decodes faster than dense, and how much of what the bytes allow is reached.

    python bench/griffin_speed.py            SmolLM2, fp32 and bf16, 10 … 70 % of the FFN neurons, about 5 minutes

Expected before measuring: decode is bound by bytes, so the ratio should come near bytes(dense)/bytes(sparse), less what
Python and attention cost beside the weights (30 blocks of small matrices; heavier in bf16, where the bytes are half).
"""

import json
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def bench(sparsity: float, dtype: str) -> dict:
    """One `pumice bench`, in a process of its own."""
    flags = ["--method", "griffin", "--sparsity", str(sparsity), "--dtype", dtype, "--json"]
    command = [sys.executable, "-m", "pumice.cli.main", "bench", "smollm2", *flags]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    runs = [bench(sparsity, dtype) for dtype in ("fp32", "bf16") for sparsity in (0.1, 0.3, 0.5, 0.7)]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "griffin_speed.json").write_text(json.dumps({"runs": runs}, indent=1) + "\n")
    for run in runs:
        share = (run["speedup"] - 1) / (run["bytes_bound"] - 1) if run["bytes_bound"] > 1 else float("nan")
        print(
            f"{run['dtype']:9} sparsity {run['sparsity']:.4f}  {run['ran']:8} {run['speedup']:.2f}× measured, "
            f"{run['bytes_bound']:.2f}× by bytes ({share:.0%} of the gain)"
        )


if __name__ == "__main__":
    main()
