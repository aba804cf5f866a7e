"""A step on a GPU: everything on the model's device, one wait, and the tokens of the CPU."""

from __future__ import annotations

import pytest
import torch

from engine.status import path_of
from tests.family_cases import FALLBACKS, FAMILIES
from tests.rehearsal.rehearsal import KINDS, NAMED_WAITS, TORCH_SAMPLER, load, on_the_cpu, rehearse, requests
from tests.support import engine_with_blocks

pytestmark = pytest.mark.slow

MIXTURES = [name for name in FAMILIES if "mixtral" in name or "moe" in name]


@pytest.mark.parametrize(
    ("attention", "execution"),
    [("triton", "eager"), ("triton", "fused"), ("triton", "graphs"), ("sdpa", "eager"), ("reference", "eager")],
)
def test_every_attention_path_and_execution_gives_the_tokens_of_the_cpu(
    attention, execution, tiny_llama, runtime, simulation
):
    asked = requests()
    engine = load(tiny_llama, attention=attention, execution=execution)
    allowed = {"reference": ["paged_attention_reference"], "sdpa": ["sdpa"]}.get(attention, [])
    assert rehearse(engine, simulation, asked, allowed) == on_the_cpu(tiny_llama, asked)


def test_a_model_on_a_gpu_takes_the_triton_kernels_by_itself(tiny_llama, runtime, simulation):
    path = path_of(load(tiny_llama, dtype="auto"))
    assert (path["device"], path["dtype"]) == ("cuda:1", "bfloat16")
    assert (path["attention"], path["sampling"], path["execution"]) == ("triton", "triton", "fused")
    assert path["linear_reason"].startswith("compiled for sm_90")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_fused_with_one_wait_a_step(family, folders, runtime, simulation):
    asked = requests()
    engine = load(folders[family], execution="fused")
    assert rehearse(engine, simulation, asked) == on_the_cpu(folders[family], asked)
    assert path_of(engine)["execution"] == "fused"


@pytest.mark.parametrize("family", ["gemma3, untied, soft cap, scaled", "qwen3 moe", "phi3, part of a head rotated"])
@pytest.mark.parametrize("attention", ["triton", "sdpa"])
def test_eager_execution_gives_the_tokens_of_the_cpu(family, attention, folders, runtime, simulation):
    asked = requests(["greedy", "greedy"], max_tokens=3)
    engine = load(folders[family], execution="eager", attention=attention)
    allowed = [*(["forward"] if family in MIXTURES else []), *(["sdpa"] if attention == "sdpa" else [])]
    assert rehearse(engine, simulation, asked, allowed) == on_the_cpu(folders[family], asked)


@pytest.mark.parametrize("family", FALLBACKS)
def test_a_model_of_transformers_waits_once_a_step_too(family, folders, runtime, simulation):
    asked = requests(["greedy", "greedy"], max_tokens=3)
    # torch's grouped product, through which transformers runs experts, is said to take bfloat16 alone on a GPU
    dtype = "bfloat16" if family == "olmoe" else "float32"
    engine = load(folders[family], dtype=dtype)
    assert rehearse(engine, simulation, asked) == on_the_cpu(folders[family], asked, dtype=dtype)


@pytest.mark.parametrize("linear", ["triton", "torch"])
@pytest.mark.parametrize("weights", ["model", "int8", "int4", "w4a8", "w8a8", "fp8"])
def test_every_weight_format_runs_in_every_execution(weights, linear, tiny_llama, runtime, simulation):
    asked = requests(["greedy", "top-k"], max_tokens=3)
    tokens = []
    for execution, head in (("eager", "model"), ("fused", "int8"), ("graphs", "int8")):
        knobs = {"weights": weights, "head_weights": head, "linear": linear, "execution": execution}
        tokens.append(rehearse(load(tiny_llama, dtype="bfloat16", **knobs), simulation, asked))
    assert tokens[1] == tokens[2]


