"""How a plan is shown: text for the terminal, or an object for --json."""

from typing import TYPE_CHECKING, Any

from sa_convert.console.amounts import human_bytes, human_count

if TYPE_CHECKING:
    from sa_convert.plan.conversion import ConversionPlan


def plan_json(plan: "ConversionPlan") -> dict[str, Any]:
    """The plan in the words of report.json, where it has them."""
    from dataclasses import asdict

    return {
        "dry_run": True,
        "family": plan.model.family.model_type,
        **{key: value for treated in plan.treated for key, value in treated.section.items()},
        "savings": asdict(plan.savings),
        "tensors": {
            "dropped": sorted(name for name, edit in plan.edits.items() if edit.drops),
            "sliced": sorted(name for name, edit in plan.edits.items() if edit.rows),
        },
    }


def render_plan(plan: "ConversionPlan") -> str:
    """A few aligned lines: what would be done, and what that saves."""
    savings = plan.savings
    dropped = sum(edit.drops for edit in plan.edits.values())
    sliced = sum(bool(edit.rows) for edit in plan.edits.values())
    cache = savings.cache_bytes_per_token
    lines = [
        ("family", plan.model.family.model_type),
        *(row for treated in plan.treated if treated.used for row in treated.rows),
        ("tensors", f"{dropped} dropped, {sliced} sliced"),
        ("parameters", _change(savings.parameters.before, savings.parameters.after, human_count)),
        ("weights", _change(savings.checkpoint_bytes.before, savings.checkpoint_bytes.after, human_bytes)),
        (
            "cache per token",
            _change(cache.before, cache.after, human_bytes) if cache.before else "none: the model caches nothing",
        ),
    ]
    width = max(len(name) for name, _ in lines)
    table = "\n".join(f"{name:<{width}}  {value}" for name, value in lines)
    return f"{table}\n\nDry run: nothing was written. Sizes are of tensors, without file headers."


def _change(before: int, after: int, show: Any) -> str:
    return f"{show(before)} -> {show(after)} ({after / before - 1:+.1%})"
