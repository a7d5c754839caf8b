"""Every causal language model type of transformers, tiny and random: converted and right, or refused with a reason."""

import json

import pytest
import torch
import transformers

from sa_convert.errors import UnsupportedModelError
from sa_convert.families.refusals import NO_ENTRY
from sa_convert.families.table import FAMILIES
from sa_convert.jobs.converting import ConvertOptions, convert, plan
from sa_convert.models.arguments import cache_of
from sa_convert.plan.recipe_file import load_recipe
from support.forced_attention import forced_logits as forced_by_interface
from support.forced_softmax import attending, forced_logits
from support.processes import run_cli
from support.smoke_models import NOT_BUILT, causal_types, smoke_map, smoke_model
from support.tiny_models import geometry_of_folder, make_map, save_tiny, with_cache, write_recipe

TYPES = causal_types()
# How many of them have an entry at least, and so must convert (of 196 types in transformers 5.24).
LEAST_CONVERTED = 102
# Types of the registry whose tiny model here has a part that is refused.
REFUSED_HERE: tuple[str, ...] = ()
# Any map is refused where the type is.
SOME_MAP = {1: [[0, 0]]}


def attentions_of(model, family):
    """The attention module of each layer, stack after stack; None where a layer has none."""
    found = []
    for stack in family.all_stacks:
        try:
            layers = model.get_submodule(stack.layers)
        except AttributeError:
            continue  # an encoder or a decoder alone
        for layer in layers:
            try:
                found.append(layer.get_submodule(stack.attention))
            except AttributeError:
                found.append(None)
    return found


def load(folder, **options):
    """By the auto class that the folder names; refuses missing, unexpected or mismatched weights."""
    names = set(json.loads((folder / "config.json").read_text())["auto_map"]) - {"AutoConfig"}
    auto = getattr(transformers, "AutoModelForCausalLM" if "AutoModelForCausalLM" in names else min(names))
    model, info = auto.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, dtype=torch.float32, **options
    )
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert not any(info.values()), info
    return model.eval()


def reloaded(model, folder, kernel):
    """The base as it is loaded (positions in sines are not saved), by this kernel."""
    return type(model).from_pretrained(folder, attn_implementation=kernel, dtype=torch.float32).eval()


@torch.no_grad()
def logits_of(model, ids, mask):
    return model(ids, attention_mask=mask, use_cache=False).logits


@torch.no_grad()
def cached_difference(model, ids):
    """The largest difference between the logits of cached decoding and those of the whole sequence at once."""
    mask = torch.ones_like(ids)
    first = model(ids[:, :5], attention_mask=mask[:, :5], use_cache=True)
    cache = cache_of(first)
    if cache is None:  # its output does not name it
        cache = transformers.DynamicCache(config=model.config)
        first = model(ids[:, :5], attention_mask=mask[:, :5], **with_cache(model, cache))
    cached = [first.logits]
    for end in range(6, ids.shape[1] + 1):
        inputs = {"attention_mask": mask[:, :end], **with_cache(model, cache)}
        cached.append(model(ids[:, end - 1 : end], **inputs).logits)
    return (torch.cat(cached, dim=1) - model(ids, use_cache=False).logits).abs().max().item()


def decodes(base, ids):
    """Whether the base decodes with a cache as without; some fail in transformers itself."""
    try:
        return cached_difference(base, ids) < 1e-4
    except Exception:
        return False


def refusal(folder, recipe_file):
    """Why the model is refused, or None: told before anything is written, as `plan` has no output.

    Other errors than UnsupportedModelError would blame the user for files that transformers wrote itself.
    """
    try:
        plan(str(folder), load_recipe(str(recipe_file)), ConvertOptions())
    except UnsupportedModelError as error:
        return str(error)
    return None


def demanding_map(folder, base, ids):
    """A random map for a model that can be converted; None for others."""
    try:
        geometry = geometry_of_folder(folder)
    except UnsupportedModelError:
        return None
    attentions = attentions_of(base, FAMILIES[base.config.model_type])
    assert len(attentions) == len(geometry.layers)
    return smoke_map(geometry, attending(base, attentions, ids)), geometry


