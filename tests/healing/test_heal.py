"""A model that was damaged on purpose recovers; nothing changes but what trains; what is worse is refused."""

import json

import pytest
import torch
import transformers

from sa_convert.plan.recipe_file import load_recipe
from support.cli_cases import digests, refused
from support.healing_models import DAMAGED, QUICK, all_tensors, damaged_conversion, header
from support.processes import run_cli
from support.tiny_models import load_converted

LAYER, SOURCE = "model.layers.3.self_attn.", "model.layers.2.self_attn."
TRAINED = {
    f"{layer}{projection}.{kind}"
    for layer, projections in ((LAYER, ("v_proj", "o_proj")), (SOURCE, ("q_proj", "k_proj")))
    for projection in projections
    for kind in ("weight", "bias")
}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    return damaged_conversion(tmp_path_factory.mktemp("heal"))


@pytest.fixture(scope="module")
def healed(damaged):
    """The result of the command, and its folder."""
    folder = damaged.folder.parent / "healed"
    done = run_cli("heal", damaged.folder, "--against", damaged.base, "-o", folder, *QUICK, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), folder


def apart(base, model, tokens):
    """KL(base || model), nats a token, by a loop over positions in float64."""
    with torch.no_grad():
        wanted, found = base(tokens).logits.double(), model(tokens).logits.double()
    total = 0.0
    for position in range(tokens.shape[1]):
        p = torch.softmax(wanted[0, position], -1)
        q = torch.softmax(found[0, position], -1)
        total += float((p * (p / q).log()).sum())
    return total / tokens.shape[1]


def test_damage_is_repaired(damaged, healed):
    """As an independent computation says, on tokens that nobody trained on."""
    base = transformers.AutoModelForCausalLM.from_pretrained(damaged.base).eval()
    tokens = torch.randint(5, 110, (1, 48), generator=torch.Generator().manual_seed(11))
    before = apart(base, load_converted(damaged.folder), tokens)
    after = apart(base, load_converted(healed[1]), tokens)
    assert after < 0.5 * before


def test_only_what_trains_changes(damaged, healed):
    before, after = all_tensors(damaged.folder), all_tensors(healed[1])
    changed = {name for name in before if not before[name].equal(after[name])}
    assert DAMAGED in changed
    assert changed == TRAINED
    assert {name: tensor.dtype for name, tensor in before.items()} == {name: one.dtype for name, one in after.items()}
    for file in damaged.folder.glob("*.safetensors"):
        assert header(file) == header(healed[1] / file.name)


def test_all_else_is_as_it_was(damaged, healed):
    before, after = digests(damaged.folder), digests(healed[1])
    weights = {name for name in before if name.endswith(".safetensors")}
    told = {"report.json", "README.md", "recipe.yaml"}
    assert {name for name in before if before[name] != after.get(name)} - weights <= told
    assert set(after) - set(before) == {"figures/healing.png"}


def test_report_recipe_and_card_say_what_was_done(damaged, healed):
    printed, folder = healed
    report = json.loads((folder / "report.json").read_text())
    assert printed == report
    found = report["heal"]
    assert found["tokens"] >= 12_000
    assert [judged["tokens"] for judged in found["curve"]] == sorted({one["tokens"] for one in found["curve"]})
    assert len(found["curve"]) == 3
    assert found["settings"] == {"tokens": 12_000, "length": 64, "rate": 5e-3, "text": "builtin+written", "rows": 1}
    kept = next(judged for judged in found["curve"] if judged["tokens"] == found["kept_tokens"])
    for kind, divergence in kept["divergence"].items():
        assert divergence < found["curve"][0]["divergence"][kind]
    assert report["perplexity"]["after"] > 0  # measured anew
    recipe = load_recipe(str(folder / "recipe.yaml"))
    assert recipe.heal.model_dump(exclude_defaults=True) == found["settings"]
    card = (folder / "README.md").read_text()
    assert f"{found['kept_tokens']:,} tokens of builtin" in card
    assert "figures/healing.png" in card
    assert run_cli("audit", folder).returncode == 0


def test_poison_is_refused_and_nothing_written(damaged, tmp_path):
    """One word over and over, at a rate that forgets everything else."""
    text = tmp_path / "poison.txt"
    text.write_text("aaaa " * 4_000)
    before, out = digests(damaged.folder), tmp_path / "out"
    options = ("--tokens", "4k", "--length", "64", "--rate", "0.3", "--text", text)
    done = run_cli("heal", damaged.folder, "--against", damaged.base, "-o", out, *options)
    refused(done, 3, r"Healing was refused, and nothing written: after .* worse than before: .*->", out)
    assert digests(damaged.folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["poison.txt"]


def test_low_rank_additions_are_merged(damaged, tmp_path):
    options = ("--tokens", "4k", "--length", "64", "--train", "lora", "--rank", "4", "--rate", "3e-3", "--no-validate")
    done = run_cli("heal", damaged.folder, "--against", damaged.base, "-o", tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    before, after = all_tensors(damaged.folder), all_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        change = after[name] - tensor
        if change.any():
            assert name.startswith("model.layers.3.")
            assert torch.linalg.matrix_rank(change, rtol=1e-3) <= 4
    load_converted(tmp_path / "out")


@pytest.mark.parametrize(("what", "where"), [("layers", "model.layers.3."), ("model", "model.layers.")])
def test_layers_train_whole(damaged, tmp_path, what, where):
    options = ("--tokens", "4k", "--length", "64", "--train", what, "--no-validate")
    done = run_cli("heal", damaged.folder, "--against", damaged.base, "-o", tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    before, after = all_tensors(damaged.folder), all_tensors(tmp_path / "out")
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed == {name for name in before if name.startswith(where)}
