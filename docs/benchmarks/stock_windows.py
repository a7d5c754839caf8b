"""Loss of models on two long texts, on their second halves, and on what was said long ago; for docs/recipes.md.

python docs/benchmarks/stock_windows.py BASE [CONVERTED ...]      # on a CPU; code in the folders runs
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sa_convert.models.tokens import long_sequences
from sa_convert.texts.text import load_text

LENGTH, TEXTS = 2048, 2
COPIED, APART = 64, 1194
BLOCK = 256


def losses(model, ids: torch.Tensor) -> torch.Tensor:
    """(T - 1,) in nats, of every token (T,) but the first."""
    with torch.inference_mode():
        states, found = model.model(ids[None], use_cache=False).last_hidden_state[0], []
        for start in range(0, len(ids) - 1, BLOCK):
            stop = min(start + BLOCK, len(ids) - 1)
            chances = torch.log_softmax(model.lm_head(states[start:stop]).float(), -1)
            found.append(-chances.gather(1, ids[start + 1 : stop + 1, None])[:, 0])
    return torch.cat(found)


def main(folders: list[str]) -> None:
    text = load_text("builtin").split("validation", ("prose", "code"))
    rows = long_sequences(AutoTokenizer.from_pretrained(folders[0]), text, 4, LENGTH)[:TEXTS]
    generator = torch.Generator().manual_seed(5)
    said = torch.randint(1000, 40000, (700,), generator=generator)[:COPIED]
    between = torch.randint(1000, 40000, (APART - COPIED,), generator=generator)
    copied = torch.cat([said, between, said])
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
        told = [losses(model, row) for row in rows]
        whole, late = (torch.stack([one[start:] for one in told]).mean() for start in (0, LENGTH // 2))
        again = losses(model, copied)[1 - COPIED :].mean()
        text = f"text {whole:.3f}, its second half {late:.3f}, {COPIED} tokens {APART} back {again:.1f}"
        print(f"{folder}: {text}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
