"""Both forms of sharing give the same logits in every family; which one runs is chosen, or forced by the config."""

import pytest
import torch
from conftest import run_cli
from tiny_models import geometry_of_folder, kinds_of, load_converted, make_map, save_tiny, write_recipe

from sa_convert.export.shared_attention_families import FAMILIES


@pytest.fixture
def converted(tmp_path):
    def make(family, kind):
        save_tiny(family, tmp_path / "base")
        geometry = geometry_of_folder(tmp_path / "base")
        recipe = write_recipe(tmp_path / "recipe.json", make_map(kind, geometry), geometry.stacks)
        done = run_cli("convert", tmp_path / "base", "--recipe", recipe, "-o", tmp_path / "out", "--no-validate")
        assert done.returncode == 0, done.stderr
        return load_converted(tmp_path / "out", dtype=torch.float32)

    return make


def forms_used(model):
    """For each call of a layer that lends, whether it lent weights."""
    used = []
    for module in model.modules():
        if hasattr(module, "sharing") and getattr(module, "plan", None) and module.plan.lends:
            original = module._lends_weights

            def note(*args, original=original):
                used.append(original(*args))
                return used[-1]

            module._lends_weights = note
    return used


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_both_forms_agree(converted, family):
    model, entry = converted(family, kinds_of(family)[-1]), FAMILIES[family]
    ids = torch.randint(3, 128, (2, 19))
    inputs = {} if entry.bidirectional else {"use_cache": False}
    inputs |= {"decoder_input_ids": ids.flip(1)[:, :11]} if entry.encoder_decoder else {}
    logits = {}
    for form in ("auto", "weights", "queries"):
        model.config.shared_attention["form"] = form
        used = forms_used(model)
        logits[form] = model(ids, **inputs).logits
        if form != "auto":
            assert set(used) == {form == "weights"}
    torch.testing.assert_close(logits["weights"], logits["queries"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits["auto"], logits["queries"], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_form_is_chosen_by_memory_and_by_what_it_brings(converted):
    model = converted("llama", "span")  # one layer lends to four
    used = forms_used(model)
    ids = torch.randint(3, 128, (1, 16))
    model(ids, use_cache=False)
    assert all(used)
    used.clear()
    model.config.shared_attention["weights_memory"] = 8 * 16 * 16 * 4 - 1  # heads, tokens, tokens, bytes
    model(ids, use_cache=False)
    assert not any(used)
    used.clear()
    model.generate(ids, max_new_tokens=3, do_sample=False)
    assert not used[0]
    assert all(used[1:])  # decoding


def test_training_takes_queries_and_an_unknown_form_is_refused(converted, tmp_path):
    model = converted("llama", "span")
    used = forms_used(model)
    model(torch.randint(3, 128, (1, 16)), use_cache=False).logits.sum().backward()
    assert not any(used)
    model.config.shared_attention["form"] = "both"
    with pytest.raises(ValueError, match="form is 'both', but should be one of auto, weights, queries"):
        type(model)(model.config)
