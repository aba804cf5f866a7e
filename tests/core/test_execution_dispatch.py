"""The dispatcher's decisions, and the bookkeeping of captured graphs with a stand-in for the device's recorder."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.attention.sdpa import SdpaAttention
from engine.attention.triton import TritonAttention
from engine.cache.kv_cache import KVCache
from engine.config import EngineConfig, knob
from engine.core import Engine
from engine.device import on_device, pack, packed_bytes, unpack
from engine.execution.base import PreparedShape, Step, TokenRange
from engine.execution.captured_graph import GraphCapture
from engine.execution.dispatcher import Dispatcher
from engine.execution.executor import Executor
from engine.execution.graphs import GraphsMode, bucket_ranges, graph_buckets
from engine.execution.modes import MODES
from engine.execution.step_tensors import build_step_tensors
from engine.execution.warm_up import warm_ups
from engine.models import LoadedModel, load_model
from engine.status import path_of

CPU = torch.device("cpu")
BLOCK = 4


class Shape(PreparedShape):
    name = "compiled"

    def __init__(self, low: int, high: int) -> None:
        self.tokens = TokenRange(low, high)

    def forward(self, step: Step) -> torch.Tensor:
        raise AssertionError("the dispatcher decides, it never runs a shape")


class Otherwise(Shape):
    name = "eager"


def decide(dispatcher: Dispatcher, num_tokens: int) -> tuple[str, str]:
    decision = dispatcher.decide(num_tokens, Otherwise(1, 1))
    return decision.mode, decision.reason


def test_a_shape_serves_its_tokens_and_no_others():
    dispatcher = Dispatcher()
    dispatcher.add(Shape(2, 64))
    assert decide(dispatcher, 2) == decide(dispatcher, 64) == ("compiled", "prepared for 2–64 tokens")
    assert decide(dispatcher, 1) == ("eager", "1 tokens are not prepared")
    assert decide(dispatcher, 65)[0] == "eager"


def test_what_is_forgotten_serves_nothing():
    dispatcher = Dispatcher()
    dispatcher.add(Shape(1, 64))
    dispatcher.fail(TokenRange(65, 128), "no space left")
    dispatcher.forget()
    assert decide(dispatcher, 3) == ("eager", "3 tokens are not prepared")
    assert (dispatcher.prepared(), dispatcher.failed()) == ([], ())


def test_a_failure_is_the_reason_for_eager():
    dispatcher = Dispatcher()
    dispatcher.fail(TokenRange(2, 64), "no space left")
    assert decide(dispatcher, 3) == ("eager", "preparing 2–64 tokens failed: no space left")


def test_every_value_of_the_knob_is_a_mode_that_calls_itself_by_it():
    assert {name: mode.name for name, mode in MODES.items()} == {name: name for name in knob("execution").choices}


@pytest.mark.parametrize("largest", [1, 3, 8, 16, 40, 64, 100])
def test_buckets_cover_every_batch_size_once_and_end_at_the_largest(largest: int):
    sizes = graph_buckets(largest)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] == largest
    covered = [size for tokens in bucket_ranges(largest) for size in range(tokens.low, tokens.high + 1)]
    assert covered == list(range(1, largest + 1))


def test_buckets_are_fine_where_batches_are_small():
    assert graph_buckets(64) == (1, 2, 4, 8, 16, 24, 32, 48, 64)


def test_only_a_gpu_is_made_the_current_device():
    assert isinstance(on_device(torch.device("cpu")), contextlib.nullcontext)
    chosen = on_device(torch.device("cuda:1"))
    assert isinstance(chosen, torch.cuda.device)
    assert chosen.idx == 1


# -- warm-up -----------------------------------------------------------------------------------------------


def test_a_warm_up_takes_prompts_and_decodes_in_powers_of_two_and_one_long_context():
    labels = [size.label() for size in warm_ups(max_tokens=10, max_num_seqs=6, max_model_len=300)]
    prompts = [f"a prompt of {count} tokens" for count in (10, 8, 4, 2)]
    assert labels == [*prompts, *(f"{count} decoding" for count in (1, 2, 4, 6)), "1 decoding of 300 tokens"]


@pytest.mark.parametrize("largest", [1, 2, 3, 64, 1000, 100_000])
def test_a_warm_up_is_short_and_within_the_limits_of_the_engine(largest: int):
    sizes = warm_ups(max_tokens=largest, max_num_seqs=largest, max_model_len=largest)
    assert len(sizes) <= 30
    for size in sizes:
        assert size.sequences * size.tokens_each <= largest
        assert size.tokens_each <= size.context <= largest


# -- graphs ------------------------------------------------------------------------------------------------


class Recorder(GraphCapture):
    """Runs the work again at each replay and keeps the result at its address, as a graph does."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def capture(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        result = work().clone()
        self.sizes.append(result.shape[0])

        def replay() -> None:
            with torch.inference_mode():
                result.copy_(work())

        return replay, result


@pytest.fixture
def model(tiny_llama: Path) -> LoadedModel:
    return load_model(str(tiny_llama), dtype="float32", device="cpu")


