"""Every family, through the real command line, against the base model with forced attention."""

import re

import pytest
import torch
from conftest import run_cli
from forced_attention import forced_logits
from safetensors import safe_open
from tiny_models import geometry_of_folder, kinds_of, load_converted, make_map, save_tiny, write_recipe

from sa_convert.export.shared_attention_families import FAMILIES

CASES = [(family, kind) for family in FAMILIES for kind in kinds_of(family)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """One tiny base model per family: its folder and the model in eager mode."""
    made = {}

    def base(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family) / "base"
            made[family] = folder, save_tiny(family, folder)
        return made[family]

    return base


def names_in(folder):
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                yield name, tuple(shard.get_slice(name).get_shape())


@pytest.mark.parametrize(("family", "kind"), CASES, ids=lambda value: value)
def test_family(bases, tmp_path, family, kind):
    folder, base = bases(family)
    entry = FAMILIES[family]
    geometry = geometry_of_folder(folder)
    rows = make_map(kind, geometry)
    assert sum(source is not None for row in rows.values() for source in row) >= 8
    recipe = write_recipe(tmp_path / "recipe.json", rows)
    result = run_cli("convert", folder, "--recipe", recipe, "-o", tmp_path / "out", "--no-validate")
    assert result.returncode == 0, result.stderr

    # Logits equal an independent computation, padded rows included; eager and, where the base has it, SDPA.
    torch.manual_seed(1)
    ids = torch.randint(3, 128, (2, 21))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    expected = forced_logits(base, rows, ids, mask)
    with torch.no_grad():
        unshared = base(ids, attention_mask=mask, use_cache=False).logits
    assert (expected - unshared)[mask.bool()].abs().max() > 1e-3  # the map matters
    kernels = ["eager", "sdpa"] if base._supports_sdpa else ["eager"]
    for kernel in kernels:
        model = load_converted(tmp_path / "out", attn_implementation=kernel, dtype=torch.float32)
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)

        # Cached decoding equals uncached, beyond the sliding window of 8 tokens, and holds no keys of reusing groups.
        with torch.no_grad():
            steps = model(ids[1:, :5], use_cache=True)
            cached = [steps.logits]
            for token in range(5, ids.shape[1]):
                steps = model(ids[1:, token : token + 1], past_key_values=steps.past_key_values, use_cache=True)
                cached.append(steps.logits)
            whole = model(ids[1:], use_cache=False).logits
        torch.testing.assert_close(torch.cat(cached, dim=1), whole, atol=1e-4, rtol=1e-4)
        for index, layer in enumerate(geometry.layers):
            kept = {layer.group_of(head) for head in range(layer.heads) if not rows.get(index) or not rows[index][head]}
            held = steps.past_key_values.layers[index]
            heads = held.keys.shape[1] + (held.values.shape[1] if held.values.numel() else 0)
            assert heads == len(kept) + layer.groups, f"layer {index}"
        options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask}
        plain = model.generate(ids, **options, use_cache=False)
        assert torch.equal(model.generate(ids, **options), plain)

    # Query and key rows of reusing heads are gone from the files.
    shapes = dict(names_in(tmp_path / "out"))
    for index, layer in enumerate(geometry.layers):
        row = rows.get(index, [None] * layer.heads)
        own = [head for head, source in enumerate(row) if source is None]
        groups = {layer.group_of(head) for head in own}
        prefix = rf".*\.{index}\.{entry.attention}\."
        for projection, count in ((entry.query, len(own)), (entry.key, len(groups))):
            found = [shape for name, shape in shapes.items() if re.fullmatch(f"{prefix}{projection}.weight", name)]
            assert [shape[0] for shape in found] == ([count * layer.head_dim] if count else [])
            if not count:
                norm = entry.query_norm if projection == entry.query else entry.key_norm
                assert not [name for name in shapes if re.match(f"{prefix}({projection}|{norm})\\.", name)]
