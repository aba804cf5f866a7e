"""The whole engine on the Triton path, interpreted: the tokens must be those of the torch path."""

import pytest

from engine.config import EngineConfig
from engine.core import Engine
from engine.models import load_model
from engine.sampling import SamplingParams

PROMPTS = [[(7 * request + position * position) % 250 for position in range(5 + 17 * request)] for request in range(4)]


@pytest.fixture(scope="module")
def model(tiny_llama):
    return load_model(str(tiny_llama), dtype="float32", device="cpu")


def generate(model, attention, speculation):
    """Greedy tokens of all prompts, prefilled in chunks and decoded in one batch, and the path on record."""
    knobs = {"attention": attention, "speculation": speculation, "dtype": "float32", "device": "cpu"}
    config = EngineConfig.from_mapping({**knobs, "token_budget": 24, "memory_limit_gib": 0.02, "draft_length": 3})
    engine = Engine(model, config)
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(str(index), prompt, SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
    tokens: dict[str, list[int]] = {}
    while engine.has_unfinished():
        for output in engine.step():
            tokens[output.request_id] = list(output.token_ids)
    return tokens, engine.status().path["attention"]


@pytest.mark.parametrize("speculation", ["off", "ngram"])
def test_engine_on_the_triton_path_generates_the_tokens_of_the_torch_path(model, speculation):
    expected, _ = generate(model, "sdpa", "off")
    tokens, path = generate(model, "triton", speculation)
    assert path == "triton (interpreter)"
    assert [len(tokens[str(index)]) for index in range(len(PROMPTS))] == [8] * len(PROMPTS)
    assert tokens == expected