class _Triton:
    """The plain backend under the name that graphs ask for: it, too, reads the layout from tensors alone."""

    name = "triton"

    def __init__(self) -> None:
        from engine.attention.reference import ReferenceAttention

        self.attend = ReferenceAttention().attend


def make_executor(model: LoadedModel, num_blocks: int = 40) -> tuple[Executor, list[str]]:
    decoder, summaries = model.decoder, []
    cache = KVCache(
        num_layers=decoder.num_layers,
        num_blocks=num_blocks,
        block_size=BLOCK,
        num_kv_heads=decoder.num_kv_heads,
        head_dim=decoder.head_dim,
        dtype=model.dtype,
        device=CPU,
    )
    executor = Executor(
        decoder,
        cache,
        CPU,
        max_tokens=64,
        max_num_seqs=8,
        max_model_len=32,
        add_event=lambda kind, summary, detail: summaries.append(summary),
    )
    return executor, summaries


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """What records the graphs of every executor."""
    recorder = Recorder()
    monkeypatch.setattr(GraphsMode, "make_capture", lambda mode: recorder)
    return recorder


def decode_step(count: int) -> Step:
    tensors = build_step_tensors(
        token_ids=[10 + row for row in range(count)],
        starts=[5 + row for row in range(count)],
        query_lens=[1] * count,
        tables=[[row * 4, row * 4 + 1, row * 4 + 2, row * 4 + 3] for row in range(count)],
        sampled=list(range(count)),
        block_size=BLOCK,
        device=CPU,
    )
    return Step(tensors.token_ids, tensors.positions, tensors.batch, _Triton())  # type: ignore[arg-type]


def config_of_graphs() -> EngineConfig:
    return EngineConfig.from_mapping({"execution": "graphs", "attention": "triton", "linear": "torch"})


def test_graphs_are_captured_largest_first_one_between_two_steps(model: LoadedModel, recorder: Recorder):
    executor, summaries = make_executor(model)
    executor.configure(config_of_graphs(), _Triton())  # type: ignore[arg-type]
    assert recorder.sizes == []
    executor.poll()
    assert recorder.sizes == [8]
    assert executor.status()["prepared"] == ["5–8"]
    assert executor.status()["preparing"]["total"] == 4
    while executor.preparing:
        executor.poll()
    assert recorder.sizes == [8, 4, 2, 1]
    assert executor.path() == "graphs (1, 2, 3–4, 5–8 tokens)"
    assert len(summaries) == 4


