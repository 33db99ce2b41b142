"""The auto classes know our models in whatever order transformers, Secateur and a model's own modules are imported."""

from __future__ import annotations

import pytest

from support.fresh import in_fresh
from support.long_tests import long

AUTO = "from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification"
ORDERS = {
    "Secateur first": f"import secateur; {AUTO}",
    "between configs and models": f"from transformers import AutoConfig; import secateur; {AUTO}",
    "the module of V-MoE first": f"import secateur.models.vmoe.modeling; {AUTO}",
    "the module of BAM first": f"import secateur.models.bam.modeling; {AUTO}",
    "a config that BAM imports first": f"import secateur; from transformers import LlamaConfig; {AUTO}",
    "a class that BAM imports first": f"import secateur; from transformers import LlamaForCausalLM; {AUTO}",
    "a model class first": f"import secateur; from transformers import MixtralForCausalLM; {AUTO}",
}
LONG = {"Secateur first", "the module of V-MoE first", "a model class first"}  # a new process each
BUILD = """
sizes = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, num_experts=4)
for name, auto, own in (
    ("vmoe", AutoModelForImageClassification, dict(image_size=8, patch_size=4, moe_layers=[1])),
    ("bam", AutoModelForCausalLM, dict(vocab_size=8)),
):
    config = AutoConfig.for_model(name, **sizes, **own)
    model = auto.from_config(config)
    print(type(config).__module__, type(model).__module__, type(model).__name__)
"""


@pytest.mark.process
@pytest.mark.parametrize("order", [pytest.param(one, marks=[long] * (one in LONG)) for one in ORDERS])
def test_the_auto_classes_build_our_models(order: str) -> None:
    said = in_fresh(f"{ORDERS[order]}\n{BUILD}")
    classes = {"vmoe": "VMoEForImageClassification", "bam": "BamForCausalLM"}
    expected = [(f"secateur.models.{one}.configuration", f"secateur.models.{one}.modeling") for one in classes]
    names = zip(expected, classes.values(), strict=True)
    assert said.split() == [word for modules, name in names for word in (*modules, name)]
