# SPDX-License-Identifier: Apache-2.0
"""What may be a secret is left out wherever it stands, and nothing else."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frozen_peft import FrozenContextConfig
from frozen_peft.report import is_secret, without_secrets


@pytest.mark.parametrize(
    "name", ["hub_token", "token", "api_key", "apikey", "OPENAI_API_KEY", "password", "my-secret"]
)
def test_names_that_say_so(name: str) -> None:
    assert is_secret(name)
    assert without_secrets({name: "sesame", "lora_r": 4}) == ({"lora_r": 4}, [name])


def test_of_all_fields_of_a_recipe_one_holds_a_secret() -> None:
    assert [field.name for field in dataclasses.fields(FrozenContextConfig) if is_secret(field.name)] == ["hub_token"]


def test_secrets_are_found_at_any_depth_and_in_json_text() -> None:
    nested = {"a": [{"token": "sesame", "b": 1}], "text": json.dumps({"token": "sesame", "c": 2})}
    kept, left_out = without_secrets(nested)
    assert kept == {"a": [{"b": 1}], "text": '{"c": 2}'}
    assert left_out == ["a.token", "text.token"]


@pytest.mark.parametrize(
    "text", ["hf_abcdefghijkl", "x sk-abcdefgh123 y", "https://me:sesame@host/x", "ghp_" + "a" * 36]
)
def test_values_that_say_so_are_replaced(text: str) -> None:
    kept, left_out = without_secrets({"run_name": text})
    assert left_out == ["run_name"]
    assert "(not written)" in kept["run_name"]
    assert not any(part in kept["run_name"] for part in ("abcdefgh", "sesame", "aaaa"))


@given(
    st.dictionaries(st.sampled_from(["lora_r", "eos_token", "seed"]), st.integers() | st.text("abc /.", max_size=9))
)
def test_everything_else_stays(values: dict) -> None:
    assert without_secrets(values) == (values, [])


def test_a_number_of_tokens_is_no_secret() -> None:
    values = {"max_example_tokens": 16, "max_new_tokens": 64}
    assert without_secrets(values) == (values, [])
    assert without_secrets({"tokens": "sesame", "token": 1234}) == ({}, ["tokens", "token"])


def test_that_a_token_is_to_be_looked_up_is_no_secret() -> None:
    assert without_secrets({"token": True, "hub_token": None}) == ({"token": True, "hub_token": None}, [])
