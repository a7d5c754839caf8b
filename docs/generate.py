"""Writes the parts of the documentation that code knows best: the table of supported families.

python docs/generate.py           # writes docs/families.md
python docs/generate.py --check   # fails where the file is not what would be written
"""

import sys
from pathlib import Path

from sa_convert.export.shared_attention_families import FAMILIES, Family

PAGE = Path(__file__).parent / "families.md"
HEAD = """# Supported families

This page is generated from `sa_convert/export/shared_attention_families.py` by `python docs/generate.py`; a test
fails where the two differ. The family is chosen by `model_type` in config.json, never by a model's name.

Every family below is converted through the command line by `tests/test_families.py`, from a tiny random model: the
first 25 with maps of each kind that they can run (whole layers with the same heads, as the paper's spans; whole layers
with other heads; whole KV groups; single heads), the others with the most demanding kind. The logits equal the base
model's under forced attention weights (1e-4, float32), cached equals uncached decoding, and the files hold no query and
key rows of reusing heads. `tests/test_transformers_4.py` runs converted folders on transformers 4.57 as well, for every
family that 4.57 has, except where the table says otherwise. What was tested is the type of model, not every published
checkpoint of it.

| `model_type` | class | smallest unit that reuses | attention types | norms of queries and keys | remarks |
|---|---|---|---|---|---|
"""
TAIL = """
A model of another type is refused with the reason: fused projections (`qkv_proj`, `c_attn`, `query_key_value`), latent
attention (MLA), state-space layers, encoders, multimodal models, code outside of transformers, quantised projections.

## Rules that follow from the family

- A source and its reusing head have the same attention type, window, head size and treatment of positions.
- Keys of a KV group go when all query heads of the group reuse; queries go head by head.
- Where one norm runs over the queries (and one over the keys) of all heads together, only whole layers reuse.
"""
NORMS = {
    "shared": "one for all heads",
    "rows": "one row per head",
    "list": "one module per head",
    "joint": "over all heads",
}
SLIDING = {
    "none": "full",
    "all": "sliding where config.json gives a window, else full",
    "periodic": "sliding, every {period}th full",
    "from_max_window_layers": "full; sliding from `max_window_layers` on if `use_sliding_window`",
    "alternate_below_max_window_layers": "full; every other sliding if `use_sliding_window`",
    "without_rotary": "full; layers without rotation sliding if `use_sliding_window`",
}
ORDINAL = {"2th": "2nd"}


def row(family: Family) -> str:
    remarks = []
    if family.sinks:
        remarks.append("attention sinks of reusing heads go too")
    if family.rotary == "sliding":
        remarks.append("only sliding layers rotate queries and keys")
    if family.rotary == "no_rope_layers":
        remarks.append("layers with and without rotation do not share")
    if family.transformers_5:
        remarks.append("on transformers 5 only")
    if family.plain_forward:
        remarks.append("runs our own attention forward")
    sliding = SLIDING[family.sliding].format(period=family.period)
    for wrong, right in ORDINAL.items():
        sliding = sliding.replace(wrong, right)
    cells = (
        f"`{family.model_type}`",
        family.default_class,
        family.granularity,
        sliding,
        NORMS[family.norm] if family.query_norm else "",
        "; ".join(remarks),
    )
    return f"| {' | '.join(cells)} |"


def page() -> str:
    return HEAD + "\n".join(row(family) for family in FAMILIES.values()) + "\n" + TAIL


def main(arguments: list[str]) -> int:
    if arguments == ["--check"]:
        if PAGE.read_text() != page():
            print(f"{PAGE} is out of date: run python docs/generate.py", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
