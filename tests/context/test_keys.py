# SPDX-License-Identifier: Apache-2.0
"""Keys of prefixes: what they are made of, and that they tell prefixes apart."""

import hashlib
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from frozen_peft.context.keys import PrefixKey, prefix_keys

TOKENS = st.lists(st.integers(0, 2**40), min_size=1, max_size=40)


def reference(tokens: list[int]) -> PrefixKey:
    packed = struct.pack(f"<{len(tokens)}q", *tokens)
    return PrefixKey(len(tokens), hashlib.blake2b(packed, digest_size=16).hexdigest())


@given(TOKENS, st.data())
def test_a_key_is_the_digest_of_its_prefix_alone(tokens: list[int], data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, len(tokens))))
    assert prefix_keys(torch.tensor(tokens), lengths) == {n: reference(tokens[:n]) for n in lengths}


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_the_type_of_the_tokens_does_not_matter(dtype: torch.dtype) -> None:
    tokens = torch.arange(100)
    assert prefix_keys(tokens.to(dtype), [7, 100]) == prefix_keys(tokens, [7, 100])
    assert prefix_keys(tokens.to(dtype).numpy(), [7, 100]) == prefix_keys(tokens, [7, 100])


def test_the_memory_of_the_tokens_does_not_matter() -> None:
    columns = torch.arange(60).reshape(20, 3)
    assert prefix_keys(columns[:, 1], [20]) == prefix_keys(columns[:, 1].clone(), [20])
    big_endian = np.arange(20).astype(">i4")
    assert prefix_keys(big_endian, [20]) == prefix_keys(torch.arange(20), [20])


def test_any_changed_token_changes_every_key_from_there_on() -> None:
    tokens = torch.arange(30)
    before = prefix_keys(tokens, range(1, 31))
    for index in range(30):
        changed = tokens.clone()
        changed[index] += 1
        after = prefix_keys(changed, range(1, 31))
        assert [after[n] == before[n] for n in range(1, 31)] == [n <= index for n in range(1, 31)]


@pytest.mark.parametrize("length", [0, -1, 6])
def test_lengths_out_of_range_are_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"from 1 to 5, the number of tokens, found {length}"):
        prefix_keys(torch.arange(5), [3, length])


@pytest.mark.parametrize("tokens", [torch.zeros(1, 5, dtype=torch.long), torch.zeros(5), torch.ones(5).bool()])
def test_anything_but_a_row_of_integers_is_refused(tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="one row of integers"):
        prefix_keys(tokens, [1])


def test_the_text_of_a_key_leads_back_to_it() -> None:
    key = reference([1, 2, 3])
    assert str(key) == f"3-{key.digest}"
    assert PrefixKey.from_text(str(key)) == key


@pytest.mark.parametrize(
    "text",
    ["", "3", "3-", f"3-{'a' * 31}", f"3-{'a' * 33}", f"3-{'A' * 32}", f"3-{'g' * 32}", f"03-{'a' * 32}",
     f"0-{'a' * 32}", f"-3-{'a' * 32}", f"٣-{'a' * 32}", f"3-{'a' * 32}\n", f" 3-{'a' * 32}"],
)  # fmt: skip
def test_other_texts_are_no_keys(text: str) -> None:
    assert PrefixKey.from_text(text) is None
