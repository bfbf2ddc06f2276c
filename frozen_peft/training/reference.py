# SPDX-License-Identifier: Apache-2.0
"""What a policy is compared with, and the contexts as it encodes them.

1. The reference is the policy's model with its adapters off, or with the adapter `ref` on, which TRL makes of one that
   comes trained, or a model of its own.
2. Its contexts are not the policy's: a policy that has learned encodes them otherwise, and a reference that went on
   from what the policy encoded would move along with it. Only where contexts are the base's for both
   (`context_adapters=False`) is there one of each.
3. It does not learn, so that its contexts are good for ever: the store has them from the second epoch on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import Trainer
from trl.trainer.utils import use_adapter

from frozen_peft.adapters import BaseSamples, require_base
from frozen_peft.config import ContextFields
from frozen_peft.context import (
    ContextEncoder,
    ContextStore,
    adapter_state,
    trained_base_weights,
    use_segmented_attention,
)
from frozen_peft.context.encoder import ADAPTERS_OFF
from frozen_peft.context.models import get_pretrained_model
from frozen_peft.context.store import fixed_fingerprint

__all__ = ["Reference"]

NEEDED_FOR = "The reference of a preference loss is the model without its adapters"
# As TRL calls it.
REFERENCE_ADAPTER = "ref"


@dataclass(frozen=True)
class Reference:
    """How the reference is run.

    Attributes:
        model: What runs for it, without what an engine wraps it in.
        is_policy_model: It is the policy's model, perhaps with other adapters on.
        adapter: The adapter that is active in that; None: none is.
        is_synced: It follows the policy from time to time.
    """

    model: torch.nn.Module
    is_policy_model: bool
    adapter: str | None = None
    is_synced: bool = False

    @staticmethod
    def require_plain(ref_model: torch.nn.Module | None) -> None:
        """Refuses what TRL (1.16) cannot read log-probabilities of.

        Raises:
            ValueError: `ref_model` has adapters.
        """
        if isinstance(ref_model, PeftModel):
            raise ValueError(
                "`ref_model` is a PeftModel, whose head TRL does not find. To go on from a trained adapter, pass it "
                "as `model` alone: a copy of it is the reference. Otherwise merge it (`ref_model.merge_and_unload()`)."
            )

    @classmethod
    def of(cls, trainer: Trainer) -> "Reference":
        """That of a preference trainer of TRL."""
        if trainer.ref_model is not None:
            model = trainer.accelerator.unwrap_model(trainer.ref_model)
            return cls(model, False, is_synced=trainer.args.sync_ref_model)
        has_own = isinstance(trainer.model, PeftModel) and REFERENCE_ADAPTER in trainer.model.peft_config
        return cls(trainer.model, True, REFERENCE_ADAPTER if has_own else None)

    def require_kept(self, before: BaseSamples | None, *, beforehand: bool) -> None:
        """Refuses a model that with other adapters, or none, is not what it was, or will not be.

        Args:
            before: Of the model before adapters were put on it; None: it came with them, or has none.
            beforehand: All that the reference says is computed before training begins.

        Raises:
            ValueError: An initialisation changed the base, adapters are more than one can switch off, or training
                changes what is no adapter's.
        """
        if self.is_base:
            require_base(self.model, NEEDED_FOR)
            if before is not None:
                before.require_kept(self.model, NEEDED_FOR)
        if self.is_policy_model and isinstance(self.model, PeftModel) and not beforehand:
            for name in trained_base_weights(self.model):
                raise ValueError(
                    f"The reference of a preference loss is this model as it was, and training changes `{name}`, "
                    "which is no adapter's. Freeze it, pass a `ref_model`, or set `precompute_ref_log_probs=True`."
                )

    @property
    def is_base(self) -> bool:
        """Whether it is the policy's model without adapters."""
        return self.is_policy_model and self.adapter is None and isinstance(self.model, PeftModel)

    def has_own_contexts(self, args: ContextFields) -> bool:
        """Whether it encodes contexts otherwise than a policy of this configuration does."""
        if not self.is_policy_model:
            return True
        # A model without adapters that is its own reference has not been trained yet.
        return args.context_adapters and isinstance(self.model, PeftModel)

    def encoder(self, args: ContextFields, store: ContextStore | None) -> ContextEncoder:
        """Encodes contexts as it does.

        Args:
            args: The configuration.
            store: Where they are kept; None: nowhere.
        """
        chunk_size = args.prefill_chunk_size
        if self.is_base:
            return ContextEncoder(
                self.model, chunk_size=chunk_size, adapters=False, decision_adapters=False, store=store
            )
        if self.adapter is not None:
            fixed = fixed_fingerprint(self.model, self.adapter)
            return ContextEncoder(self.model, chunk_size=chunk_size, store=store, fixed=fixed)
        use_segmented_attention(self.model)
        if self.is_synced:
            return ContextEncoder(self.model, chunk_size=chunk_size)
        # Otherwise all of it would count as trained, and be left out of what the store knows a base by.
        self.model.requires_grad_(False)
        return ContextEncoder(self.model, chunk_size=chunk_size, store=store, fixed=ADAPTERS_OFF)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Has its model run as the reference inside."""
        if self.is_policy_model and isinstance(self.model, PeftModel):
            with use_adapter(self.model, self.adapter):
                yield
        else:
            yield

    def is_active(self) -> bool:
        """Whether the policy's model runs as the reference now."""
        is_off, active = adapter_state(get_pretrained_model(self.model))
        return is_off if self.adapter is None else not is_off and active == (self.adapter,)
