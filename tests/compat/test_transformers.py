# SPDX-License-Identifier: Apache-2.0
"""What of transformers is used beyond what it promises is there, does what it is used for, and is still needed."""

from transformers import PreTrainedModel

from frozen_peft.utils.compat.transformers import attention_implementation
from tests.tiny_models import tiny_model


def test_the_attention_of_a_model_is_known_by_its_configuration_alone() -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    assert attention_implementation(model.config) == "eager"
    public = {name for name in dir(PreTrainedModel) if "attn_implementation" in name and not name.startswith("_")}
    # The second says what an implementation that is asked for would come to.
    assert public == {"set_attn_implementation", "get_correct_attn_implementation"}
