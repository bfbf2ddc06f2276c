# SPDX-License-Identifier: Apache-2.0
"""What is found in the store is what would be encoded now, or it is not found; and budgets hold."""

import copy
import functools
import json
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn

from frozen_peft.context import (
    ContextEncoder,
    ContextFiles,
    ContextStore,
    DiskLevel,
    FrozenContext,
    encode_context,
    use_segmented_attention,
)
from frozen_peft.context.store import fingerprint
from frozen_peft.context.store import store as store_module
from frozen_peft.context.store.fingerprint import adapter_fingerprint, base_fingerprint, run_fingerprint
from tests.context.test_prefixes import family, tokens
from tests.frozen_runs import frozen_gradients, frozen_logprobs
from tests.reference import reference_gradients, reference_logprobs, relative_error, worst_gradient_error
from tests.tiny_models import ARCHITECTURES, add_lora, tiny_model

TOLERANCE = 1e-5
PLENTY = 1 << 30


def memory(max_bytes: int = PLENTY, **options: object) -> ContextStore:
    return ContextStore(max_bytes, **options)


def on_disk(folder: Path, max_bytes: int = 0, **options: object) -> ContextStore:
    return ContextStore(max_bytes, DiskLevel(ContextFiles(folder)), **options)


def encoder(model: nn.Module, store: ContextStore, **options: object) -> ContextEncoder:
    return ContextEncoder(model, store=store, **options)


def encoded_by(encoder: ContextEncoder, contexts: list[torch.Tensor], **options: object) -> tuple[FrozenContext, int]:
    """A frozen context, and how many tokens were encoded for it."""
    before = encoder.counts.num_tokens_encoded
    frozen = encoder.encode(contexts, **options)
    return frozen, encoder.counts.num_tokens_encoded - before