@pytest.mark.parametrize("count", [1, 3, 5, 8])
def test_padding_of_a_graph_touches_only_the_scratch_block_and_changes_no_row(
    model: LoadedModel, recorder: Recorder, count: int
):
    executor, _ = make_executor(model)
    executor.configure(config_of_graphs(), _Triton())  # type: ignore[arg-type]
    while executor.preparing:
        executor.poll()
    start = torch.Generator().manual_seed(0)
    for tensor in (*executor.environment.cache.keys, *executor.environment.cache.values):
        tensor.copy_(torch.randn(tensor.shape, generator=start))
    before = [tensor.clone() for tensor in (*executor.environment.cache.keys, *executor.environment.cache.values)]
    with torch.inference_mode():
        replayed = executor.forward(decode_step(count)).clone()
        assert executor.last.mode == "graphs"
        after = [tensor.clone() for tensor in (*executor.environment.cache.keys, *executor.environment.cache.values)]
        eager = executor.forward_over(executor.environment.cache, decode_step(count))
    assert replayed.shape == eager.shape
    torch.testing.assert_close(replayed, eager, rtol=1e-4, atol=1e-4)
    written = {(row * 4 + (5 + row) // BLOCK, (5 + row) % BLOCK) for row in range(count)}
    for old, new in zip(before, after, strict=True):
        changed = {tuple(place) for place in (old != new).flatten(2).any(-1).nonzero().tolist()}
        assert {place for place in changed if place[0] != 39} == written
        assert {place for place in changed if place[0] == 39} <= {(39, 0)}


def test_a_smaller_batch_after_a_larger_one_leaves_nothing_of_it_behind(model: LoadedModel, recorder: Recorder):
    executor, _ = make_executor(model)
    executor.configure(config_of_graphs(), _Triton())  # type: ignore[arg-type]
    while executor.preparing:
        executor.poll()
    with torch.inference_mode():
        executor.forward(decode_step(8))
        before = executor.environment.cache.keys[0].clone()
        executor.forward(decode_step(5))
    changed = {
        place[0] for place in (before != executor.environment.cache.keys[0]).flatten(2).any(-1).nonzero().tolist()
    }
    assert not changed & {5 * 4 + (5 + 5) // BLOCK, 6 * 4 + (5 + 6) // BLOCK, 7 * 4 + (5 + 7) // BLOCK}


def test_swapped_weights_drop_the_graphs_and_capture_again(model: LoadedModel, recorder: Recorder):
    executor, _ = make_executor(model)
    executor.configure(config_of_graphs(), _Triton())  # type: ignore[arg-type]
    while executor.preparing:
        executor.poll()
    model.commit_weights(model.prepare_weights("int8", 32))
    with torch.inference_mode():
        executor.forward(decode_step(2))
    assert executor.last.mode == "eager"
    assert "swapped" in executor.last.reason
    executor.poll()
    while executor.preparing:
        executor.poll()
    assert recorder.sizes == [8, 4, 2, 1] * 2
    with torch.inference_mode():
        executor.forward(decode_step(2))
    assert executor.last.mode == "graphs"


def test_a_capture_that_fails_leaves_its_bucket_eager_with_the_reason(
    model: LoadedModel, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
):
    def broken(self: Recorder, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Recorder, "capture", broken)
    executor, summaries = make_executor(model)
    executor.configure(config_of_graphs(), _Triton())  # type: ignore[arg-type]
    while executor.preparing:
        executor.poll()
    assert len(summaries) == 4
    with torch.inference_mode():
        executor.forward(decode_step(2))
    assert executor.last.mode == "eager"
    assert "out of memory" in executor.last.reason


def test_steps_that_no_graph_holds_run_by_the_fallback_with_the_reason(model: LoadedModel, recorder: Recorder):
    executor, _ = make_executor(model)
    executor.configure(config_of_graphs(), _Triton())  # type: ignore[arg-type]
    assert executor.path() == "eager; preparing graphs"
    while executor.preparing:
        executor.poll()
    prompt = build_step_tensors(
        token_ids=[1, 2, 3], starts=[0], query_lens=[3], tables=[[0]], sampled=[2], block_size=BLOCK, device=CPU
    )
    whole = Step(prompt.token_ids, prompt.positions, prompt.batch, _Triton())  # type: ignore[arg-type]
    assert executor.mode.decide(whole).reason == "a graph holds pure decode batches only"
    other = executor.mode.decide(dataclasses.replace(decode_step(2), backend=SdpaAttention()))
    assert (other.mode, other.reason) == ("eager", "a graph needs attention triton, not sdpa")
    assert executor.mode.decide(decode_step(2)).mode == "graphs"
    assert executor.mode.decide(decode_step(9)).reason == "9 tokens are not prepared"


def test_graphs_without_triton_attention_are_refused_with_the_remedy(model: LoadedModel):
    from engine.errors import ConfigError

    executor, _ = make_executor(model)
    executor.environment = dataclasses.replace(executor.environment, device=torch.device("cuda"))
    with pytest.raises(ConfigError) as refused:
        executor.check(config_of_graphs(), SdpaAttention())
    assert "triton" in (refused.value.remedy or "")
    executor.check(config_of_graphs(), TritonAttention())  # whether it was named, or is what auto came to


# -- the tensors of a step ---------------------------------------------------------------------------------


def test_step_tensors_put_every_token_into_its_slot():
    tensors = build_step_tensors(
        token_ids=[1, 2, 3, 4, 5, 6],
        starts=[0, 9, 3],
        query_lens=[3, 1, 2],
        tables=[[7], [2, 5, 8, 11], [4, 6]],
        sampled=[3, 5],
        block_size=4,
        device=CPU,
    )
    assert tensors.positions.tolist() == [0, 1, 2, 9, 3, 4]
    assert tensors.batch.slot_mapping.tolist() == [28, 29, 30, 8 * 4 + 1, 4 * 4 + 3, 6 * 4]
    assert tensors.batch.query_start.tolist() == [0, 3, 4, 6]
    assert tensors.batch.context_lens == tensors.batch.context_lens_tensor.tolist() == [3, 10, 5]
    assert tensors.batch.block_tables.tolist() == [[7, 0, 0], [2, 5, 8], [4, 6, 0]]
    assert tensors.sampled.tolist() == [3, 5]


def test_packed_step_tensors_come_out_of_one_buffer_unchanged():
    import numpy as np

    arrays = [
        np.arange(5),
        np.arange(3, dtype=np.int32),
        np.arange(14, dtype=np.int32).reshape(2, 7),
        np.array([], int),
    ]
    buffer = torch.full((packed_bytes(arrays),), 255, dtype=torch.uint8)
    pack(arrays, buffer.numpy())
    for array, tensor in zip(arrays, unpack(buffer, arrays), strict=True):
        assert tensor.shape == array.shape
        assert np.array_equal(tensor.numpy(), array)
        assert tensor.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()


def test_engine_steps_say_how_they_ran(model: LoadedModel):
    from engine.sampling.params import SamplingParams

    knobs = {"memory_limit_gib": 0.25, "block_size": 4, "execution": "eager"}
    engine = Engine(model, EngineConfig.from_mapping(knobs))
    engine.add_request("r", [1, 2, 3], SamplingParams(max_tokens=3))
    while engine.has_unfinished():
        engine.step()
    assert {step.execution for step in engine.steps.since(0)} == {"eager"}
    assert path_of(engine)["execution"] == "eager"
