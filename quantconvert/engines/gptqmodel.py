"""GPTQModel 7.7, run on its plain CPU kernels (`tests/engines/test_gptqmodel.py`)."""

from __future__ import annotations

from quantconvert.engines.row import PLAIN, Engine, Row, When

_TEST = "tests/engines/test_gptqmodel.py"
# Families that it has no definition of (`gptqmodel/models/auto.py`).
UNKNOWN = ("bert", "mamba", "t5")

GPTQMODEL = Engine(
    name="gptqmodel",
    title="GPTQModel",
    version="7.7",
    load='GPTQModel.load("{out}")',
    module="gptqmodel",
    signed=("awq", "gptq"),  # tests/engines/test_gptqmodel.py
    rows=(
        Row(When((PLAIN,)), "loads", "gptqmodel/models/loader.py"),
        Row(When(("awq", "gptq")), "loads", _TEST),
        Row(When(("awq",), strategies=("channel",), experts=True), "refuses", "not run"),
        Row(
            When(("awq", "gptq"), experts=True, families=("mixtral",)), "refuses", f"{_TEST}; models/definitions",
            "Mixtral's names of experts are not known", "not Mixtral",
        ),
        Row(
            When(("awq", "gptq"), families=UNKNOWN), "refuses", "gptqmodel/models/auto.py; run",
            "models of this family are not known",
        ),
        Row(
            When(("awq", "gptq"), experts=True, families=("gpt-oss",)), "wrong",
            "run by hand: logits that agree with int4's own to 0.42 (correlation), not to 1",
            "experts of gpt-oss are computed wrongly",
        ),
    ),
)  # fmt: skip