@pytest.mark.parametrize("attention", ["triton", "sdpa", "reference"])
@pytest.mark.parametrize("kv_dtype", ["model", "fp8", "int8", "int4"])
def test_every_cache_format_gives_the_tokens_of_the_cpu(kv_dtype, attention, tiny_llama, runtime, simulation):
    asked = requests(["greedy", "greedy"], max_tokens=3)
    allowed = {"reference": ["paged_attention_reference"], "sdpa": ["sdpa"]}.get(attention, [])
    engine = load(tiny_llama, kv_dtype=kv_dtype, attention=attention)
    assert rehearse(engine, simulation, asked, allowed) == on_the_cpu(tiny_llama, asked, kv_dtype=kv_dtype)


def test_the_sampler_takes_every_kind_of_row_with_one_wait(tiny_llama, runtime, simulation):
    kinds = [kind for kind in KINDS if not kind.startswith("log-")]
    asked = requests(kinds)
    assert rehearse(load(tiny_llama), simulation, asked) == on_the_cpu(tiny_llama, asked)


def test_log_probabilities_cost_one_more_wait_whoever_asks(tiny_llama, runtime, simulation):
    asked = requests(["greedy", "log-probabilities", "log-probability", "log-probabilities"])
    engine = load(tiny_llama)
    assert rehearse(engine, simulation, asked, ["logprobs_of"]) == on_the_cpu(tiny_llama, asked)
    for index, prompt in enumerate(asked.prompts):
        engine.add_request(str(index), prompt, asked.params[index])
    simulation.taken()
    engine.step()
    waits = [event.site.function for event in simulation.taken() if event.kind == "wait"]
    assert sorted(waits) == ["logprobs_of", "sample_on_device"]


def test_the_sampler_of_torch_waits_where_the_table_says(tiny_llama, runtime, simulation):
    asked = requests([*KINDS][:5])
    assert rehearse(load(tiny_llama, sampling="torch"), simulation, asked, TORCH_SAMPLER) == on_the_cpu(
        tiny_llama, asked
    )


def test_drafts_are_verified_with_one_wait(tiny_llama, runtime, simulation):
    asked = requests(["greedy", "top-p"], max_tokens=12)
    asked.prompts[:] = [[5, 6, 7, 8] * 4, [9, 3, 9, 3, 9, 3]]
    engine = load(tiny_llama, speculation="ngram", ngram_min=1, draft_control="fixed")
    assert rehearse(engine, simulation, asked) == on_the_cpu(tiny_llama, asked)
    assert engine.totals["draft_tokens"] > 0


def test_preempted_requests_come_back_with_the_tokens_of_the_cpu(tiny_llama, runtime, simulation):
    asked = requests(["greedy", "greedy", "top-k"], max_tokens=20)
    tight = engine_with_blocks(load(tiny_llama).model, 17, block_size=4, max_num_seqs=4, token_budget=24)
    assert rehearse(tight, simulation, asked) == on_the_cpu(tiny_llama, asked)
    assert tight.totals["preemptions"] > 0


def test_a_prefix_inside_a_block_is_copied_on_the_device(tiny_llama, runtime, simulation):
    engine = load(tiny_llama)
    asked, again = requests(["greedy"]), requests(["greedy"])
    asked.prompts[:] = [list(range(40))]
    again.prompts[:] = [[*range(30), 7, 7]]
    rehearse(engine, simulation, asked)
    assert rehearse(engine, simulation, again) == on_the_cpu(tiny_llama, again)
    assert engine.totals["prefix_hit_tokens"] == 30


def test_the_logits_of_a_text_are_those_of_the_cpu(tiny_llama, runtime, simulation):
    text = list(range(20))
    expected = load(tiny_llama, device="cpu", attention="sdpa", linear="torch").prompt_logits(text)
    torch.testing.assert_close(load(tiny_llama, execution="fused").prompt_logits(text).cpu(), expected)
    assert simulation.made_on == {1}


def test_a_chunk_without_tokens_waits_for_nothing(tiny_llama, runtime, simulation):
    engine = load(tiny_llama, execution="eager")
    engine.add_request("0", list(range(60)), requests(["greedy"]).params[0])
    simulation.taken()
    engine.step()
    assert engine.steps[-1].output_tokens == 0
    assert [event for event in simulation.taken() if event.kind == "wait"] == []


def test_every_named_wait_says_why():
    assert all(len(reason) > 8 for reason in NAMED_WAITS.values())