def move_adapters(model: nn.Module, by: float = 0.5) -> None:
    """What an optimizer step does."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.0 + by)


def same(left: FrozenContext, right: FrozenContext) -> bool:
    return all(
        torch.equal(a, b)
        for one, other in zip(left.rows, right.rows, strict=True)
        for a, b in zip(one.tensors(), other.tensors(), strict=True)
    )


LEVELS = ("memory", "host", "disk", "disk of an earlier run", "read ahead")


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> str:
    return request.param


def found_again(level: str, model: nn.Module, contexts: list[torch.Tensor], folder: Path) -> tuple[FrozenContext, int]:
    """What a store gives when asked a second time, and the tokens that were encoded for it then."""
    room = (lambda device: -1) if level == "host" else (lambda device: 1)
    # What nothing may read in a later step is not read ahead.
    options = {"room": room, "max_staleness": 1 if level == "read ahead" else 0}
    store = memory(**options) if level in ("memory", "host") else on_disk(folder, **options)
    first = encoder(model, store)
    first.encode(contexts)
    store.flush()
    if level == "disk of an earlier run":
        first = encoder(model, on_disk(folder))
        first.counts.num_tokens_encoded = 0
    if level == "read ahead":
        first.read_ahead(contexts)
    return encoded_by(first, contexts)


@pytest.mark.parametrize(
    "name", ["qwen3_5_text", "gemma3_text", "falcon_h1", "qwen3_5_moe_text", "lfm2", "kimi_linear"]
)
def test_what_is_found_is_exact_and_not_encoded_again(name: str, level: str, tmp_path: Path) -> None:
    model = add_lora(tiny_model(name))
    use_segmented_attention(model)
    samples = family()
    contexts = [sample.context for sample in samples]
    frozen, num_encoded = found_again(level, model, contexts, tmp_path)
    assert num_encoded == 0
    assert same(frozen, encode_context(model, contexts))
    logprobs = torch.cat([reference_logprobs(model, each.input_ids, each.boundary) for each in samples])
    assert relative_error(frozen_logprobs(model, samples, frozen), logprobs) <= TOLERANCE
    expected = reference_gradients(model, samples)
    assert worst_gradient_error(frozen_gradients(model, samples, frozen), expected) <= TOLERANCE


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "qwen3_5"])
def test_every_architecture_is_stored_whole(name: str, tmp_path: Path) -> None:
    model = add_lora(tiny_model(name))
    contexts = [tokens(66, 1), tokens(20, 2)]
    frozen, num_encoded = found_again("disk of an earlier run", model, contexts, tmp_path)
    assert num_encoded == 0
    assert same(frozen, encode_context(model, contexts))


def test_16_bit_contexts_are_stored(level: str, tmp_path: Path) -> None:
    model = add_lora(tiny_model("qwen3_5_text")).to(torch.bfloat16)
    contexts = [tokens(66, 1)]
    frozen, num_encoded = found_again(level, model, contexts, tmp_path)
    assert num_encoded == 0
    assert same(frozen, encode_context(model, contexts))


def test_the_longest_prefix_is_extended(level: str, tmp_path: Path) -> None:
    model = add_lora(tiny_model("qwen3_5_text"))
    store = (
        memory(room=lambda device: -1 if level == "host" else 1) if level in ("memory", "host") else on_disk(tmp_path)
    )
    first = encoder(model, store)
    whole = tokens(100, 1)
    first.encode([whole[:30], whole[:66], tokens(80, 2)])
    store.flush()
    if level == "disk of an earlier run":
        first = encoder(model, on_disk(tmp_path))
    if level == "read ahead":
        first.read_ahead([whole])
    frozen, num_encoded = encoded_by(first, [whole])
    assert num_encoded == 34
    fresh = encode_context(model, [whole]).rows[0]
    for left, right in zip(frozen.rows[0].layers, fresh.layers, strict=True):
        if left.linear is not None:
            assert relative_error(left.linear.recurrent[0], right.linear.recurrent[0]) <= TOLERANCE
        if left.attention is not None:
            assert relative_error(torch.cat(left.attention.values, -2), right.attention.values[0]) <= TOLERANCE


def test_what_branches_off_from_an_earlier_step_is_shared_from_the_second_time_on() -> None:
    """The first context leaves no state where the second one branches off; the second one does, at a block's end."""
    model = tiny_model("qwen3_5_text")
    document = tokens(150, 1)
    asking = encoder(add_lora(model), memory(), adapters=False)
    counts = [
        encoded_by(asking, [torch.cat([document, tokens(20, seed)])], step=step)[1]
        for step, seed in enumerate((2, 3, 4, 5, 4))
    ]
    assert counts == [170, 170, 170 - 128, 170 - 128, 0]


