"""Low-rank keys in every family that caches, beyond those of `test_low_rank_families.py`: right, or refused with the
reason."""

import pytest
import torch
from test_low_rank_families import FAMILIES as KNOWN

from sa_convert.errors import PlanError
from sa_convert.families.table import FAMILIES
from sa_convert.treatments.low_rank.rules import refusal
from support.low_rank_models import convert, projected_keys, projected_logits
from support.tiny_models import geometry_of_folder, load_converted, save_tiny

CACHING = [name for name, entry in FAMILIES.items() if any(each.caches and not each.cross for each in entry.all_stacks)]
REST = [name for name in CACHING if name not in KNOWN]


def ranks_for(geometry):
    """Of the first layer that can, some KV groups; of the last, all."""
    layers = [layer for layer, each in enumerate(geometry.layers) if refusal(geometry, layer) is None]
    if not layers:
        return {}
    size, groups = geometry.layers[layers[0]].head_dim, geometry.layers[layers[0]].groups
    return {layers[-1]: dict.fromkeys(range(groups), size - 2), layers[0]: {0: size - 3, groups - 1: size // 2}}


@pytest.mark.parametrize("family", REST)
def test_family(family, tmp_path):
    entry = FAMILIES[family]
    save_tiny(family, tmp_path / "first")
    geometry = geometry_of_folder(tmp_path / "first")
    ranks = ranks_for(geometry)
    if not ranks:
        with pytest.raises(PlanError, match=r"cannot have low-rank keys: its layers turn keys"):
            convert(tmp_path, family, {0: {0: 4}})
        return
    found = convert(tmp_path, family, ranks)
    ids = torch.randint(3, 120, (2, 20), generator=torch.Generator().manual_seed(0))
    inputs = {"decoder_input_ids": ids.flip(1)} if entry.encoder_decoder else {}
    wanted = projected_logits(found, ids, **inputs)
    with torch.no_grad(), projected_keys(found):
        tokens = found.base.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False)
    with torch.no_grad():
        assert (found.base(ids, use_cache=False, **inputs).logits - wanted).abs().max() > 1e-3
    for kernel in ("eager", "sdpa") if found.base._supports_sdpa else ("eager",):
        model = load_converted(found.folder, attn_implementation=kernel)
        with torch.no_grad():
            for cached in (False, True):
                logits = model(ids, use_cache=cached, **inputs).logits
                torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), tokens), kernel
