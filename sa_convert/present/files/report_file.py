"""Writes report.json."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sa_convert.console.amounts import format_percent
from sa_convert.domain.calibrated import RefitReport
from sa_convert.domain.change import CacheBytes
from sa_convert.domain.healed import HealReport, told_changes
from sa_convert.domain.report import GateResult, Report
from sa_convert.present.files.json_file import write_json

FILE = "report.json"


def write_report(report: Report, folder: Path) -> Path:
    """Write report.json: nothing of this machine, and no times but of training."""
    return write_json(report.to_json(), folder / FILE)


def installed_versions() -> dict[str, str]:
    """Versions of the packages that made and checked the folder, without importing any."""
    import sa_convert

    versions = {"sa_convert": sa_convert.__version__}
    for package in ("torch", "transformers"):
        try:
            versions[package] = version(package).partition("+")[0]  # without the build, such as +cpu
        except PackageNotFoundError:  # a checkout on the path instead of an installed package
            continue
    return versions


def heal_summary(heal: HealReport) -> str:
    """Such as "400,000 tokens of builtin, calibration part; held-out text 3.210 -> 3.105 nats (base 3.050); ..."."""
    if heal.kept is None:
        return "left out, since it made the model worse on held-out text or copying"
    return f"{heal.after.tokens:,} tokens of {heal.text}; {'; '.join(told_changes(heal))}"


def refit_summary(refit: RefitReport) -> str:
    """Such as "9 of 12 output projections, divergence on held-out text 0.1100 -> 0.0900 nats"."""
    if not refit.share:
        return "left out, since it did not help on held-out text"
    kept = sum(layer.strength is not None for layer in refit.layers.values())
    share = "" if refit.share == 1 else f", {format_percent(refit.share)} of the way"
    change = f"{refit.before.divergence:.4f} -> {refit.after.divergence:.4f} nats"
    return f"{kept} of {len(refit.layers)} output projections{share}; divergence on held-out text {change}"


def limits_text(gate: GateResult) -> str:
    """Such as "3%, and copying at every distance by 0.1 nats"."""
    text = format_percent(gate.max_perplexity_increase)
    if gate.max_copying_increase is None:
        return text
    return f"{text}, and copying at every distance by {gate.max_copying_increase:g} nats a token"


def measured(cache: CacheBytes) -> str:
    """How the size of a cache is known."""
    if cache.measured_at is None:
        return "computed, not measured"
    if cache.measured_at == cache.at:
        return "measured"
    return f"measured at {cache.measured_at:,} tokens, the rest computed"
