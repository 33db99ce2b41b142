"""The auto classes know V-MoE in whatever order transformers, Secateur and the model's own modules are imported."""

from __future__ import annotations

import pytest

from support.fresh import in_fresh
from support.long_tests import long

AUTO = "from transformers import AutoConfig, AutoModelForImageClassification"
ORDERS = {
    "Secateur first": f"import secateur; {AUTO}",
    "between configs and models": f"from transformers import AutoConfig; import secateur; {AUTO}",
    "the module of V-MoE first": f"import secateur.models.vmoe.modeling; {AUTO}",
    "a model class first": f"import secateur; from transformers import MixtralForCausalLM; {AUTO}",
}
LONG = {"Secateur first", "a model class first"}  # a new process each
BUILD = """
sizes = dict(image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
config = AutoConfig.for_model("vmoe", **sizes, num_experts=4, moe_layers=[1])
model = AutoModelForImageClassification.from_config(config)
print(type(config).__module__, type(model).__module__, type(model).__name__)
"""


@pytest.mark.process
@pytest.mark.parametrize("order", [pytest.param(one, marks=[long] * (one in LONG)) for one in ORDERS])
def test_the_auto_classes_build_a_v_moe(order: str) -> None:
    said = in_fresh(f"{ORDERS[order]}\n{BUILD}")
    home = "secateur.models.vmoe"
    assert said.split() == [f"{home}.configuration", f"{home}.modeling", "VMoEForImageClassification"]
