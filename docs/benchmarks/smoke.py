"""Writes docs/smoke.md: what becomes of every causal language model type of transformers.

python docs/benchmarks/smoke.py     # runs tests/families/test_smoke_all_types.py (a minute) and writes what it found
"""

import re
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "smoke.md"
TEST = "tests/families/test_smoke_all_types.py"
KINDS = ("converted", "refused", "not built", "failed")
HEAD = """# Every causal language model type of transformers

This page is written by `python docs/benchmarks/smoke.py` from a run of `tests/families/test_smoke_all_types.py` on
transformers {version}. The test walks all {total} types that `AutoModelForCausalLM` knows. Of each it builds a tiny
random model with every parameter away from its initial value. It converts the model by a random map of single heads,
whole layers and KV groups. If the family allows no less than whole layers, the map has whole layers only.

| outcome | types |
|---|---|
| converted | {converted} |
| refused, with the reason, before anything is written | {refused} |
| not built by `AutoModelForCausalLM.from_config` at any size | {not_built} |
| converted wrongly, or crashed | {failed} |

*Converted* means all of this, for the converted model, loaded by the code in its folder, in eager mode and, if the base
has it, with SDPA:

- Its logits are those of the unmodified base whose attention probabilities of borrowers are overwritten, inside the
  attention, by those of their sources (1e-4, float32, padded rows included).
- The map changes the logits.
- Cached decoding equals uncached (1e-4), except if a remark below says that the base's does not.
"""


def outcomes() -> dict[str, tuple[str, str]]:
    """Type -> outcome ("converted", "refused", "not built", "failed") and reason, from a run of the test."""
    import pytest

    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        pytest.main([str(ROOT / TEST), "-q", "-W", "ignore", "-k", "test_type", f"--junitxml={report}"])
        cases = ElementTree.parse(report).getroot().iter("testcase")
    found = {}
    for case in cases:
        model_type = case.get("name", "").removeprefix("test_type[").removesuffix("]")
        told = {item.get("name"): item.get("value", "") for item in case.iter("property")}
        failed = case.find("failure") is not None or case.find("error") is not None
        found[model_type] = ("failed", "") if failed else (told["outcome"] or "", told["reason"] or "")
    return found


def page(found: dict[str, tuple[str, str]]) -> str:
    import transformers

    of = {kind: sorted(name for name, (outcome, _) in found.items() if outcome == kind) for kind in KINDS}
    text = HEAD.format(
        version=transformers.__version__,
        total=len(found),
        **{kind.replace(" ", "_"): len(names) for kind, names in of.items()},
    )
    text += "\n## Converted\n\n" + ", ".join(f"`{name}`" for name in of["converted"]) + ".\n"
    remarks = [f"- `{name}`: {found[name][1]}.\n" for name in of["converted"] if found[name][1]]
    text += "".join(["\n", *remarks]) if remarks else ""
    for title, kind in (("Refused", "refused"), ("Not built", "not built"), ("Failed", "failed")):
        if of[kind]:
            text += f"\n## {title}\n\n| type | reason |\n|---|---|\n"
            text += "".join(f"| `{name}` | {_reason(found[name][1])} |\n" for name in of[kind])
    return text


def _reason(reason: str) -> str:
    """Without what every reason begins with."""
    return re.sub(r"^Models of type '[^']*' are not supported: ", "", reason).rstrip(".").replace("|", "\\|")


def main() -> int:
    found = outcomes()
    PAGE.write_text(page(found), encoding="utf-8")
    failed = [name for name, (outcome, _) in found.items() if outcome == "failed"]
    for kind in KINDS:
        print(f"{kind}: {sum(outcome == kind for outcome, _ in found.values())}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
