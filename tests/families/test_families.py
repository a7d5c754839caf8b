"""Every family, through the real command line, against the base model with forced attention."""

import re

import pytest
import torch
from safetensors import safe_open
from transformers import DynamicCache

from sa_convert.families.table import FAMILIES
from sa_convert.models.arguments import cache_of
from sa_convert.read.names import stack_of
from support.forced_softmax import forced
from support.processes import run_cli
from support.tiny_models import (
    VARIANTS,
    attentions_of,
    code_of,
    forms_used,
    geometry_of_folder,
    kinds_of,
    load_converted,
    make_map,
    save_tiny,
    with_cache,
    write_recipe,
)

CASES = [(family, kind, None) for family in FAMILIES for kind in kinds_of(family)]
CASES += [(family, "heads", at) for family, options in VARIANTS.items() for at in range(len(options))]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """One tiny base model per family and variant: its folder and the model in eager mode."""
    made = {}

    def base(family, variant):
        if (family, variant) not in made:
            folder = tmp_path_factory.mktemp(family) / "base"
            options = {} if variant is None else VARIANTS[family][variant]
            made[family, variant] = folder, save_tiny(family, folder, **options)
        return made[family, variant]

    return base


def names_in(folder):
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                yield name, tuple(shard.get_slice(name).get_shape())


@torch.no_grad()
def cached_logits(model, ids, entry):
    """Logits of each token of (1, T), the first five at once, the others one by one; and the cache."""
    encoded = {}
    if entry.encoder_decoder:
        encoded = {"encoder_outputs": model.get_encoder()(ids)}
        ids = ids.flip(1)
    name = "decoder_input_ids" if entry.encoder_decoder else "input_ids"
    first = {name: ids[:, :5], **encoded, "use_cache": True}
    output = model(**first)
    cache = cache_of(output)
    if cache is None:  # its output does not name it
        cache = DynamicCache(config=model.config)
        output = model(**{**first, **with_cache(model, cache)})
    logits = [output.logits]
    for token in range(5, ids.shape[1]):
        given = {name: ids[:, token : token + 1], **with_cache(model, cache)}
        if entry.modules.rotary != "none" and not entry.text:  # Bamba counts from 0 where it is not told
            given["position_ids"] = torch.tensor([[token]])
        logits.append(model(**given, **encoded).logits)
    return torch.cat(logits, dim=1), cache


