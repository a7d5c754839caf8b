"""Writes what code knows best: the table of supported families, and which auto classes load them.

python docs/generate.py           # writes docs/families.md and sa_convert/families/auto_classes.json
python docs/generate.py --check   # fails if the page is not what would be written
"""

import json
import re
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

from sa_convert.families.family import Family  # noqa: E402
from sa_convert.families.model_classes import FILE as AUTO_CLASSES  # noqa: E402
from sa_convert.families.model_classes import classes_in_transformers  # noqa: E402
from sa_convert.families.table import FAMILIES  # noqa: E402
from support.tiny_models import kinds_of  # noqa: E402

PAGE = Path(__file__).parent / "families.md"
CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
PINNED = re.findall(r"^transformers==(\d+\.\d+)", CONSTRAINTS.read_text(), re.MULTILINE)[0]
"""The minor version of transformers that the tests run with."""
HEAD = """# Supported families

This page is generated from the data files in `sa_convert/families/models` by `python docs/generate.py`; a test fails if
the two differ. The family is chosen by `model_type` in config.json, never by a model's name. The class that is
converted is the one that config.json names under `architectures`: LlamaForSequenceClassification and BertModel as well
as those below. The converted class derives from it.

Every family is converted through the command line by `tests/families/test_families.py`, from a tiny random model. In
each case

- the logits equal the unmodified base's under forced attention probabilities (1e-4, float32), with eager attention, and
  with SDPA if the family has it,
- cached equals uncached decoding, if the model caches,
- the files hold no query and key rows of borrowers.

`tests/search/test_calibrate_families.py` runs search and refit in every family. What was tested is the type of model,
not every published checkpoint of it.

The column *maps* says with which maps:

| map | borrows |
|---|---|
| span | whole layers, same heads, as in the paper |
| layers | whole layers, other heads |
| groups | whole KV groups |
| heads | single heads, the most demanding |

*Runs on* says on which versions of transformers converted folders were loaded and generated the same tokens
(`tests/ecosystem/test_transformers_4.py`). [compatibility.md](compatibility.md) has the releases between them.

| `model_type` | class | kind | smallest unit that borrows | attention | maps | runs on | remarks |
|---|---|---|---|---|---|---|---|
"""
TAIL = """
A model of another type is refused with the reason. [smoke.md](smoke.md) has what becomes of every causal language model
that transformers knows: converted, or refused and why.

## Rules that follow from the family

- A source and its borrower have the same attention type, window, head size and treatment of positions. In an
  encoder-decoder, encoder self-attention, decoder self-attention and cross-attention share within their own kind.
- The keys of a KV group go if all its query heads borrow. Queries go head by head.
- If one norm runs over the queries (and one over the keys) of all heads together, only whole layers borrow.
- Of a fused projection, a layer that borrows keeps its own queries, its own keys and all values, in this order.
- In a mixed model, layers without softmax attention stay as they are, and spans pass over them.
- In a multimodal model, only the language model shares; everything else is copied byte by byte.
- An encoder caches nothing: sharing saves its parameters and the time of Q.K and softmax.

## To add a family

1. Look at the attention class in `transformers/models/<type>/modeling_<type>.py`: how it names its projections, whether
   one makes queries, keys and values together (and in which order its rows lie), what norms them, what masks them.
2. Copy the file of its nearest neighbour in `sa_convert/families/models` to `<type>.json`, and change it: the config
   class, the class that most checkpoints name, and what differs from Llama. In `sa_convert/families/family.py` each
   field has a sentence beside it. If the two differ in little, write `"like": "<neighbour>"` and only that. Give
   `tokenizer` what `TOKENIZER_MAPPING_NAMES` of transformers has for the type.
3. If its own forward fixes the number of heads, or does not call the attention interface, add `"plain_forward": true`
   to `modules`. If it takes steps of its own (ALiBi, tables of positions), write a small class in
   `sa_convert/runtime/shared_attention_special.py`, named by `module`.
4. Run `pytest -k <type> tests/families tests/rewriting/test_rewrite_model.py tests/search/test_calibrate_families.py`.
   They find the file by themselves. If the default config is no small one, or hides what is special, add the options
   that bring it out to `SPECIAL` in `tests/support/tiny_models.py`: data, not code.
5. Run `pytest tests/ecosystem/test_transformers_4.py -k <type>`. If transformers 4.57 computes the family by code of
   its own, write `"transformers_5": true`, and converted folders say so there.
6. Run `python docs/generate.py` and `python docs/benchmarks/smoke.py`.
"""
# Types that transformers 4.57 does not have; tests/ecosystem/test_transformers_4.py compares.
NOT_IN_4 = {
    "cohere_compass_text",
    "cwm",
    "exaone_moe",
    "hy_v3",
    "hyperclovax",
    "jais2",
    "kolibri1",
    "lfm2_moe",
    "mellum",
    "minimax_m2",
    "ministral3",
    "nanochat",
    "olmo_hybrid",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "solar_open",
}
NORMS = {
    "shared": "one for all heads",
    "rows": "one row per head",
    "list": "one module per head",
    "joint": "over all heads",
}
SLIDING = {
    "none": "full",
    "all": "sliding if config.json gives a window, else full",
    "periodic": "sliding, every {period}th full",
    "periodic_first": "sliding, every {period}th full, from the first on",
    "from_max_window_layers": "full; sliding from `max_window_layers` on if `use_sliding_window`",
    "alternate_below_max_window_layers": "full; every other sliding if `use_sliding_window`",
    "without_rotary": "full; layers without rotation sliding if `use_sliding_window`",
    "chunked_with_rotary": "in chunks; layers without rotation full",
}
ORDINAL = {"2th": "2nd", "3th": "3rd"}