class TestStaleEntries:
    def test_are_not_used_after_an_optimizer_step(self, level: str, tmp_path: Path) -> None:
        model = add_lora(tiny_model("qwen3_5_text"))
        on_file = level not in ("memory", "host")
        store = on_disk(tmp_path) if on_file else memory(room=lambda device: -1 if level == "host" else 1)
        training = encoder(model, store)
        contexts = [tokens(66, 1)]
        stale, _ = encoded_by(training, contexts, step=0)
        store.flush()
        move_adapters(model)
        if level == "disk of an earlier run":
            training = encoder(model, on_disk(tmp_path))
        if level == "read ahead":
            training.read_ahead(contexts)
        frozen, num_encoded = encoded_by(training, contexts, step=1)
        fresh = encode_context(model, contexts)
        assert num_encoded == 66
        assert same(frozen, fresh)
        # Had they been used, it would show.
        difference = relative_error(
            stale.rows[0].layers[0].linear.recurrent[0], fresh.rows[0].layers[0].linear.recurrent[0]
        )
        assert difference > 100 * TOLERANCE

    def test_are_used_for_as_many_steps_as_allowed_and_never_in_evaluation(self) -> None:
        model = add_lora(tiny_model("qwen3_5_text"))
        training = encoder(model, memory(max_staleness=2))
        contexts = [tokens(66, 1)]
        counts = []
        for step in range(8):
            counts.append(encoded_by(training, contexts, step=step)[1])
            move_adapters(model, 0.01)
        assert counts == [66, 0, 0, 66, 0, 0, 66, 0]
        frozen, num_encoded = encoded_by(training, contexts, step=8, stale=False)
        assert num_encoded == 66
        assert same(frozen, encode_context(model, contexts))

    def test_pass_their_age_on_to_what_extends_them(self) -> None:
        model = add_lora(tiny_model("qwen3_5_text"))
        training = encoder(model, memory(max_staleness=2))
        whole = tokens(100, 1)
        counts = []
        for step, length in enumerate((40, 66, 100, 100)):
            counts.append(encoded_by(training, [whole[:length]], step=step)[1])
            move_adapters(model, 0.01)
        assert counts == [40, 26, 34, 100]

    def test_are_not_used_when_weights_change_without_a_step(self) -> None:
        model = add_lora(tiny_model("qwen3_5_text"))
        training = encoder(model, memory(max_staleness=4))
        contexts = [tokens(66, 1)]
        training.encode(contexts, step=3)
        move_adapters(model)
        frozen, num_encoded = encoded_by(training, contexts, step=3)
        assert num_encoded == 66
        assert same(frozen, encode_context(model, contexts))

    def test_leave_memory_and_disk(self, tmp_path: Path) -> None:
        model = add_lora(tiny_model("qwen3_5_text"))
        store = on_disk(tmp_path, PLENTY)
        training = encoder(model, store)
        sizes = []
        for step in range(3):
            training.encode([tokens(66, 1)], step=step)
            store.flush()
            sizes.append((store.num_bytes, sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))))
            move_adapters(model, 0.01)
        assert len(set(sizes)) == 1

    def test_do_not_exist_without_adapters_in_contexts(self) -> None:
        model = add_lora(tiny_model("qwen3_5_text"))
        training = encoder(model, memory(), adapters=False)
        counts = []
        for step in range(3):
            counts.append(encoded_by(training, [tokens(66, 1)], step=step)[1])
            move_adapters(model)
        assert counts == [66, 0, 0]


