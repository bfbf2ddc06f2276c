# SPDX-License-Identifier: Apache-2.0
"""Distilling instructions: the student, without them in its context, learns what the teacher says with them.

The teacher is the same base model with its adapters off. Both contexts are frozen; what is trained is the decision,
at whose supervised tokens the two distributions are compared.

1. *Data* (`dataset`). A row's instructions are put back from its column `stripped`, and TRL's own preparation makes
   token ids of both samples. Their supervised tokens must be the same, one by one.
2. *Teacher* (`teacher`). Its context is encoded and the decision run over it once, without gradient. What
   it says about each supervised token is kept, in memory and on disk, and read in later epochs.
3. *Loss* (`distiller`, `divergence`). TRL computes its loss from log-probabilities per token; in their place stand the
   negative divergences. So the scaling over accumulated batches and processes, the auxiliary loss of experts and the
   metrics remain TRL's.
4. *On policy* (`policy`). Instead of the decisions that the data has, the student may write its own, over the frozen
   contexts that it is then trained over. What the teacher says about them is not kept: they do not come again.
5. *Memory*. Logits, of teacher and student, exist for `distill_chunk_size` tokens at a time, and are computed again in
   the backward pass.
"""

from frozen_peft.distillation.dataset import (
    TEACHER_COLUMNS,
    TeacherCollator,
    check_teacher,
    prepare_with_teacher,
    take_decisions,
)
from frozen_peft.distillation.distiller import Distiller, require_distillable
from frozen_peft.distillation.divergence import Answers
from frozen_peft.distillation.head import verify_head
from frozen_peft.distillation.policy import EVALUATION, Prompt, Writer, answered, num_prompt_tokens, require_room
from frozen_peft.distillation.teacher import Teacher

__all__ = [
    "EVALUATION",
    "TEACHER_COLUMNS",
    "Answers",
    "Distiller",
    "Prompt",
    "Teacher",
    "TeacherCollator",
    "Writer",
    "answered",
    "check_teacher",
    "num_prompt_tokens",
    "prepare_with_teacher",
    "require_distillable",
    "require_room",
    "take_decisions",
    "verify_head",
]
