"""Whatever a plan does, its layers heal, and what a treatment added trains with them."""

from support.healing_models import all_tensors
from support.processes import run_cli
from support.tiny_models import save_tiny, save_tokenizer

PLAN = """
plan:
  2: {1: {window: {sinks: 2, tokens: 16}}}
  3: {0: {low_rank: {keys: 8}}}
  4: linear
  5: {2: {share: [[1, 4], [1, 5]]}}
calibration: {text: builtin, sequences: 4, length: 64}
"""
ADDED = {"model.layers.3.self_attn.low_rank.basis", "model.layers.4.self_attn.linear.weight"}
OWN = {f"model.layers.{layer}.self_attn.{side}_proj.weight" for layer in (2, 3, 5) for side in "vo"}
LENT = {f"model.layers.1.self_attn.{side}_proj.weight" for side in "qk"}


def test_layers_of_every_treatment_heal(tmp_path):
    base, folder, healed = (tmp_path / name for name in ("base", "folder", "healed"))
    save_tiny("llama", base, attention_bias=False)
    save_tokenizer(base)
    recipe = tmp_path / "plan.yaml"
    recipe.write_text(PLAN)
    done = run_cli("convert", base, "--recipe", recipe, "-o", folder, "--no-validate")
    assert done.returncode == 0, done.stderr
    options = ("--tokens", "4k", "--length", "128", "--rate", "5e-4", "--no-validate")
    done = run_cli("heal", folder, "-o", healed, *options)  # the base lies beside it, as report.json says
    assert done.returncode == 0, done.stderr
    before, after = all_tensors(folder), all_tensors(healed)
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed >= ADDED | OWN | LENT
    assert all(name.startswith(tuple(f"model.layers.{layer}." for layer in range(1, 6))) for name in changed)
    assert not [name for name in changed if "mlp" in name or "norm" in name]
