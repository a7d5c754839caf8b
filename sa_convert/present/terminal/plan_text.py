"""How a plan is shown: text for the terminal, or an object for --json."""

from typing import TYPE_CHECKING, Any

from sa_convert.console.amounts import human_bytes, human_count
from sa_convert.domain.change import CacheBytes, Savings
from sa_convert.present.terminal.aligned import aligned
from sa_convert.present.terminal.report_text import change_text

if TYPE_CHECKING:
    from sa_convert.plan.conversion import ConversionPlan


def plan_json(plan: "ConversionPlan") -> dict[str, Any]:
    """The plan in the words of report.json, if it has them."""
    added = [name for name, edit in plan.edits.items() if edit.after is not None]
    return {
        "dry_run": True,
        "family": plan.model.family.model_type,
        **({"for": plan.stock.to_json()} if plan.stock else {}),
        **{key: value for treated in plan.treated for key, value in treated.section.items()},
        "savings": plan.savings.to_json(),
        "cache_bytes": {str(cache.at): sizes(cache) for cache in plan.savings.caches} or None,
        "tensors": {
            "dropped": sorted(name for name, edit in plan.edits.items() if edit.drops),
            "sliced": sorted(name for name, edit in plan.edits.items() if edit.rows),
            **({"added": sorted(added)} if added else {}),
        },
    }


def render_plan(plan: "ConversionPlan") -> str:
    """A few aligned lines: what would be done, and what that saves."""
    savings = plan.savings
    dropped = sum(edit.drops for edit in plan.edits.values())
    sliced = sum(bool(edit.rows) for edit in plan.edits.values())
    added = sum(edit.after is not None for edit in plan.edits.values())
    lines = [
        ("family", plan.model.family.model_type),
        *([("written for", plan.stock.summary)] if plan.stock else []),
        *(row for treated in plan.treated if treated.used for row in treated.rows),
        ("tensors", f"{dropped} dropped, {sliced} sliced" + (f", {added} added" if added else "")),
        ("parameters", change_text(savings.parameters, human_count)),
        ("weights", change_text(savings.checkpoint_bytes, human_bytes)),
        ("cache per token", _cache(savings)),
        *((f"cache at {cache.at:,}", change_text(cache, human_bytes)) for cache in savings.caches),
    ]
    return f"{aligned(lines)}\n\nDry run: nothing was written. Sizes are of tensors, without file headers."


def sizes(cache: CacheBytes) -> dict[str, Any]:
    """As JSON, without what is the key of it."""
    return {"before": cache.before, "after": cache.after, "removed": round(cache.removed, 6)}


def _cache(savings: Savings) -> str:
    if not savings.cache_bytes_per_token.before:
        return "none: the model caches nothing"
    over = f", average over {savings.cache_over:,} tokens" if savings.cache_over else ""
    return change_text(savings.cache_bytes_per_token, human_bytes) + over
