"""Which maps a model can run: every rule, and what its message names."""

import pytest

from sa_convert.domain.geometry import LayerGeometry, ModelGeometry
from sa_convert.errors import PlanError
from sa_convert.treatments.share.rules import check_map
from sa_convert.treatments.share.sharing_map import SharingMap

FULL = LayerGeometry(heads=4, groups=2, head_dim=8)
UNIFORM = ModelGeometry((FULL,) * 4)


def changed(**changes) -> ModelGeometry:
    """Four layers, the third with these changes."""
    values = {**vars(FULL), **changes}
    return ModelGeometry((FULL, FULL, LayerGeometry(**values), FULL))


def whole(source: int, heads: int = 4):
    return tuple((source, head) for head in range(heads))


@pytest.mark.parametrize(
    ("layers", "geometry", "message"),
    [
        ({4: whole(0)}, UNIFORM, r"Layer 4 .*layers 0 to 3"),
        ({2: whole(0, 3)}, UNIFORM, r"Layer 2 lists 3 heads.* 4 query heads"),
        ({1: (None, (2, 0), None, None)}, UNIFORM, r"Layer 1 head 1 .*layer 2 head 0: a source must be in an earlier"),
        ({1: (None, (1, 0), None, None)}, UNIFORM, r"earlier layer"),
        ({1: (None, (-1, 0), None, None)}, UNIFORM, r"Layer 1 head 1 .*layers 0 to 3"),
        ({1: (None, (0, 4), None, None)}, UNIFORM, r"layer 0 has heads 0 to 3"),
        ({1: whole(0), 2: whole(1)}, UNIFORM, r"Layer 2 head 0 .*itself borrows from layer 0 head 0"),
        ({2: whole(0)}, changed(attention="sliding_attention", window=8), r"full_attention.*sliding_attention"),
        ({3: whole(2)}, changed(attention="sliding_attention", window=8), r"sliding_attention.*full_attention"),
        ({2: whole(1)}, changed(head_dim=16), r"size 8.*16"),
        ({2: whole(1)}, changed(rotary=False), r"the source layer rotates .* the borrowing layer does not"),
        ({3: whole(2)}, changed(rotary=False), r"the borrowing layer rotates .* the source layer does not"),
        (
            {2: (None, (0, 1), (0, 2), (0, 3))},
            ModelGeometry((FULL,) * 4, "layer"),
            r"Layer 2 head 0 .*only whole layers",
        ),
    ],
)
def test_violations(layers, geometry, message):
    with pytest.raises(PlanError, match=message):
        check_map(SharingMap(layers), geometry)


def test_different_windows():
    layers = [LayerGeometry(4, 2, 8, "sliding_attention", window) for window in (8, 16)]
    with pytest.raises(PlanError, match="window is 8 tokens, the borrowing layer's 16"):
        check_map(SharingMap({1: whole(0)}), ModelGeometry(tuple(layers)))


@pytest.mark.parametrize(
    ("layers", "geometry"),
    [
        ({2: whole(0)}, UNIFORM),
        ({2: ((1, 3), None, None, (0, 0)), 3: ((2, 1), None, None, None)}, UNIFORM),
        ({2: whole(1)}, ModelGeometry((FULL,) * 4, "layer")),
        ({3: whole(0)}, changed(attention="sliding_attention", window=8)),
    ],
)
def test_maps_that_fit(layers, geometry):
    check_map(SharingMap(layers), geometry)


def test_a_group_goes_with_its_last_own_head():
    """K of a group stays while one of its query heads computes its own attention."""
    partly = SharingMap({2: ((0, 0), None, (0, 2), (0, 3))})
    assert partly.own_heads(2, FULL) == (1,)
    assert partly.own_groups(2, FULL) == (0,)
    assert partly.reused_groups(UNIFORM) == 1
    assert SharingMap({2: ((0, 0), (0, 1), (0, 2), None)}).own_groups(2, FULL) == (1,)
    assert SharingMap({2: whole(0)}).reused_groups(UNIFORM) == 2


def test_map_survives_json():
    sharing = SharingMap({3: whole(1), 2: (None, (0, 1), None, None), 1: (None,) * 4})
    assert SharingMap.from_json(sharing.to_json()) == sharing
    assert sharing.to_json() == {"2": [None, [0, 1], None, None], "3": [[1, 0], [1, 1], [1, 2], [1, 3]]}
