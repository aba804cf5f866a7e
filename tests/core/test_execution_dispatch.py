"""The dispatcher's answers, and the bookkeeping of captured graphs with a stand-in for the device's recorder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.attention.sdpa import SdpaAttention
from engine.attention.triton import TritonAttention
from engine.cache.kv_cache import KVCache
from engine.config import EngineConfig
from engine.core import Engine
from engine.device import on_device, pack, packed_bytes, unpack
from engine.execution.base import PreparedShape, Step, TokenRange
from engine.execution.dispatcher import Dispatcher, bucket_ranges, graph_buckets
from engine.execution.executor import Executor
from engine.execution.graphs import GraphCapture
from engine.execution.step_tensors import build_step_tensors
from engine.execution.warm_up import warm_ups
from engine.models import LoadedModel, load_model
from engine.status import path_of

CPU = torch.device("cpu")
BLOCK = 4


class Shape(PreparedShape):
    def __init__(self, low: int, high: int, mode: str = "compiled") -> None:
        self.tokens, self.mode, self.decode_only = TokenRange(low, high), mode, mode == "graphs"

    def forward(self, step: Step) -> torch.Tensor:
        raise AssertionError("the dispatcher answers, it never runs a shape")


def ask(dispatcher: Dispatcher, num_tokens: int, **changes: Any) -> tuple[str, str]:
    facts = {"pure_decode": True, "attention": "triton", "weights": "model#0", **changes}
    answer = dispatcher.answer(num_tokens, **facts)
    return answer.mode, answer.reason


def test_eager_answers_eager_whatever_is_prepared():
    dispatcher = Dispatcher("eager")
    dispatcher.add("model#0", Shape(1, 64))
    assert ask(dispatcher, 3) == ("eager", "asked for")


def test_a_shape_answers_for_its_tokens_and_for_no_others():
    dispatcher = Dispatcher("compiled")
    dispatcher.add("model#0", Shape(2, 64))
    assert ask(dispatcher, 2)[0] == ask(dispatcher, 64)[0] == "compiled"
    assert ask(dispatcher, 1) == ("eager", "1 tokens are not prepared")
    assert ask(dispatcher, 65)[0] == "eager"


def test_shapes_of_other_weights_never_run():
    dispatcher = Dispatcher("compiled")
    dispatcher.add("model#0", Shape(1, 64))
    mode, reason = ask(dispatcher, 3, weights="int8#1")
    assert mode == "eager"
    assert "swapped" in reason


def test_a_failure_is_the_reason_for_eager():
    dispatcher = Dispatcher("compiled")
    dispatcher.fail("model#0", TokenRange(2, 64), "no space left")
    assert ask(dispatcher, 3) == ("eager", "preparing 2–64 tokens failed: no space left")


def test_compiled_serves_every_layout_and_backend_and_graphs_only_decodes_with_triton():
    compiled, graphs = Dispatcher("compiled"), Dispatcher("graphs")
    for dispatcher in (compiled, graphs):
        dispatcher.add("model#0", Shape(1, 64, dispatcher.mode))
    assert ask(compiled, 3, pure_decode=False, attention="sdpa")[0] == "compiled"
    assert ask(graphs, 3)[0] == "graphs"
    assert ask(graphs, 3, pure_decode=False)[0] == "eager"
    assert "triton" in ask(graphs, 3, attention="sdpa")[1]


def test_fused_layers_serve_the_steps_that_no_graph_holds_and_graphs_come_first():
    graphs = Dispatcher("graphs")
    graphs.add("model#0", Shape(1, 4096, "fused"))
    assert ask(graphs, 3) == ("fused", "3 tokens are not prepared")
    graphs.add("model#0", Shape(1, 64, "graphs"))
    assert ask(graphs, 3) == ("graphs", "prepared for 1–64 tokens")
    assert ask(graphs, 65)[0] == "fused"
    assert ask(graphs, 3, pure_decode=False) == ("fused", "a graph holds pure decode batches only")
    assert [str(tokens) for tokens in graphs.prepared("model#0")] == ["1–64"]
    assert graphs.direct("model#0") == "fused"


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
    words = [size.words() for size in warm_ups(max_tokens=10, max_num_seqs=6, max_model_len=300)]
    prompts = [f"a prompt of {count} tokens" for count in (10, 8, 4, 2)]
    assert words == [*prompts, *(f"{count} decoding" for count in (1, 2, 4, 6)), "1 decoding of 300 tokens"]


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


def make_executor(model: LoadedModel, num_blocks: int, recorder: Recorder) -> tuple[Executor, list[str]]:
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
    executor.make_capture = lambda: recorder
    return executor, summaries


def decode_step(executor: Executor, count: int) -> Step:
    tensors = build_step_tensors(
        token_ids=[10 + row for row in range(count)],
        starts=[5 + row for row in range(count)],
        query_lens=[1] * count,
        tables=[[row * 4, row * 4 + 1, row * 4 + 2, row * 4 + 3] for row in range(count)],
        sampled=list(range(count)),
        block_size=BLOCK,
        device=CPU,
    )
    executor.context.enter(_Triton(), executor.cache, tensors.batch)  # type: ignore[arg-type]
    return Step(tensors.token_ids, tensors.positions, executor.context, True)


def config_of_graphs() -> EngineConfig:
    return EngineConfig.from_mapping({"execution": "graphs", "attention": "triton"})


def test_graphs_are_captured_largest_first_one_between_two_steps(model: LoadedModel):
    recorder = Recorder()
    executor, summaries = make_executor(model, 40, recorder)
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
def test_padding_of_a_graph_touches_only_the_scratch_block_and_changes_no_row(model: LoadedModel, count: int):
    executor, _ = make_executor(model, 40, Recorder())
    executor.configure(config_of_graphs(), _Triton())  # type: ignore[arg-type]
    while executor.preparing:
        executor.poll()
    start = torch.Generator().manual_seed(0)
    for tensor in (*executor.cache.keys, *executor.cache.values):
        tensor.copy_(torch.randn(tensor.shape, generator=start))
    before = [tensor.clone() for tensor in (*executor.cache.keys, *executor.cache.values)]
    with torch.inference_mode():
        replayed = executor.forward(decode_step(executor, count)).clone()
        assert executor.last.mode == "graphs"
        after = [tensor.clone() for tensor in (*executor.cache.keys, *executor.cache.values)]
        eager = executor._eager.forward(decode_step(executor, count))
    assert replayed.shape == eager.shape
    torch.testing.assert_close(replayed, eager, rtol=1e-4, atol=1e-4)
    written = {(row * 4 + (5 + row) // BLOCK, (5 + row) % BLOCK) for row in range(count)}
    for old, new in zip(before, after, strict=True):
        changed = {tuple(place) for place in (old != new).flatten(2).any(-1).nonzero().tolist()}
        assert {place for place in changed if place[0] != 39} == written
        assert {place for place in changed if place[0] == 39} <= {(39, 0)}


def test_a_smaller_batch_after_a_larger_one_leaves_nothing_of_it_behind(model: LoadedModel):
    executor, _ = make_executor(model, 40, Recorder())
    executor.configure(config_of_graphs(), _Triton())  # type: ignore[arg-type]
    while executor.preparing:
        executor.poll()
    with torch.inference_mode():
        executor.forward(decode_step(executor, 8))
        before = executor.cache.keys[0].clone()
        executor.forward(decode_step(executor, 5))
    changed = {place[0] for place in (before != executor.cache.keys[0]).flatten(2).any(-1).nonzero().tolist()}
    assert not changed & {5 * 4 + (5 + 5) // BLOCK, 6 * 4 + (5 + 6) // BLOCK, 7 * 4 + (5 + 7) // BLOCK}


def test_swapped_weights_drop_the_graphs_and_capture_anew(model: LoadedModel):
    recorder = Recorder()
    executor, _ = make_executor(model, 40, recorder)
    executor.configure(config_of_graphs(), _Triton())  # type: ignore[arg-type]
    while executor.preparing:
        executor.poll()
    model.commit_weights(model.prepare_weights("int8", 32))
    with torch.inference_mode():
        executor.forward(decode_step(executor, 2))
    assert executor.last.mode == "eager"
    assert "swapped" in executor.last.reason
    executor.poll()
    while executor.preparing:
        executor.poll()
    assert recorder.sizes == [8, 4, 2, 1] * 2
    with torch.inference_mode():
        executor.forward(decode_step(executor, 2))
    assert executor.last.mode == "graphs"


def test_a_capture_that_fails_leaves_its_bucket_eager_with_the_reason(model: LoadedModel):
    class Broken(Recorder):
        def capture(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
            raise RuntimeError("out of memory")

    executor, summaries = make_executor(model, 40, Broken())
    executor.configure(config_of_graphs(), _Triton())  # type: ignore[arg-type]
    while executor.preparing:
        executor.poll()
    assert len(summaries) == 4
    with torch.inference_mode():
        executor.forward(decode_step(executor, 2))
    assert executor.last.mode == "eager"
    assert "out of memory" in executor.last.reason


def test_graphs_without_triton_attention_are_refused_with_the_remedy(model: LoadedModel):
    from engine.errors import ConfigError

    executor, _ = make_executor(model, 40, Recorder())
    executor.device = torch.device("cuda")
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