@pytest.mark.parametrize("model_type", TYPES)
def test_type(model_type, tmp_path, record_property):
    try:
        base = smoke_model(model_type)
    except Exception:
        if model_type not in NOT_BUILT:
            raise
        record_property("outcome", "not built")
        record_property("reason", NOT_BUILT[model_type])
        return
    folder, output = tmp_path / "base", tmp_path / "converted"
    base.save_pretrained(folder)
    base = reloaded(base, folder, "eager")
    torch.manual_seed(1)
    ids = torch.randint(3, 128, (2, 21))
    found = demanding_map(folder, base, ids)
    rows, geometry = found or (SOME_MAP, None)
    recipe = write_recipe(tmp_path / "recipe.json", rows, geometry.stacks if geometry else ())
    reason = refusal(folder, recipe)
    if reason is not None:
        assert "\n" not in reason
        assert NO_ENTRY not in reason  # it names what this type has that others have not
        with pytest.raises(UnsupportedModelError):
            convert(str(folder), load_recipe(str(recipe)), output, ConvertOptions(validate=False))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "recipe.json"]
        entry = FAMILIES.get(base.config.model_type)
        assert entry is None or entry.default_class != type(base).__name__ or model_type in REFUSED_HERE, reason
        record_property("outcome", "refused")
        record_property("reason", reason.partition(" Supported types:")[0])
        return

    convert(str(folder), load_recipe(str(recipe)), output, ConvertOptions(validate=False))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    seen = mask.bool()
    family = FAMILIES[base.config.model_type]
    uncached = []
    for kernel in ["eager", "sdpa"] if base._supports_sdpa else ["eager"]:
        base = reloaded(base, folder, kernel)
        expected = forced_logits(base, attentions_of(base, family), rows, ids, attention_mask=mask)
        assert expected[seen].isfinite().all()
        assert (expected - logits_of(base, ids, mask))[seen].abs().max() > 1e-3  # the map matters
        model = load(output, attn_implementation=kernel)
        torch.testing.assert_close(logits_of(model, ids, mask)[seen], expected[seen], atol=1e-4, rtol=1e-4)
        if decodes(base, ids[1:]):
            assert cached_difference(model, ids[1:]) < 1e-4
        else:
            uncached.append(kernel)
    record_property("outcome", "converted")
    kernels = " and ".join(uncached)
    record_property("reason", f"the base itself does not decode with a cache as without ({kernels})" if kernels else "")


def test_counts():
    registered = [model_type for model_type in TYPES if model_type in FAMILIES and model_type not in REFUSED_HERE]
    assert len(registered) >= LEAST_CONVERTED
    assert set(NOT_BUILT) <= set(TYPES)


@pytest.mark.parametrize(("model_type", "status"), [("qwen3", 0), ("mamba", 1)])
def test_as_a_process(model_type, status, tmp_path):
    smoke_model(model_type).save_pretrained(tmp_path / "base")
    rows = {2: [[0, head] for head in range(8)]} if status == 0 else SOME_MAP
    recipe = write_recipe(tmp_path / "recipe.json", rows)
    result = run_cli("convert", tmp_path / "base", "--recipe", recipe, "-o", tmp_path / "out", "--no-validate")
    assert result.returncode == status, result.stderr
    assert (tmp_path / "out").exists() == (status == 0)
    if status:
        assert "state-space" in result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "gpt_oss", "olmo2", "gpt2", "gpt_neox"])
def test_both_references_agree(model_type, tmp_path):
    """Forced where the attention function is called, and forced at the softmax."""
    base = save_tiny(model_type, tmp_path / "base")
    geometry = geometry_of_folder(tmp_path / "base")
    rows = make_map("layers" if geometry.granularity == "layer" else "heads", geometry)
    torch.manual_seed(1)
    ids = torch.randint(3, 128, (2, 21))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    attentions = attentions_of(base, FAMILIES[model_type])
    expected = forced_by_interface(base, rows, ids, mask)
    assert (expected - logits_of(base, ids, mask))[mask.bool()].abs().max() > 1e-3
    found = forced_logits(base, attentions, rows, ids, attention_mask=mask)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)
