# SPDX-License-Identifier: Apache-2.0
"""What a training takes, from the model's configuration alone: memory, time, and the cheapest setting that fits."""

from frozen_peft.planning.contexts import measure_data
from frozen_peft.planning.known_models import KNOWN_MODELS, load_config
from frozen_peft.planning.plan import Plan, advise, cheapest_fitting
from frozen_peft.planning.setting import Setting
from frozen_peft.planning.terms import TERMS, make_plan, plan_of_weights
from frozen_peft.planning.tiers import DataFigures, GradientFigures, TierAdvice, advise_tier
from frozen_peft.planning.time import estimate_time
from frozen_peft.utils.cards import CARDS, Card, Rates, find_card, read_rates

__all__ = [
    "CARDS",
    "KNOWN_MODELS",
    "TERMS",
    "Card",
    "DataFigures",
    "GradientFigures",
    "Plan",
    "Rates",
    "Setting",
    "TierAdvice",
    "advise",
    "advise_tier",
    "cheapest_fitting",
    "estimate_time",
    "find_card",
    "load_config",
    "make_plan",
    "measure_data",
    "plan_of_weights",
    "read_rates",
]
