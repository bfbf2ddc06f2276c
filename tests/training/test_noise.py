# SPDX-License-Identifier: Apache-2.0
"""NEFTune: noise on the embeddings, scaled by the length of the forward, so that it needs a sample in one forward."""

from pathlib import Path

import pytest
from trl import SFTConfig, SFTTrainer

from frozen_peft import FrozenContextConfig, FrozenContextTrainer
from tests.training.runs import adapted, as_dataset, config, equal, samples, train

ROWS = as_dataset(samples())


@pytest.mark.parametrize("fields", [{"tier": 2}, {"gradient_horizon": 8}, {"tier": 3, "sequence_chunk_size": 16}])
def test_noise_is_refused_where_a_sample_runs_in_parts(fields: dict, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`neftune_noise_alpha=5\.0` .* `tier: 1`"):
        config(tmp_path, neftune_noise_alpha=5.0, **fields)


def test_noise_of_a_plain_sft_configuration_is_refused_too() -> None:
    given = SFTConfig("out", neftune_noise_alpha=5.0, use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="neftune_noise_alpha"):
        FrozenContextConfig.from_training_arguments(given)


def test_no_noise_is_no_obstacle(tmp_path: Path) -> None:
    assert config(tmp_path, neftune_noise_alpha=0.0, tier=2).gradient_horizon == 0


@pytest.mark.parametrize("tier", [1, 3])
def test_in_tiers_1_and_3_the_noise_is_that_of_sft_trainer(tier: int, tmp_path: Path) -> None:
    fields = {"neftune_noise_alpha": 5.0, "max_steps": 2}
    theirs = train(SFTTrainer, adapted("llama"), config(tmp_path, SFTConfig, **fields), ROWS)
    ours = train(FrozenContextTrainer, adapted("llama"), config(tmp_path, tier=tier, **fields), ROWS)
    quiet = train(SFTTrainer, adapted("llama"), config(tmp_path, SFTConfig, max_steps=2), ROWS)
    assert ours.losses == theirs.losses != quiet.losses
    assert equal(ours.weights, theirs.weights)


def test_evaluation_has_no_noise(tmp_path: Path) -> None:
    evaluated = []
    for alpha in (None, 5.0):
        arguments = config(
            tmp_path,
            tier=1,
            neftune_noise_alpha=alpha,
            learning_rate=0.0,
            max_steps=2,
            eval_strategy="steps",
            eval_steps=1,
        )
        run = train(FrozenContextTrainer, adapted("llama"), arguments, ROWS, eval_dataset=ROWS)
        evaluated.append([log["eval_loss"] for log in run.trainer.state.log_history if "eval_loss" in log])
    assert evaluated[0] == evaluated[1]
    assert len(evaluated[0]) == 2