class TestWeightsAreReadInFull:
    """Once per optimizer step, and wherever they changed within one."""

    @pytest.fixture
    def reads(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        made: list[int] = []
        read = store_module.adapter_fingerprint
        monkeypatch.setattr(store_module, "adapter_fingerprint", lambda model: made.append(1) or read(model))
        return made

    def test_once_per_step(self, reads: list[int]) -> None:
        model = add_lora(tiny_model("llama"))
        training = encoder(model, memory(max_staleness=1))
        for step in range(3):
            for seed in range(4):
                training.encode([tokens(20, seed)], step=step)
            training.encode([tokens(20, 0)], step=step, stale=False)
            move_adapters(model, 0.01)
        assert len(reads) == 3

    @staticmethod
    def weight(model: nn.Module) -> nn.Parameter:
        """One that is larger than what is looked at of it within a step."""
        return model.base_model.model.model.layers[0].mlp.up_proj.lora_B["default"].weight

    def changes(self, model: nn.Module) -> dict[str, Callable[[], object]]:
        """What may happen between two contexts of a step."""
        weight = self.weight(model)
        other = copy.deepcopy(get_peft_model_state_dict(model, adapter_name="other"))
        means = {name: parameter.data * 1.5 for name, parameter in model.named_parameters() if "default" in name}

        def exchange() -> None:
            for name, parameter in model.named_parameters():
                if name in means:
                    parameter.data.copy_(means[name])

        def one_number() -> None:
            with torch.no_grad():
                weight[17, 1] += 0.5

        def of_all(kind: str, factor: float) -> None:
            for module in model.modules():
                if isinstance(module, LoraLayer):
                    getattr(module, kind)("default", factor)

        return {
            "one number": one_number,
            "weights exchanged for their mean": exchange,
            "a row, uncounted": lambda: weight.data[1234].add_(0.5),
            "a column, uncounted": lambda: weight.data[:, 1].add_(0.5),
            "a tensor in its place": lambda: setattr(weight, "data", weight.data * 1.5),
            "another adapter": lambda: model.set_adapter("other"),
            "two adapters": lambda: model.base_model.set_adapter(["default", "other"]),
            "loaded": lambda: set_peft_model_state_dict(model, other, adapter_name="default"),
            "scaled": lambda: of_all("set_scale", 3.0),
            "switched off": lambda: model.base_model.disable_adapter_layers(),
        }

    @pytest.mark.parametrize("change", [
        "one number", "weights exchanged for their mean", "a row, uncounted", "a column, uncounted",
        "a tensor in its place", "another adapter", "two adapters", "loaded", "scaled", "switched off",
    ])  # fmt: skip
    def test_and_where_they_changed_in_it(self, change: str, reads: list[int]) -> None:
        model = add_lora(tiny_model("llama", intermediate_size=4096))
        model.add_adapter("other", model.peft_config["default"])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".other." in name:
                    parameter.normal_(generator=torch.Generator().manual_seed(1))
        assert self.weight(model).numel() > 2 * fingerprint.MIN_SAMPLES - 1
        training = encoder(model, memory(max_staleness=5))
        contexts = [tokens(66, 1)]
        before = training.encode(contexts, step=3)
        self.changes(model)[change]()
        frozen, num_encoded = encoded_by(training, contexts, step=3)
        fresh = encode_context(model, contexts)
        assert num_encoded == 66
        assert same(frozen, fresh)
        assert not same(before, fresh)
        assert len(reads) == 2

    def test_after_an_optimizer_that_counts_no_writes(self) -> None:
        """As bitsandbytes' do; of one number, which nothing but the step tells."""
        model = add_lora(tiny_model("llama", intermediate_size=4096))
        training = encoder(model, memory())
        contexts = [tokens(66, 1)]
        training.encode(contexts, step=0)
        self.weight(model).data[1, 1] += 0.5
        frozen, num_encoded = encoded_by(training, contexts, step=1)
        assert num_encoded == 66
        assert same(frozen, encode_context(model, contexts))


class TestGoingOn:
    """An encoder that is told by `record` what another one kept encodes as that one finds, bit for bit."""

    @staticmethod
    def contexts() -> list[torch.Tensor]:
        """Some that branch off from each other, and some that are as long as each other."""
        document = tokens(130, 0)
        return [torch.cat([document, tokens(21, seed)]) for seed in (1, 2)] + [tokens(21, seed) for seed in (3, 4, 5)]

    def compare(self, name: str, seed: int, max_bytes: int, **options: object) -> None:
        """One encoder for all of some random steps, and one that goes on after half of them."""
        model, contexts = add_lora(tiny_model(name)), self.contexts()
        whole, resumed = (encoder(model, memory(max_bytes, **options), adapters=False) for _ in range(2))
        drawn = random.Random(seed)
        for step in range(10):
            if step == 5:
                whole.forget()
                resumed.restore(json.loads(json.dumps(whole.record())))
                assert resumed.store.num_bytes == 0 < whole.store.num_bytes
            parts = [drawn.sample(contexts, drawn.randint(1, 3)) for _ in range(2)]
            both = (whole, resumed) if step >= 5 else (whole,)
            for each in both:
                each.expect([context for part in parts for context in part], step=step)
            for part in parts:
                frozen = [each.encode(part, step=step) for each in both]
                assert same(frozen[0], frozen[-1])
                # In the order in which they would go.
                kept = [list(each.store._memory.entries) for each in both]
                assert kept[0] == kept[-1]

    @pytest.mark.parametrize("options", [{}, {"dtype": "int8"}], ids=str)
    @pytest.mark.parametrize("name", ["qwen3_5_text", "gemma3_text"])
    def test_encodes_what_it_is_owed_in_the_same_pieces(self, name: str, options: dict) -> None:
        for seed in range(3):
            self.compare(name, seed, PLENTY, **options)

    def test_drops_what_the_other_one_drops(self) -> None:
        room = encode_context(add_lora(tiny_model("llama")), self.contexts()).num_bytes
        for seed in range(4):
            self.compare("llama", seed, int((0.3 + 0.1 * seed) * room))

    def test_owes_nothing_of_another_base(self) -> None:
        model, context = add_lora(tiny_model("llama")), tokens(66, 1)
        first = encoder(model, memory(), adapters=False)
        first.encode([context[:30], context])
        other = add_lora(tiny_model("llama"))
        with torch.no_grad():
            other.get_input_embeddings().weight[5] += 1
        going_on = encoder(other, memory(), adapters=False)
        going_on.restore(first.record())
        assert encoded_by(going_on, [context], step=1)[1] == 66
        assert same(going_on.encode([context], step=1), encode_context(other, [context], adapters=False))

    def test_what_goes_stale_leaves_nothing_to_go_on_from(self, tmp_path: Path) -> None:
        model = add_lora(tiny_model("llama"))
        for store, adapters in ((memory(max_staleness=3), True), (on_disk(tmp_path), False)):
            asking = encoder(model, store, adapters=adapters)
            asking.encode([tokens(20, 1)])
            assert asking.record() is None

    @pytest.mark.parametrize("entries", [[["7", "", 5]], [["x-1", "", 5]], [[1]], [["7-" + "0" * 32, "8", 5]], 3])
    def test_what_is_no_record_is_refused(self, entries: object) -> None:
        store = memory()
        with pytest.raises(ValueError, match="not a record of kept contexts"):
            store.restore({"base": "a", "namespace": "b", "entries": entries})
        assert not store._memory.entries


class TestNamespaces:
    @staticmethod
    def fingerprints(model: nn.Module) -> tuple[str, str, str]:
        return base_fingerprint(model), adapter_fingerprint(model), run_fingerprint(model)

    def test_are_the_same_for_the_same_model(self) -> None:
        models = [add_lora(tiny_model("qwen3_5_text")) for _ in range(2)]
        models[1].config._name_or_path = "elsewhere"
        assert self.fingerprints(models[0]) == self.fingerprints(models[1])

    def test_a_moved_adapter_changes_that_of_the_adapter_only(self) -> None:
        model = add_lora(tiny_model("qwen3_5_text"))
        before = self.fingerprints(model)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                kept = parameter.data.clone()
                parameter.data.view(-1)[-1] += 1e-3
                after = self.fingerprints(model)
                assert (after[0], after[2]) == (before[0], before[2])
                assert after[1] != before[1], name
                parameter.data.copy_(kept)
        assert self.fingerprints(model) == before

    def test_every_weight_and_buffer_of_the_base_counts(self) -> None:
        model = add_lora(tiny_model("qwen3_5_text"))
        before = base_fingerprint(model)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.requires_grad:
                kept = tensor.data.clone()
                tensor.data.view(-1)[-1] += 1
                assert base_fingerprint(model) != before, name
                tensor.data.copy_(kept)

    def test_a_large_weight_is_sampled_in_every_row(self) -> None:
        model = tiny_model("llama")
        model.model.embed_tokens = nn.Embedding(6000, 64)
        model.requires_grad_(False)
        before = base_fingerprint(model)
        read = []
        import frozen_peft.context.store.fingerprint as module

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_bytes", lambda tensor: read.append(tensor.numel()) or b"")
            base_fingerprint(model)
        tensors = [*model.parameters(), *model.buffers()]
        others = sum(tensor.numel() for tensor in tensors) - model.model.embed_tokens.weight.numel()
        assert 6000 <= sum(read) <= 6000 + others
        for row in (0, 2999, 5999):
            kept = model.model.embed_tokens.weight.data[row].clone()
            model.model.embed_tokens.weight.data[row] += 1
            assert base_fingerprint(model) != before
            model.model.embed_tokens.weight.data[row] = kept
        assert base_fingerprint(model) == before

    def test_the_scales_of_a_4_bit_weight_count(self) -> None:
        """Weights that are twice as large have the same 4-bit codes."""
        bnb = pytest.importorskip("bitsandbytes")
        digests = set()
        for factor in (1.0, 2.0):
            model = tiny_model("llama").requires_grad_(False)
            weight = model.model.layers[0].mlp.up_proj.weight.data * factor
            layer = bnb.nn.Linear4bit(weight.shape[1], weight.shape[0], bias=False, quant_type="nf4")
            layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
            model.model.layers[0].mlp.up_proj = layer.to("cpu")
            assert layer.weight.quant_state is not None
            digests.add(base_fingerprint(model))
        assert len(digests) == 2

    def test_dtype_attention_configuration_and_autocast_count(self) -> None:
        seen = {self.fingerprints(add_lora(tiny_model("llama")))}
        half = add_lora(tiny_model("llama")).to(torch.bfloat16)
        segmented = add_lora(tiny_model("llama"))
        use_segmented_attention(segmented)
        scaled = add_lora(tiny_model("llama"))
        scaled.config.rope_theta = 5e5
        seen |= {self.fingerprints(model) for model in (half, segmented, scaled)}
        with torch.autocast("cpu", torch.bfloat16):
            seen.add(self.fingerprints(add_lora(tiny_model("llama"))))
        assert len(seen) == 5

    def test_a_directory_serves_two_models(self, tmp_path: Path) -> None:
        contexts = [tokens(66, 1)]
        models = [add_lora(tiny_model(name)) for name in ("llama", "qwen3")]
        for _ in range(2):
            for model in models:
                frozen = encoder(model, on_disk(tmp_path)).encode(contexts)
                assert same(frozen, encode_context(model, contexts))


class TestBudget:
    @staticmethod
    def measured(store: ContextStore) -> int:
        """Bytes of the storages that the store keeps alive."""
        storages = {}
        for entry in store._memory.entries.values():
            for tensor in entry.tensors.values():
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return sum(storages.values())

    @settings(max_examples=15, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 60)), min_size=1, max_size=12), st.integers(0, 60_000))
    def test_holds_whatever_is_encoded(self, asked: list[tuple[int, int]], max_bytes: int) -> None:
        store = memory(max_bytes)
        asking = encoder(self.model(), store, adapters=False)
        trunk = tokens(30, 0)
        for step, (seed, length) in enumerate(asked):
            context = torch.cat([trunk, tokens(60, seed)])[:length]
            asking.expect([context, trunk], step=step)
            frozen = asking.encode([context, trunk], step=step)
            assert frozen.lengths == [len(context), 30]
            assert self.measured(store) == store.num_bytes <= max_bytes
            for (namespace, _), entry in store._memory.entries.items():
                assert entry.prefix is None or (namespace, entry.prefix) in store._memory

    @staticmethod
    @functools.cache
    def model() -> nn.Module:
        """One for all examples."""
        return add_lora(tiny_model("qwen3_5_text"))

    def test_the_least_recently_used_goes_first(self) -> None:
        contexts = {name: tokens(40, seed) for seed, name in enumerate("abc")}
        one = encode_context(self.model(), [contexts["a"]]).num_bytes
        asking = encoder(self.model(), memory(2 * one), adapters=False)
        counts = [encoded_by(asking, [contexts[name]], step=step)[1] for step, name in enumerate("abacab")]
        assert counts == [40, 40, 0, 40, 0, 40]

    def test_a_prefix_outlives_what_extends_it(self) -> None:
        whole = tokens(60, 1)
        asking = encoder(self.model(), memory(), adapters=False)
        asking.encode([whole[:40], whole])
        room = asking.store.num_bytes
        asking = encoder(self.model(), memory(room), adapters=False)
        asking.encode([whole[:40], whole], step=0)
        asking.encode([whole], step=1)
        asking.encode([tokens(5, 2)], step=2)
        assert encoded_by(asking, [whole[:40]], step=3)[1] == 0
        assert encoded_by(asking, [whole], step=4)[1] == 20

    def test_a_context_larger_than_the_budget_is_encoded_each_time(self) -> None:
        asking = encoder(self.model(), memory(100), adapters=False)
        assert [encoded_by(asking, [tokens(40, 1)], step=step)[1] for step in range(2)] == [40, 40]
        assert asking.store.num_bytes == 0

    def test_memory_that_the_device_needs_back_goes_to_the_host(self) -> None:
        free = [1]
        store = memory(room=lambda device: free[0])
        asking = encoder(self.model(), store, adapters=False)
        fresh = asking.encode([tokens(40, 1)])
        assert [entry.on_host for entry in store._memory.entries.values()] == [False]
        free[0] = -1
        frozen, num_encoded = encoded_by(asking, [tokens(40, 1)], step=1)
        assert [entry.on_host for entry in store._memory.entries.values()] == [True]
        assert num_encoded == 0
        assert same(frozen, fresh)
        assert self.measured(store) == store.num_bytes


