"""Run in the engine's environment: vLLM generates, job after job, and what comes of each is a line of JSON.

    python engine_job.py < jobs.json      {"name": {"folder", "rounds", "new", "options", "logprobs"}, ...}

Each round is a batch of prompts. Of a folder that the engine refuses, the error is printed. One process does all jobs,
since most of the time is that of imports.
"""

import gc
import json
import os
import sys

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND=os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "0"),
    VLLM_ENABLE_V1_MULTIPROCESSING=os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
    OMP_NUM_THREADS="1",
    VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)
DEFAULTS = {
    **{"dtype": "float32", "max_model_len": 256, "block_size": 32, "enforce_eager": True, "max_num_seqs": 16},
    "trust_remote_code": True,
}


def run(job):
    from vllm import LLM, SamplingParams

    options = {**DEFAULTS, **job["options"]}
    llm = LLM(job["folder"], skip_tokenizer_init=True, disable_log_stats=False, **options)
    asked = SamplingParams(
        temperature=0, max_tokens=job["new"], ignore_eos=True, detokenize=False, prompt_logprobs=job.get("logprobs")
    )
    found, losses = [], []
    before = counters(llm)
    for prompts in job["rounds"]:
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], asked, use_tqdm=False)
        found.append([list(output.outputs[0].token_ids) for output in outputs])
        if job.get("logprobs") is not None:
            for ids, output in zip(prompts, outputs, strict=True):
                told = zip(ids[1:], output.prompt_logprobs[1:], strict=True)
                losses.append(-sum(found[token].logprob for token, found in told) / (len(ids) - 1))
    after = counters(llm)
    cache = llm.llm_engine.vllm_config.cache_config
    return {
        "tokens": found,
        "losses": losses,
        "cache_tokens": cache.kv_cache_size_tokens,
        **{name: after[name] - before[name] for name in after},
    }


def counters(llm):
    values = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    return {name: values.get(f"vllm:{name}", 0) for name in ("num_preemptions", "prefix_cache_hits")}


def main():
    jobs = json.load(sys.stdin)
    for name, job in jobs.items():
        try:
            result = run(job)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        print("RESULT " + json.dumps([name, result]), flush=True)
        if len(jobs) > 1:
            from vllm.distributed import cleanup_dist_env_and_memory

            gc.collect()
            cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()