@pytest.mark.parametrize(("family", "kind", "variant"), CASES, ids=str)
def test_family(bases, tmp_path, monkeypatch, family, kind, variant):
    folder, base = bases(family, variant)
    entry = FAMILIES[family]
    geometry = geometry_of_folder(folder)
    rows = make_map(kind, geometry)
    assert sum(source is not None for row in rows.values() for source in row) >= 5
    recipe = write_recipe(tmp_path / "recipe.json", rows, geometry.stacks)
    result = run_cli("convert", folder, "--recipe", recipe, "-o", tmp_path / "out", "--no-validate")
    assert result.returncode == 0, result.stderr

    # Logits equal an independent computation, padded rows included; eager and, where the base has it, SDPA.
    torch.manual_seed(1)
    ids = torch.randint(3, 128, (2, 21))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    inputs = {"attention_mask": mask} if entry.modules.bidirectional else {"attention_mask": mask, "use_cache": False}
    seen = mask.bool()
    if entry.encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)
        seen = torch.ones_like(seen)
    kernels = ["eager", "sdpa"] if base._supports_sdpa else ["eager"]
    for kernel in kernels:
        # Of the base with the same kernel: what a recurrent layer makes of padding differs between kernels, and so does
        # Falcon's ALiBi.
        same = type(base).from_pretrained(folder, attn_implementation=kernel, dtype=torch.float32).eval()
        with torch.no_grad(), forced(same, attentions_of(same, entry), rows):
            expected = same(ids, **inputs).logits
        with torch.no_grad():
            unshared = same(ids, **inputs).logits
        assert (expected - unshared)[seen].abs().max() > 1e-3  # the map matters
        model = load_converted(tmp_path / "out", attn_implementation=kernel, dtype=torch.float32)
        with torch.no_grad():
            logits = model(ids, **inputs).logits
        torch.testing.assert_close(logits[seen], expected[seen], atol=1e-4, rtol=1e-4)

        # Both forms of sharing, forced, say the same; of padding, kernels make different things. Weights in blocks.
        monkeypatch.setattr(code_of(model, "shared_attention_share"), "BLOCK", 5)
        whole = seen & mask.all(-1, keepdim=True)
        for form in ("weights", "queries"):
            model.config.shared_attention["form"] = form
            used = forms_used(model)
            with torch.no_grad():
                logits = model(ids, **inputs).logits
            assert set(used) == {form == "weights"}
            torch.testing.assert_close(logits[whole], expected[whole], atol=1e-4, rtol=1e-4)
            unmasked = {name: given[1:] for name, given in inputs.items() if name == "decoder_input_ids"}
            with torch.no_grad():
                logits = model(ids[1:], **unmasked).logits  # blocks then end at what their tokens see
            torch.testing.assert_close(logits, expected[1:], atol=1e-4, rtol=1e-4)
        model.config.shared_attention["form"] = "auto"
        if entry.modules.bidirectional:
            continue

        # Cached decoding equals uncached, beyond the sliding window of 8 tokens, and holds no keys of reusing groups.
        cached, cache = cached_logits(model, ids[1:], entry)
        with torch.no_grad():
            pair = {"decoder_input_ids": ids[1:].flip(1)} if entry.encoder_decoder else {}
            whole = model(ids[1:], **pair, use_cache=False).logits
        torch.testing.assert_close(cached, whole, atol=1e-4, rtol=1e-4)
        for index, layer in enumerate(geometry.layers):
            stack, number = stack_of(entry, geometry.stacks, index)
            if not layer.heads or not stack.caches:
                continue
            part = cache
            if entry.encoder_decoder:
                part = cache.cross_attention_cache if stack.cross else cache.self_attention_cache
            kept = {layer.group_of(head) for head in range(layer.heads) if not rows.get(index) or not rows[index][head]}
            held = part.layers[number]
            heads = held.keys.shape[1] + (held.values.shape[1] if held.values.numel() else 0)
            # Falcon itself caches each key for all its heads.
            own = entry.modules.module == "falcon" and index not in rows
            assert heads == len(kept) + layer.groups or own, f"layer {index}"
        options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask}
        plain = model.generate(ids, **options, use_cache=False)
        assert torch.equal(model.generate(ids, **options), plain)

    # Query and key rows of reusing heads are gone from the files.
    shapes = dict(names_in(tmp_path / "out"))
    for index, layer in enumerate(geometry.layers):
        row = rows.get(index, [None] * layer.heads)
        own = [head for head, source in enumerate(row) if source is None]
        groups = {layer.group_of(head) for head in own}
        stack, number = stack_of(entry, geometry.stacks, index)
        paths = "|".join(re.escape(path) for path in (stack.layers, entry.files) if path)
        prefix = rf"({paths})\.{number}\.{re.escape(stack.attention)}\."
        gates = layer.heads if entry.modules.gate == "query" else 0
        expected = {entry.modules.query: len(own) + gates, entry.modules.key: len(groups)}
        if entry.modules.fused:
            expected = {entry.modules.fused: len(own) + len(groups) + layer.groups}
        for projection, count in expected.items():
            names = [name for name in shapes if re.fullmatch(f"{prefix}{projection}.weight", name)]
            found = [shapes[name][1 if entry.modules.transposed else 0] for name in names]
            assert found == ([count * layer.head_dim] if count else []), projection
            norm = entry.modules.query_norm if projection == entry.modules.query else entry.modules.key_norm
            if norm and not (own if projection == entry.modules.query else groups):
                assert not [name for name in shapes if re.match(f"{prefix}{norm}\\.", name)]
