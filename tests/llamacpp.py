"""llama.cpp in a process of its own: what it makes of texts, and the log-probabilities it gives. For tests."""

import json
import subprocess
import sys
import urllib.request


def ask(jobs: list[dict]) -> list[dict]:
    """For each job (path, prompts of token numbers, texts; new, best): greedy tokens and the best log-probabilities
    after each prompt, and the token numbers of each text."""
    done = subprocess.run([sys.executable, __file__, json.dumps(jobs)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def _answer(path: str, prompts: list, texts: list = (), new: int = 1, best: int = 20) -> dict:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = path, 256, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    # fp32 all the way, so that a wrong setting of the model cannot hide behind the rounding of a cache
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    settings = {"max_tokens": new, "temperature": 0, "ignore_eos": False, "cache_prompt": False, "logprobs": best}
    answers = [server.handle_completions({"prompt": prompt, **settings}) for prompt in prompts]
    found = [answer["choices"][0]["logprobs"]["content"] for answer in answers]
    return {
        "tokens": [[step["id"] for step in steps] for steps in found],
        "best": [{top["id"]: top["logprob"] for top in steps[0]["top_logprobs"]} for steps in found],
        "texts": [_tokenized(server.listening_address, text) for text in texts],
    }


def _tokenized(address: str, text: str) -> list[int]:
    body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    request = urllib.request.Request(f"{address}/tokenize", body, {"Content-Type": "application/json"})
    return json.loads(urllib.request.urlopen(request, timeout=60).read())["tokens"]


if __name__ == "__main__":
    print(json.dumps([_answer(**job) for job in json.loads(sys.argv[1])]))
