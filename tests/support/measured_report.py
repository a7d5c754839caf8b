"""A report of a conversion that was validated, and of one that was not."""

from dataclasses import replace

from sa_convert.domain.report import (
    BaseModel,
    Change,
    CopyingReport,
    DecodeCheck,
    GateResult,
    PerplexityReport,
    Report,
    Savings,
)
from sa_convert.treatments.share.drawing import told
from sa_convert.treatments.share.sharing_map import SharingMap

MEASURED = Report(
    base_model=BaseModel("org/base", "0123abc"),
    family="llama",
    treated=(told(SharingMap({27: ((26, 4), None), 28: ((22, 0), (22, 1))}), 12, 90),),
    savings=Savings(Change(134_515_008, 130_000_000), Change(538_090_408, 520_000_000), Change(46080, 43008), 2 / 15),
    perplexity=PerplexityReport("builtin, validation part", 8176, 14.2948181, 15.0, "float32"),
    decode_check=DecodeCheck(8.869171142578125e-05, True, 0.00127717),
    gate=GateResult(0.05, True),
    copying=CopyingReport(128, 3072, 1.78379, 1.98214),
    recipe="late-span",
    versions={"transformers": "5.23.0", "sa_convert": "0.1.0"},
)
UNMEASURED = replace(MEASURED, perplexity=None, decode_check=None, gate=None, copying=None)