def kind(family: Family) -> str:
    if family.encoder_decoder:
        return "encoder-decoder"
    if family.text:
        return "language model in a multimodal one"
    what = "encoder" if family.modules.bidirectional else "decoder"
    return f"{what}, some layers" if family.mixed else what


def remarks(family: Family) -> list[str]:
    found = []
    if family.modules.query_norm:
        found.append(f"norms of queries and keys: {NORMS[family.modules.norm]}")
    if family.modules.fused:
        found.append(f"fused `{family.modules.fused}`")
    if family.modules.gate:
        found.append("gated output")
    if family.modules.sinks:
        found.append("attention sinks of borrowers go, too")
    if family.modules.rotary == "sliding":
        found.append("only sliding layers rotate queries and keys")
    if family.modules.rotary == "no_rope_layers":
        found.append("layers with and without rotation do not share")
    if family.modules.module:
        found.append("our own attention forward, for this family")
    elif family.modules.plain_forward:
        found.append("our own attention forward")
    return found


def row(family: Family) -> str:
    sliding = SLIDING[family.windows.sliding].format(period=family.windows.period)
    for wrong, right in ORDINAL.items():
        sliding = sliding.replace(wrong, right)
    unit = "layer" if family.granularity == "layer" else "head (keys: KV group)"
    cells = (
        f"`{family.model_type}`",
        family.default_class,
        kind(family),
        unit,
        sliding,
        ", ".join(kinds_of(family.model_type)),
        PINNED if family.transformers_5 or family.model_type in NOT_IN_4 else f"4.57, {PINNED}",
        "; ".join(remarks(family)),
    )
    return f"| {' | '.join(cells)} |"


def page() -> str:
    return HEAD + "\n".join(row(family) for family in FAMILIES.values()) + "\n" + TAIL


def auto_classes() -> str:
    """auto_classes.json, a family on each line."""
    rows = (f"{json.dumps(name)}: {json.dumps(classes_in_transformers(family))}" for name, family in FAMILIES.items())
    return "{\n" + ",\n".join(rows) + "\n}\n"


def main(arguments: list[str]) -> int:
    if arguments == ["--check"]:
        if PAGE.read_text() != page():
            print(f"{PAGE} is out of date: run python docs/generate.py", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(page())
    AUTO_CLASSES.write_text(auto_classes(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
