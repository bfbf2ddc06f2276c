# SPDX-License-Identifier: Apache-2.0
"""Whether what stands in for accelerate is still needed."""

import torch
from accelerate import Accelerator

from frozen_peft.utils.compat.accelerate import forget_preparation, prepared_models


def test_which_models_were_prepared_is_kept_under_a_private_name_alone() -> None:
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(2, 2)
    assert prepared_models(accelerator) == []
    accelerator.prepare_model(model)
    assert prepared_models(accelerator) == [model]
    public = {name: value for name, value in vars(accelerator).items() if not name.startswith("_")}
    assert not any(value is model or (isinstance(value, list) and model in value) for value in public.values())


def test_preparing_for_an_evaluation_marks_a_model_as_prepared_for_training() -> None:
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(2, 2)
    accelerator.prepare_model(model, evaluation_mode=True)
    assert model._is_accelerate_prepared
    # Of one process, nothing has to be undone.
    forget_preparation(accelerator, model)
    assert model._is_accelerate_prepared
