"""Converted models as ONNX and ExecuTorch programs, by the exporters of transformers. `make test-engines` installs what
these need."""

import pytest
import torch

from support.engines import convert_tiny
from support.tiny_models import load_converted

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1200)]

PLANS = {
    "span": {3: {g: {"share": [[2, 2 * g], [2, 2 * g + 1]]} for g in range(4)}},
    "heads": {3: {0: {"share": [[2, 2], [1, 3]]}}},
}
IDS = torch.arange(3, 35)[None]


@pytest.fixture(scope="module", params=list(PLANS))
def folder(request, tmp_path_factory):
    return convert_tiny(tmp_path_factory.mktemp(request.param), "llama", request.param, PLANS[request.param])


def test_onnx(folder):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    model = load_converted(folder)
    exported = OnnxExporter().export(model, {"input_ids": IDS, "use_cache": False}, config=OnnxConfig(dynamic=True))
    longer = torch.arange(5, 53)[None]
    with torch.no_grad():
        expected = model(longer, use_cache=False).logits
    found = exported(input_ids=longer).logits
    torch.testing.assert_close(torch.as_tensor(found), expected, atol=1e-4, rtol=1e-4)