class TestDisk:
    def test_is_read_in_another_thread_once_it_is_announced(self, tmp_path: Path) -> None:
        model, contexts = add_lora(tiny_model("llama")), [tokens(66, 1), tokens(40, 2)]
        first = encoder(model, on_disk(tmp_path), adapters=False)
        first.encode(contexts)
        first.store.flush()
        files = ContextFiles(tmp_path)
        threads = []
        read = files.read
        files.read = lambda *key: threads.append(threading.current_thread().name) or read(*key)
        second = encoder(model, ContextStore(0, DiskLevel(files)), adapters=False)
        second.encode([tokens(5, 3)])
        second.read_ahead(contexts)
        assert encoded_by(second, contexts)[1] == 0
        assert len(threads) == 2
        assert all(name.startswith("contexts-read") for name in threads)

    def test_a_damaged_file_is_encoded_again(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        model, contexts = add_lora(tiny_model("qwen3_5_text")), [tokens(66, 1)]
        first = encoder(model, on_disk(tmp_path))
        fresh = first.encode(contexts)
        first.store.flush()
        for path in tmp_path.rglob("*.safetensors"):
            path.write_bytes(path.read_bytes()[:-7])
        for expected in (66, 0):
            again = encoder(model, on_disk(tmp_path))
            frozen, num_encoded = encoded_by(again, contexts)
            again.store.flush()
            assert num_encoded == expected
            assert same(frozen, fresh)
        assert len([record for record in caplog.records if "is removed, because" in record.message]) == 1

    def test_a_missing_prefix_is_encoded_again(self, tmp_path: Path) -> None:
        model, whole = add_lora(tiny_model("qwen3_5_text")), tokens(66, 1)
        first = encoder(model, on_disk(tmp_path))
        first.encode([whole[:40], whole])
        first.store.flush()
        (prefix,) = tmp_path.rglob("40-*.safetensors")
        prefix.unlink()
        frozen, num_encoded = encoded_by(encoder(model, on_disk(tmp_path)), [whole])
        assert num_encoded == 66
        assert same(frozen, encode_context(model, [whole]))

    def test_a_directory_that_cannot_be_written_loses_nothing(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "file").touch()
        model, contexts = add_lora(tiny_model("qwen3_5_text")), [tokens(66, 1)]
        asking = encoder(model, on_disk(tmp_path / "file" / "contexts"))
        for _ in range(2):
            assert same(asking.encode(contexts), encode_context(model, contexts))
            asking.store.flush()
        assert len([record for record in caplog.records if "cannot be written" in record.message]) == 1


def test_contexts_of_one_batch_are_stored_apart() -> None:
    """Rows that were encoded together can be evicted one by one."""
    model = add_lora(tiny_model("qwen3_5_text"))
    store = memory()
    encoder(model, store).encode([tokens(20, seed) for seed in range(3)])
    storages = [
        {tensor.untyped_storage().data_ptr() for tensor in entry.tensors.values()}
        for entry in store._memory.entries.values()
    ]
    assert len(storages) == 3
    assert not storages[0] & storages[1]
    assert not storages[1] & storages[2]
