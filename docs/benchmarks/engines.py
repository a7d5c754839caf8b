"""What a converted folder and its base have in 1 GiB of vLLM's cache, and whether vLLM computes what transformers does.

    python docs/benchmarks/engines.py PYTHON_OF_THE_ENGINE DIR BASE

The text is 3,072 tokens of Python's help topics; 32 greedy tokens follow it. Lines of the table in docs/engines.md.
"""

import os
import sys
from pathlib import Path
from pydoc_data.topics import topics

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
TOKENS, NEW = 3072, 32
OPTIONS = {
    **{"max_model_len": 4096, "max_num_batched_tokens": 256, "block_size": 32, "async_scheduling": False},
    **{"enable_prefix_caching": False},
}


def in_transformers(folder: str, ids: list[int]) -> tuple[float, list[int]]:
    import torch
    from transformers import AutoModelForCausalLM

    from support.engines import generated

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1].log_softmax(-1)
    loss = -logits.gather(1, torch.tensor(ids[1:])[:, None]).mean().item()
    return loss, generated(folder, [[ids]], NEW)[0][0]


def main() -> None:
    os.environ["SA_CONVERT_ENGINES"], folder, base = sys.argv[1:]
    from transformers import AutoTokenizer

    from support.engines import job, serve

    text = "\n".join(topics[name] for name in sorted(topics))
    ids = AutoTokenizer.from_pretrained(base)(text[:40000]).input_ids[:TOKENS]
    folders = {"base": base, "converted": folder}
    found = serve({name: job(path, [[ids]], NEW, logprobs=0, **OPTIONS) for name, path in folders.items()})
    for name, path in folders.items():
        loss, tokens = in_transformers(path, ids)
        same = "the same" if tokens == found[name]["tokens"][0][0] else "others"
        print(
            f"| {name} | {found[name]['cache_tokens']:,} | {found[name]['losses'][0]:.6f} | {loss:.6f} | {same} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
