# SPDX-License-Identifier: Apache-2.0
"""One class per trainer of TRL, each a delta, and what they share.

1. `batches` cuts what a collator made into decisions; what a batch is on its way, its type says.
2. `frozen` announces, encodes and reads ahead their contexts, and counts.
3. `forwards` runs the model's forwards as a batch needs it, while TRL, or the user, computes its loss.
4. `mixin` stands before a trainer of TRL and hangs all of that into its hooks; `sft` is the trainer.
5. `preference` adds what trainers of preferences share, `reference` and `pairs` with it; `dpo` and `kto` are those.
"""

from frozen_peft.training.sft import FrozenContextTrainer

__all__ = ["FrozenContextTrainer"]
