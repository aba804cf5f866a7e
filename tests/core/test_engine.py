"""The engine on a tiny model: requests, stopping, reconfiguration, swapping weights, two engines at once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import sizing
from engine.config import EngineConfig
from engine.core import Engine
from engine.errors import CapacityError, ConfigError, RequestError
from engine.models import load_model
from engine.outputs import RequestOutput
from engine.reconfigure import reconfigure
from engine.sampling.params import SamplingParams
from engine.status import path_of, take_status
from kernels.cpu import build
from tests.support import engine_with_blocks


@pytest.fixture
def engine(tiny_llama: Path) -> Engine:
    return make_engine(tiny_llama)


def make_engine(folder: Path, **knobs: Any) -> Engine:
    model = load_model(str(folder), dtype="float32", device="cpu")
    base = {"block_size": 4, "max_num_seqs": 8, "memory_limit_gib": 0.25}
    return Engine(model, EngineConfig.from_mapping({**base, **knobs}))


def run(engine: Engine) -> dict[str, RequestOutput]:
    finished = {}
    while engine.has_unfinished():
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = output
        engine.check_invariants()
    return finished


def generate(engine: Engine, prompt: list[int], **params: Any) -> RequestOutput:
    engine.add_request("r", prompt, SamplingParams(**{"max_tokens": 12, **params}))
    return run(engine)["r"]


def all_weights(engine: Engine) -> dict[str, torch.Tensor]:
    """Every resident tensor of the model by name, those inside weight formats included."""
    decoder = engine.model.decoder
    formats = {
        f"{name}.{role}": tensor
        for name, linear, _ in decoder.linears()
        for role, tensor in linear.format.tensors().items()
    }
    return {**decoder.state_dict(), **formats}


PROMPT = [72, 101, 108, 108, 111]


def test_streamed_pieces_add_up_to_the_whole(engine: Engine):
    engine.add_request("r", PROMPT, SamplingParams(max_tokens=30, ignore_eos=True))
    tokens: list[int] = []
    text = ""
    while engine.has_unfinished():
        for output in engine.step():
            tokens += output.new_token_ids
            text += output.new_text
            last = output
    assert tokens == last.token_ids
    assert text == last.text == engine.tokenizer.decode(tokens, skip_special_tokens=True)
    assert last.finish_reason == "length"
    assert len(last.times.token_times) == 30


def test_stop_token_ends_the_output_and_is_its_last_token(engine: Engine):
    free = generate(engine, PROMPT, ignore_eos=True).token_ids
    stop = free[5]
    output = generate(engine, PROMPT, ignore_eos=True, stop_token_ids=(stop,))
    assert output.token_ids == free[: free.index(stop) + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)


def test_stop_string_is_cut_from_the_text(engine: Engine):
    free = generate(engine, PROMPT, ignore_eos=True)
    stop = free.text[4:6]
    output = generate(engine, PROMPT, ignore_eos=True, stop=(stop,))
    assert output.text == free.text[: free.text.index(stop)]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)


def test_stop_inside_an_accepted_draft_cuts_off_what_follows(tiny_llama: Path):
    plain, speculative = make_engine(tiny_llama), make_engine(tiny_llama, speculation="ngram", ngram_min=1)
    prompt = [5, 6, 7, 8] * 6
    free = generate(plain, prompt, max_tokens=40, ignore_eos=True).token_ids
    assert generate(speculative, prompt, max_tokens=40, ignore_eos=True).token_ids == free
    assert speculative.totals["accepted_tokens"] > 0, "nothing was accepted: the test shows nothing"
    for stop in set(free):
        output = generate(speculative, prompt, max_tokens=40, ignore_eos=True, stop_token_ids=(stop,))
        assert output.token_ids == free[: free.index(stop) + 1]


def test_min_tokens_forbids_an_early_end(engine: Engine):
    free = generate(engine, PROMPT, ignore_eos=True).token_ids
    output = generate(engine, PROMPT, ignore_eos=True, stop_token_ids=(free[0],), min_tokens=6)
    assert len(output.token_ids) >= 6
    assert free[0] not in output.token_ids[:6]


def test_end_of_sequence_ends_the_output_unless_ignored(engine: Engine):
    engine.model.eos_token_ids = (generate(engine, PROMPT, ignore_eos=True).token_ids[3],)
    assert generate(engine, PROMPT).finish_reason == "stop"
    assert generate(engine, PROMPT, ignore_eos=True).finish_reason == "length"


@pytest.mark.parametrize("speculation", ["off", "ngram"])
def test_sampled_output_with_a_seed_repeats_whatever_else_is_in_the_batch(tiny_llama: Path, speculation: str):
    params = {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "seed": 11, "ignore_eos": True, "max_tokens": 30}
    alone = generate(make_engine(tiny_llama), PROMPT * 4, **params).token_ids
    engine = make_engine(tiny_llama, speculation=speculation, ngram_min=1)
    for index in range(5):
        engine.add_request(f"other{index}", [*PROMPT, index], SamplingParams(max_tokens=20, temperature=1.0))
    assert generate(engine, PROMPT * 4, **params).token_ids == alone


def test_logprobs_come_one_a_token_also_under_speculation(tiny_llama: Path):
    engine = make_engine(tiny_llama, speculation="ngram", ngram_min=1)
    engine.add_request("r", [5, 6, 7, 8] * 6, SamplingParams(max_tokens=20, ignore_eos=True, logprobs=2))
    entries: list[Any] = []
    while engine.has_unfinished():
        for output in engine.step():
            assert output.logprobs is not None
            entries += output.logprobs
            last = output
    assert [entry.token_id for entry in entries] == last.token_ids
    assert all(next(iter(entry.top)) == entry.token_id for entry in entries)  # greedy: the best is the chosen


def test_aborted_request_frees_its_blocks_at_once(engine: Engine):
    engine.add_request("r", PROMPT, SamplingParams(max_tokens=50))
    engine.step()
    output = engine.abort("r")
    assert output is not None
    assert output.finish_reason == "abort"
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks
    assert engine.abort("r") is None


@pytest.mark.parametrize(
    ("prompt", "params", "field"),
    [
        ([], {}, "prompt"),
        ([999], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([1], {"stop_token_ids": (257,), "min_tokens": 2}, "stop_token_ids"),
        ([1] * 512, {}, "prompt"),
        ([1] * 500, {"max_tokens": 100}, "max_tokens"),
    ],
)
def test_request_that_could_never_finish_is_refused(engine: Engine, prompt: list[int], params: Any, field: str):
    with pytest.raises(RequestError) as problem:
        engine.add_request("r", prompt, SamplingParams(**params))
    assert problem.value.field == field
    assert problem.value.remedy
    assert not engine.has_unfinished()


def test_prompt_longer_than_the_cache_is_refused_with_the_remedy(tiny_llama: Path):
    model = load_model(str(tiny_llama), dtype="float32", device="cpu")
    tight = engine_with_blocks(model, 3, max_num_seqs=1)
    with pytest.raises(RequestError, match="KV cache has 3 blocks") as problem:
        tight.add_request("r", [1] * 100, SamplingParams(max_tokens=4))
    assert "memory_limit_gib" in str(problem.value.remedy)


@pytest.mark.parametrize(
    ("kv_dtype", "planned"),
    [("model", "float32"), ("fp8", "fp8_per_token_head"), ("int8", "int8_per_token_head"), ("int4", "int4")],
)
def test_cache_that_is_allocated_is_the_cache_that_was_planned(tiny_llama: Path, kv_dtype: str, planned: str):
    from engine.capacity import CacheLayout, kv_bytes_per_block, kv_precision

    engine = make_engine(tiny_llama, kv_dtype=kv_dtype)
    status = take_status(engine)
    report = status.memory
    per_block = kv_bytes_per_block(engine.model.spec, CacheLayout(kv_precision(planned), block_size=4))
    assert report.kv_cache == engine.envelope.num_blocks * per_block
    assert status.model["kv_bytes_per_token"] == per_block // 4
    assert status.path["kv_cache"] == planned
    assert report.weights_at_load + report.activations + report.kv_cache <= report.limit


@pytest.mark.parametrize("weights", ["model", "int8", "int4", "w4a8", "w8a8", "fp8"])
@pytest.mark.parametrize("group_size", ["32", "64"])
def test_weights_take_the_bytes_that_the_planner_predicts(tiny_llama: Path, weights: str, group_size: str):
    engine = make_engine(tiny_llama, weights=weights, group_size=group_size)
    assert engine.model.weight_bytes() == sizing.predicted_weight_bytes(engine.model, engine.config)


@pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))
def test_the_record_says_which_layers_the_chosen_kernels_do_not_multiply(engine: Engine):
    assert "torch" not in path_of(engine)["linear_reason"]
    reconfigure(engine, {"weights": "fp8"})
    reason = path_of(engine)["linear_reason"]
    assert re.match(r"(\d+) of \1 layers \(fp8\) go through torch: the native kernels have no form", reason)
    reconfigure(engine, {"weights": "int8"})
    assert "torch" not in path_of(engine)["linear_reason"]


def test_weights_that_would_exceed_the_memory_limit_are_refused_and_nothing_changes(tiny_llama: Path):
    model = load_model(str(tiny_llama), dtype="float32", device="cpu")
    model.commit_weights(model.prepare_weights("int4", 32))
    engine = engine_with_blocks(model, 60, block_size=4, max_num_seqs=2, weights="int4")
    with pytest.raises(CapacityError) as problem:
        reconfigure(engine, {"weights": "model"})
    assert problem.value.field == "weights"
    assert "GiB" in str(problem.value)
    assert engine.config.weights == "int4"


def test_reconfigure_is_all_or_nothing(engine: Engine):
    before = engine.config
    with pytest.raises(ConfigError) as problem:
        reconfigure(engine, {"batching": "static", "token_budget": -3})
    assert problem.value.field == "token_budget"
    assert engine.config == before


@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"block_size": 8}, {"nonsense": 1}, {"max_running": 9}])
def test_knob_that_cannot_change_now_is_refused_by_name(engine: Engine, changes: dict[str, Any]):
    with pytest.raises(ConfigError) as problem:
        reconfigure(engine, changes)
    assert problem.value.field == next(iter(changes))
    assert problem.value.remedy


def test_reconfiguration_is_in_the_event_log_with_its_pause(engine: Engine):
    result = reconfigure(engine, {"batching": "static"})
    assert (result.tier, result.changed) == ("live", {"batching": ("continuous", "static")})
    event = engine.events[-1]
    assert event.kind == "reconfigure"
    assert "batching: continuous → static" in event.summary
    assert event.detail["pause_ms"] >= 0


def test_change_to_the_same_value_is_no_event(engine: Engine):
    count = len(engine.events)
    assert reconfigure(engine, {"batching": "continuous"}).tier == "none"
    assert len(engine.events) == count


def test_swapping_weights_keeps_requests_alive_and_swapping_back_is_bit_identical(tiny_llama: Path):
    engine = make_engine(tiny_llama)
    before = {name: tensor.clone() for name, tensor in all_weights(engine).items()}
    exact = generate(engine, PROMPT, max_tokens=40, ignore_eos=True).token_ids
    engine.add_request("in-flight", PROMPT, SamplingParams(max_tokens=40, ignore_eos=True))
    for weights in ("int4", "int8", "model"):
        for _ in range(4):
            engine.step()
        result = reconfigure(engine, {"weights": weights})
        assert result.tier == "swap"
        assert result.requests_in_flight == 1
    assert len(run(engine)["in-flight"].token_ids) == 40
    after = all_weights(engine)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # and nothing computed by the quantized weights is taken for the exact model's work
    assert generate(engine, PROMPT, max_tokens=40, ignore_eos=True).token_ids == exact


def test_prefix_of_the_old_weights_is_not_reused_by_the_new_ones(tiny_llama: Path):
    engine = make_engine(tiny_llama)
    prompt = list(range(40))
    generate(engine, prompt)
    reconfigure(engine, {"weights": "int8"})
    assert generate(engine, prompt).num_cached_tokens == 0
    assert generate(engine, prompt).num_cached_tokens > 0


def test_two_engines_live_in_one_process(tiny_llama: Path):
    first, second = make_engine(tiny_llama), make_engine(tiny_llama, batching="static", speculation="ngram")
    alone = generate(make_engine(tiny_llama), PROMPT, ignore_eos=True).token_ids
    for engine in (first, second):
        engine.add_request("same-id", PROMPT, SamplingParams(max_tokens=12, ignore_eos=True))
    while first.has_unfinished() or second.has_unfinished():
        outputs = [*first.step(), *second.step()]
        for output in outputs:
            if output.finished:
                assert output.token_ids == alone


def test_engines_with_different_knobs_step_in_turns_and_do_not_touch_each_other(tiny_llama: Path):
    knobs: list[dict[str, Any]] = [
        {"speculation": "ngram", "ngram_min": 1, "block_size": 8, "draft_control": "adaptive"},
        {"batching": "static", "token_budget": 5, "prefix_cache": False, "max_running": 2},
        {"attention": "reference", "chunked_prefill": False, "weights": "int8"},
    ]
    prompts = [[5, 6, 7, 8] * 3, PROMPT, [*PROMPT, 9, 9], [5, 6, 7, 8] * 5]

    def submit(engine: Engine) -> None:
        for index, prompt in enumerate(prompts):
            engine.add_request(str(index), prompt, SamplingParams(max_tokens=12 + index, ignore_eos=True))

    alone = []
    for chosen in knobs:
        engine = make_engine(tiny_llama, **chosen)
        submit(engine)
        alone.append({name: output.token_ids for name, output in run(engine).items()})
    assert alone[0] == alone[1] != alone[2], "the third has other weights"
    engines = [make_engine(tiny_llama, **chosen) for chosen in knobs]
    for engine in engines:
        submit(engine)
    together: list[dict[str, list[int]]] = [{} for _ in engines]
    while any(engine.has_unfinished() for engine in engines):
        for engine, results in zip(engines, together, strict=True):
            results.update({o.request_id: o.token_ids for o in engine.step() if o.finished})
            engine.check_invariants()
    assert together == alone


def test_fully_cached_prompt_recomputes_only_its_last_token_and_gives_the_same_output(engine: Engine):
    prompt = [*range(40), 3]
    first = generate(engine, prompt, max_tokens=20, ignore_eos=True)
    again = generate(engine, prompt, max_tokens=20, ignore_eos=True)
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 40)
    assert again.token_ids == first.token_ids


def test_prefix_that_ends_inside_a_block_is_copied_and_the_owner_of_the_block_keeps_its_own(tiny_llama: Path):
    engine, cold = make_engine(tiny_llama), make_engine(tiny_llama, prefix_cache=False)
    stem = list(range(30))
    prompts = {"a": [*stem, 200, 201, 202, 203], "b": [*stem, 210, 211], "c": [*stem[:27], 220], "d": [*stem, 200, 9]}
    expected = {
        name: generate(cold, prompt, max_tokens=20, ignore_eos=True).token_ids for name, prompt in prompts.items()
    }
    engine.add_request("a", prompts["a"], SamplingParams(max_tokens=20, ignore_eos=True))
    engine.step()
    for name in "bcd":  # while "a" goes on with the block that the others copy from
        engine.add_request(name, prompts[name], SamplingParams(max_tokens=20, ignore_eos=True))
    outputs = run(engine)
    assert {name: output.token_ids for name, output in outputs.items()} == expected
    assert {name: output.num_cached_tokens for name, output in outputs.items()} == {"a": 0, "b": 30, "c": 27, "d": 31}
    assert engine.totals["prefix_hit_tokens"] == 88


def test_outputs_keep_what_was_known_when_they_were_made(engine: Engine):
    engine.add_request("r", PROMPT, SamplingParams(max_tokens=10, ignore_eos=True))
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step()
    assert [len(output.token_ids) for output in outputs] == list(range(1, 11))
    assert all(output.prompt_token_ids == PROMPT for output in outputs)
    assert [output.text for output in outputs] == [
        "".join(earlier.new_text for earlier in outputs[: index + 1]) for index in range(10)
    ]


def test_after_full_acceptance_only_the_newest_token_lacks_keys_and_values(tiny_llama: Path):
    engine = make_engine(tiny_llama, speculation="ngram", ngram_min=1, draft_length=1)
    engine.add_request("r", [5, 6, 7, 8] * 6, SamplingParams(max_tokens=150, ignore_eos=True))
    (request,) = engine.scheduler.waiting
    all_accepted = 0
    while engine.has_unfinished():
        (output,) = engine.step()
        all_accepted += len(output.new_token_ids) == 2
        if not output.finished:
            assert request.num_computed_tokens == request.num_tokens - 1
    assert all_accepted > 0, "no draft was accepted whole: the test shows nothing"


def test_adaptive_drafts_change_no_token_and_what_they_cost_is_shown(tiny_llama: Path):
    prompt = [5, 6, 7, 8] * 6
    expected = generate(make_engine(tiny_llama), prompt, max_tokens=120, ignore_eos=True).token_ids
    engine = make_engine(tiny_llama, speculation="ngram", ngram_min=1, draft_control="adaptive")
    assert generate(engine, prompt, max_tokens=120, ignore_eos=True).token_ids == expected
    status = take_status(engine)
    assert status.speculation["drafts"] == status.totals["drafts"] > 0
    assert status.speculation["control"]["1"]["plain_ms"] > 0
    mean = status.speculation["mean_accepted_length"]
    assert mean == 1 + status.totals["accepted_tokens"] / status.totals["drafts"]


def test_preempted_request_that_returns_through_the_prefix_cache_continues_with_identical_tokens(tiny_llama: Path):
    """Its cached prefix covers output tokens too: the positions that it reads must stay within its block table."""
    model = load_model(str(tiny_llama), dtype="float32", device="cpu")
    roomy = engine_with_blocks(model, 200, block_size=4, max_num_seqs=4)
    tight = engine_with_blocks(model, 17, block_size=4, max_num_seqs=4)
    prompts = {name: [index * 20 + i for i in range(9)] for index, name in enumerate("abcd")}
    results = []
    for engine in (roomy, tight):
        for name, prompt in prompts.items():
            engine.add_request(name, prompt, SamplingParams(max_tokens=30, ignore_eos=True))
        results.append({name: output.token_ids for name, output in run(engine).items()})
    assert results[0] == results[1]
    assert tight.totals["preemptions"] > 0
    assert tight.totals["prefix_hit_tokens"] > 0


def test_steps_account_for_every_token(tiny_llama: Path):
    engine = make_engine(tiny_llama, token_budget=16, speculation="ngram", ngram_min=1, prefix_cache="off")
    prompts = [[i, 1, 2, 3, 1, 2, 3] * (i + 1) for i in range(4)]
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), prompt, SamplingParams(max_tokens=15, ignore_eos=True))
    finished = run(engine)
    steps = list(engine.steps)
    assert sum(step.output_tokens for step in steps) == sum(len(o.token_ids) for o in finished.values()) == 60
    assert sum(step.prefill_tokens for step in steps) == sum(map(len, prompts))
    assert sum(step.accepted_tokens for step in steps) == engine.totals["accepted_tokens"]
    assert all(step.prefill_tokens + step.decode_tokens + step.draft_tokens <= 16 for step in steps)


def test_scoring_a_text_gives_the_logits_of_the_model_and_leaves_the_cache_alone(engine: Engine):
    engine.add_request("r", PROMPT, SamplingParams(max_tokens=4, ignore_eos=True))
    engine.step()
    logits = engine.prompt_logits(PROMPT)
    assert logits.shape == (5, 257)
    output = run(engine)["r"]
    assert int(logits[-1].argmax()) == output.token_ids[0]
