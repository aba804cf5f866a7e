"""A proposer from outside: one class and one registration, switched on while a request runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.batching.request import Request
from engine.config import EngineConfig, knob, schema
from engine.errors import ConfigError
from engine.speculation.proposers.base import Proposer
from engine.speculation.proposers.table import register_proposer
from engine.status import take_status
from tests.extending.steps import make_engine, tokens_of


class Echo(Proposer):
    """The last token again; every other time a token that is never right, for rejections."""

    def __init__(self) -> None:
        self.asked: dict[str, int] = {}

    def propose(self, request: Request, count: int) -> list[int]:
        turn = self.asked[request.request_id] = self.asked.get(request.request_id, 0) + 1
        return [request.token_ids[-1] if turn % 2 else 0] * count

    def forget(self, request_id: str) -> None:
        self.asked.pop(request_id, None)


@pytest.fixture
def registered() -> Iterator[str]:
    remove = register_proposer("echo", Echo)
    yield "echo"
    remove()


def test_a_registered_proposer_is_switched_on_mid_request_and_changes_no_token(tiny_llama: Path, registered: str):
    expected = tokens_of(make_engine(tiny_llama, draft_control="fixed"))
    engine = make_engine(tiny_llama, draft_control="fixed")
    assert tokens_of(engine, {4: {"speculation": registered}}) == expected
    status = take_status(engine)
    assert status.path["speculation"] == status.config["speculation"] == registered
    assert status.speculation["drafts"] > 0
    assert status.speculation["draft_tokens"] > status.speculation["accepted_tokens"]


def test_a_registered_proposer_is_offered_like_the_others_and_labelled_lossless(registered: str):
    offered = next(entry for entry in schema() if entry["name"] == "speculation")
    assert offered["choices"] == ("off", "ngram", registered)
    assert offered["lossless"] is True


def test_a_proposer_that_is_not_registered_any_more_is_refused_and_a_taken_name_too():
    register_proposer("echo", Echo)()
    with pytest.raises(ConfigError, match="echo"):
        EngineConfig.from_mapping({"speculation": "echo"})
    with pytest.raises(ConfigError, match="already has"):
        register_proposer("ngram", Echo)
    assert knob("speculation").choices == ("off", "ngram")
