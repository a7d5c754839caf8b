"""Search and refit run in every family, with gradients and without."""

import pytest
import torch

from sa_convert.domain.model import RunOptions
from sa_convert.domain.recipe import Calibration
from sa_convert.families.table import FAMILIES
from sa_convert.heal.refit import refit
from sa_convert.observe.session import open_session
from sa_convert.observe.tried import Reference
from sa_convert.plan.conversion import check_plan
from sa_convert.read.model_of import model_of
from sa_convert.read.open_model import open_model
from sa_convert.search.choose import path
from support.tiny_models import save_tiny, save_tokenizer


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_map_is_found_that_the_family_can_run_and_its_refit_helps_or_is_left_out(family, tmp_path):
    save_tiny(family, tmp_path)
    save_tokenizer(tmp_path)
    model = model_of(open_model(str(tmp_path)))
    # Both ways, over all families; Llama 4 looks where its embedding lies, which has no data while it is on the disk.
    layer_by_layer = sorted(FAMILIES).index(family) % 2 == 1 and family != "llama4_text"
    run = RunOptions(device="cpu", layer_by_layer=layer_by_layer)
    with open_session(model, Calibration(sequences=5, length=24), run) as session:
        assert session.measure == ("output error" if layer_by_layer else "fisher")
        reference = Reference(session.probe, session.samples.held_out)
        step = list(path(session, [0.2], reference))[-1]
        check_plan(step.plan, model)
        assert step.removed >= 0.2
        found = refit(session, step.plan, reference)
    assert found.report.after.divergence <= found.report.before.divergence
    assert set(found.report.layers) == set(step.plan.layers)
    assert all(bool(torch.isfinite(change).all()) for change in found.changes.values())
