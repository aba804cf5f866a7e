"""Workloads: definitions, validation, and the requests they expand to."""

from __future__ import annotations

import itertools
import json
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import WorkloadError
from engine.measure import WORKLOADS, Workload, expand, get_workload, workload_hash
from engine.measure.prompts import corpus_text, expand_warmup
from engine.measure.workloads import Lengths

NAMED = ("single", "burst-8", "burst-32", "mixed", "mixed-24", "shared-prefix", "nano", "repetitive", "quick")


def test_the_promised_workloads_are_there():
    assert set(NAMED) <= set(WORKLOADS)


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_survives_json_and_its_lengths_are_exact(name, tokenizer):
    workload = WORKLOADS[name]
    assert get_workload(json.loads(json.dumps(workload.to_dict()))) == workload
    requests = expand(workload, tokenizer, seed=3)
    assert [request.index for request in requests] == list(range(workload.num_requests))
    for request in requests:
        prompt_length = len(request.prompt_token_ids) - workload.shared_prefix_tokens
        assert workload.prompt_tokens.minimum <= prompt_length <= workload.prompt_tokens.maximum
        assert workload.output_tokens.minimum <= request.params.max_tokens <= workload.output_tokens.maximum
        assert len(request.prompt_token_ids) + request.params.max_tokens <= workload.longest_request
        assert all(0 <= token < len(tokenizer) for token in request.prompt_token_ids)


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_same_seed_gives_the_same_requests_and_another_seed_gives_others(name, tokenizer):
    hashes = [workload_hash(expand(WORKLOADS[name], tokenizer, seed)) for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_hash_of_a_workload_is_pinned_so_that_old_records_stay_comparable(tokenizer):
    random_prompts = get_workload({"base": "nano", "num_requests": 4})
    digest = workload_hash(expand(random_prompts, tokenizer, 0))
    assert digest == "50e77cfcca9f323c362ee0b5040426946fa8263a5fd605f511ba712b17c7a8d2"


def test_a_prompt_begins_as_the_tokenizer_begins_a_text_and_keeps_its_length(tokenizer):
    tokenizer.opening = [1]
    for name in ("quick", "shared-prefix", "repetitive"):
        workload = WORKLOADS[name]
        for request in expand(workload, tokenizer, 0):
            assert request.prompt_token_ids[0] == 1
            assert request.prompt_token_ids.count(1) == 1
            assert len(request.prompt_token_ids) <= workload.shared_prefix_tokens + workload.prompt_tokens.maximum


def test_corpus_prompts_are_text_and_no_two_begin_alike(tokenizer):
    requests = expand(get_workload("burst-32"), tokenizer, 0)
    text = tokenizer.encode(corpus_text() * 2, add_special_tokens=False)
    joined = "," + ",".join(map(str, text)) + ","
    for request in requests:
        assert "," + ",".join(map(str, request.prompt_token_ids)) + "," in joined
    assert len({tuple(request.prompt_token_ids[:16]) for request in requests}) == len(requests)


def test_shared_prefix_requests_share_exactly_the_prefix(tokenizer):
    workload = get_workload("shared-prefix")
    prompts = [request.prompt_token_ids for request in expand(workload, tokenizer, 0)]
    assert len({tuple(prompt[: workload.shared_prefix_tokens]) for prompt in prompts}) == 1
    assert len({tuple(prompt[: workload.shared_prefix_tokens + 12]) for prompt in prompts}) == len(prompts)


def test_repetitive_prompts_contain_the_beginning_of_their_own_continuation(tokenizer):
    for request in expand(get_workload("repetitive"), tokenizer, 0):
        ending = request.prompt_token_ids[-8:]
        body = request.prompt_token_ids[:-8]
        assert any(body[i : i + 8] == ending for i in range(len(body)))


def test_random_prompts_avoid_special_tokens(tokenizer):
    drawn = {token for request in expand(get_workload("nano"), tokenizer, 0) for token in request.prompt_token_ids}
    assert not drawn & set(tokenizer.all_special_ids)
    assert len(drawn) > 200


def test_poisson_arrivals_have_the_rate_that_was_asked_for(tokenizer):
    workload = get_workload(
        {"base": "quick", "num_requests": 2000, "arrival": {"kind": "poisson", "rate_requests_s": 5.0}}
    )
    arrivals = [request.arrival_s for request in expand(workload, tokenizer, 0)]
    gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    assert arrivals[0] == 0.0
    assert min(gaps) > 0
    # mean of 2000 exponential gaps: standard error 2.2 %; their deviation equals their mean
    assert statistics.fmean(gaps) == pytest.approx(0.2, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.15)


@settings(deadline=None)  # a shared machine pauses now and then
@given(
    st.sampled_from(["uniform", "log-uniform"]),
    st.integers(1, 5000),
    st.integers(0, 5000),
    st.floats(0, 1, exclude_max=True),
)
def test_a_drawn_length_lies_within_its_bounds(kind, minimum, width, quantile):
    lengths = Lengths(kind, minimum, minimum + width)
    assert minimum <= lengths.draw(quantile) <= minimum + width
    assert lengths.draw(0.0) == minimum
    assert lengths.draw(1 - 1e-12) == minimum + width


def test_log_uniform_lengths_give_each_octave_the_same_share():
    lengths = Lengths("log-uniform", 16, 511)
    drawn = [lengths.draw((i + 0.5) / 10_000) for i in range(10_000)]
    shares = [sum(16 * 2**k <= length < 32 * 2**k for length in drawn) / 10_000 for k in range(5)]
    assert shares == pytest.approx([0.2] * 5, abs=0.001)


def test_the_warm_up_is_short_and_uses_other_prompts(tokenizer):
    workload = get_workload("burst-8")
    warmup = expand_warmup(workload, tokenizer, 0)
    prompts = {tuple(request.prompt_token_ids) for request in expand(workload, tokenizer, 0)}
    assert len(warmup) == workload.warmup_requests
    assert all(request.params.max_tokens <= 16 for request in warmup)
    assert not prompts & {tuple(request.prompt_token_ids) for request in warmup}
    assert expand_warmup(get_workload({"base": "quick", "warmup_requests": 0}), tokenizer, 0) == []


@pytest.mark.parametrize(
    ("definition", "field"),
    [
        ("burst8", "workload"),
        ("nowhere.json", "workload"),
        ({"base": "burst-7"}, "workload"),
        ({"num_requests": 3, "prompt_tokens": 5}, "output_tokens"),
        ({"base": "quick", "promt_tokens": 5}, "promt_tokens"),
        ({"base": "quick", "num_requests": 0}, "num_requests"),
        ({"base": "quick", "num_requests": 2.5}, "num_requests"),
        ({"base": "quick", "num_requests": True}, "num_requests"),
        ({"base": "quick", "prompt_tokens": "long"}, "prompt_tokens"),
        ({"base": "quick", "prompt_tokens": {"kind": "uniform", "minimum": 9, "maximum": 3}}, "prompt_tokens.maximum"),
        ({"base": "quick", "prompt_tokens": {"kind": "uniform", "minimum": 9}}, "prompt_tokens.maximum"),
        ({"base": "quick", "output_tokens": {"kind": "normal", "minimum": 1, "maximum": 3}}, "output_tokens.kind"),
        ({"base": "quick", "arrival": "poisson"}, "arrival"),
        ({"base": "quick", "arrival": {"kind": "poisson", "rate_requests_s": -1}}, "arrival.rate_requests_s"),
        ({"base": "quick", "arrival": {"kind": "closed-loop"}}, "arrival.concurrency"),
        ({"base": "quick", "arrival": {"kind": "all-at-once", "concurrency": 2}}, "arrival.concurrency"),
        ({"base": "quick", "temperature": float("nan")}, "temperature"),
        ({"base": "quick", "top_p": 0}, "top_p"),
        ({"base": "quick", "prompt_source": "wikipedia"}, "prompt_source"),
        ({"base": "quick", "ignore_eos": "yes"}, "ignore_eos"),
        ({"base": "quick", "slo": {"ttft_ms": -3}}, "slo.ttft_ms"),
        ({"base": "quick", "slo": 5}, "slo"),
        ({"base": "quick", "name": ""}, "name"),
    ],
)
def test_a_definition_that_cannot_run_is_refused_by_field_with_a_remedy(definition, field):
    with pytest.raises(WorkloadError) as caught:
        get_workload(definition)
    assert caught.value.field == field
    assert caught.value.remedy


def test_a_passage_that_does_not_fit_is_refused_with_the_shortest_that_does(tokenizer):
    too_short = get_workload({"base": "repetitive", "prompt_tokens": 20})
    with pytest.raises(WorkloadError) as caught:
        expand(too_short, tokenizer, 0)
    shortest = int("".join(filter(str.isdigit, caught.value.remedy or "")))
    expand(get_workload({"base": "repetitive", "prompt_tokens": shortest}), tokenizer, 0)


def test_a_workload_file_works_like_a_named_workload(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"base": "quick", "name": "mine", "num_requests": 2}))
    assert get_workload(str(path)) == Workload.from_mapping({"base": "quick", "name": "mine", "num_requests": 2})
    path.write_text("{")
    with pytest.raises(WorkloadError, match="cannot be read"):
        get_workload(str(path))
