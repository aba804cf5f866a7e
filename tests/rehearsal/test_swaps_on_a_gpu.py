"""What changes while an engine on a GPU serves: weights, the cache's format, attention, execution; graphs, warm-up."""

from __future__ import annotations

import pytest
import torch

from engine.device import available_memory
from engine.errors import CapacityError, ConfigError
from engine.measure import provenance
from engine.models.loader import resolve_device, resolve_dtype
from engine.reconfigure import reconfigure
from engine.status import path_of, take_status
from engine.telemetry.gpu import gpu_uuid
from tests.rehearsal.rehearsal import add, check_step, load, on_the_cpu, rehearse, requests, serve, take, warmed_up

pytestmark = pytest.mark.slow

FORMATS = ["int8", "w4a8", "fp8", "int4", "w8a8", "model"]


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
@pytest.mark.parametrize("execution", ["eager", "fused", "graphs"])
def test_weights_are_swapped_under_requests_and_land_on_their_own_gpu(
    device, execution, tiny_llama, runtime, simulation
):
    engine = load(tiny_llama, device=device, dtype="bfloat16", execution=execution)
    asked, tokens = requests(["greedy", "top-k", "greedy"], max_tokens=14), {}
    add(engine, asked)
    for weights in FORMATS:
        reconfigure(engine, {"weights": weights, "head_weights": "model" if weights == "model" else "int8"})
        for _ in range(2):
            simulation.taken()
            take(tokens, engine)
            check_step(simulation.taken(), [], sampled=engine.steps[-1].output_tokens > 0)
        assert path_of(engine)["weights"].startswith(weights.replace("-", " "))
    while engine.has_unfinished():
        take(tokens, engine)
    assert [len(tokens[str(index)]) for index in range(3)] == [14] * 3
    assert simulation.made_on == {torch.device(device).index}


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_the_format_of_the_cache_is_swapped_under_requests(device, tiny_llama, runtime, simulation):
    engine = load(tiny_llama, device=device, execution="fused")
    asked, tokens = requests(["greedy", "greedy"], max_tokens=12), {}
    expected = on_the_cpu(tiny_llama, asked)
    add(engine, asked)
    for kv_dtype, attention in (("int8", "triton"), ("int4", "sdpa"), ("fp8", "triton"), ("model", "triton")):
        execution = "fused" if attention == "triton" else "auto"
        reconfigure(engine, {"kv_dtype": kv_dtype, "attention": attention, "execution": execution})
        simulation.taken()
        take(tokens, engine)
        check_step(simulation.taken(), ["sdpa"], sampled=engine.steps[-1].output_tokens > 0)
    while engine.has_unfinished():
        take(tokens, engine)
    assert [len(tokens[str(index)]) for index in range(2)] == [12] * 2
    assert simulation.made_on == {torch.device(device).index}
    assert serve(engine, asked) == expected  # back in the model's own format


def test_memory_that_torch_keeps_in_reserve_counts_as_free(tiny_llama, runtime, simulation):
    engine = load(tiny_llama, dtype="bfloat16")
    runtime.free_bytes, runtime.reserved_bytes = 1000, 0
    with pytest.raises(CapacityError, match="the new weights need"):
        reconfigure(engine, {"weights": "int8"})
    runtime.reserved_bytes = 2**20
    assert available_memory(engine.model.device) == 1000 + 2**20
    reconfigure(engine, {"weights": "int8"})


def test_every_bucket_is_captured_and_serves_with_padding(tiny_llama, runtime, simulation):
    engine = warmed_up(load(tiny_llama, execution="graphs", max_num_seqs=6))
    assert take_status(engine).execution["failed"] == []
    simulation.taken()
    asked = requests(["greedy", "top-k", "greedy"])
    assert rehearse(engine, simulation, asked) == on_the_cpu(tiny_llama, asked)
    assert take_status(engine).execution["last"] == "graphs"


def test_what_reads_back_cannot_be_captured_and_serves_eagerly(folders, runtime, simulation):
    """Quantized experts: one product for each, their counts known on the host."""
    engine = warmed_up(load(folders["mixtral"], execution="graphs", weights="int8", max_num_seqs=2))
    failed = take_status(engine).execution["failed"]
    assert failed
    assert all("while a graph is captured" in row["error"] for row in failed)
    rehearse(engine, simulation, requests(["greedy"]), ["forward"])


@pytest.mark.parametrize("head_weights", ["model", "int8"])
def test_after_the_warm_up_nothing_is_compiled_the_sampler_and_the_head_included(
    head_weights, tiny_llama, runtime, simulation
):
    engine = warmed_up(load(tiny_llama, execution="fused", weights="w8a8", head_weights=head_weights, max_model_len=96))
    assert engine.events[-1].summary.startswith("kernels ready")
    warm = set(runtime.compiled)
    assert {"_adjust_kernel", "_survey_kernel", "_sample_kernel"} <= {kernel for kernel, *_ in warm}
    for kinds in (["greedy", "top-k"], ["penalty", "no end before", "min-p"], ["penalty, sampled"]):
        rehearse(engine, simulation, requests(kinds))
    assert {kernel for kernel, *_ in runtime.compiled - warm} == set()


def test_a_second_round_of_other_sizes_compiles_nothing(folders, runtime, simulation):
    kinds = ["greedy", "top-k", "penalty", "no end before"]
    engine = warmed_up(
        load(folders["gemma3"], execution="fused", weights="w8a8", head_weights="int8", max_model_len=128)
    )
    for count in (1, 2, 4):
        serve(engine, requests(kinds[:count]))
    known = set(runtime.compiled)
    for count in (3, 1):
        serve(engine, requests(kinds[-count:], max_tokens=7))
    assert runtime.compiled - known == set()


# -- which GPU ---------------------------------------------------------------------------------------------------------


def test_a_gpu_is_named_with_its_number(runtime, simulation):
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", 0)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="invalid device ordinal"):
        resolve_device("cuda:2")


@pytest.mark.parametrize(("capability", "dtype"), [((9, 0), torch.bfloat16), ((7, 5), torch.float16)])
def test_the_automatic_dtype_is_one_that_the_gpu_has_instructions_for(capability, dtype, runtime, simulation):
    runtime.compute_capability = capability
    assert resolve_dtype("auto", torch.device("cuda", 1)) == dtype


def test_an_old_gpu_runs_torchs_own_operators_and_says_why(tiny_llama, runtime, simulation):
    runtime.compute_capability = (7, 5)
    asked = requests(["greedy", "greedy"])
    engine = load(tiny_llama)
    path = path_of(engine)
    assert (path["attention"], path["sampling"], path["execution"]) == ("sdpa", "torch", "eager")
    assert "needs compute capability 8.0" in path["attention_reason"]
    assert rehearse(engine, simulation, asked, ["sdpa"]) == on_the_cpu(tiny_llama, asked)


def test_the_record_has_the_gpus_and_telemetry_knows_the_engines_own(runtime, simulation):
    gpus = provenance._hardware.__wrapped__()["gpus"]  # not what is remembered for the process
    assert [gpu["name"] for gpu in gpus] == ["Simulated GPU"] * 2
    assert gpu_uuid(torch.device("cuda", 1)) == "GPU-simulated-1"
