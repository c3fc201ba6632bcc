"""llama.cpp on the same GGUF file, in a process of its own: the best that a user could run instead."""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
from pathlib import Path


def available() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None


def measure(path: Path, prompt: str, *, new: int = 32, repeats: int = 3, threads: int = 2) -> dict:
    """Median decode and prefill tokens/s of llama.cpp, greedy, batch 1, and its completion of `prompt`."""
    settings = {"path": str(path), "prompt": prompt, "new": new, "repeats": repeats, "threads": threads}
    command = [sys.executable, "-m", "pumice.eval.llamacpp", json.dumps(settings)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        return {"error": "it did not end within 180 s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def _main(path: str, prompt: str, new: int, repeats: int, threads: int) -> dict:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = path, 2048, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    ask = {"prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    answers = [server.handle_completions(ask) for _ in range(repeats)]
    timings = [answer["timings"] for answer in answers]
    return {
        "decode_tokens_per_second": statistics.median(t["predicted_per_second"] for t in timings),
        "prefill_tokens_per_second": statistics.median(t["prompt_per_second"] for t in timings),
        "file_bytes": Path(path).stat().st_size,
        "text": answers[0]["choices"][0]["text"],
    }


if __name__ == "__main__":
    print(json.dumps(_main(**json.loads(sys.argv[1]))))
