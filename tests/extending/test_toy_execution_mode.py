"""An execution mode from outside: one class and one registration, switched on while a request runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.attention.base import AttentionBackend
from engine.config import knob, schema
from engine.core import Engine
from engine.errors import ConfigError
from engine.execution.base import Decision, Progress, Step
from engine.execution.environment import ExecutionEnvironment, Kernels, Unsupported
from engine.execution.mode import ExecutionMode
from engine.execution.modes import register_mode
from engine.reconfigure import reconfigure
from engine.status import path_of, take_status
from tests.extending import steps
from tests.extending.steps import tokens_of

PIECES = 3


class Patient(ExecutionMode):
    """Eager, after preparing three pieces between steps."""

    name = "patient"
    steps = 0
    done = 0

    @classmethod
    def unsupported_reason(cls, environment: ExecutionEnvironment, kernels: Kernels) -> Unsupported | None:
        if kernels.attention == "reference":
            return Unsupported("it has no patience with attention=reference.", "Set attention to sdpa.")
        return None

    def prepare(self, attention: AttentionBackend) -> None:
        self.done = 0

    def poll(self) -> None:
        self.done = min(self.done + 1, PIECES)

    @property
    def has_work(self) -> bool:
        return self.done < PIECES

    def progress(self) -> Progress:
        return Progress(self.done, PIECES, f"piece {self.done + 1}")

    def decide(self, step: Step) -> Decision:
        return Decision(self, "it waited long enough" if self.done == PIECES else "still thinking")

    def forward(self, step: Step) -> torch.Tensor:
        Patient.steps += 1
        hidden: torch.Tensor = self.environment.decoder(step.token_ids, step.positions, self.environment.context.attend)
        return hidden


@pytest.fixture
def registered() -> Iterator[str]:
    Patient.steps = 0
    remove = register_mode("patient", Patient)
    yield "patient"
    remove()


def make_engine(folder: Path, **knobs: object) -> Engine:
    return steps.make_engine(folder, **{"execution": "eager", "attention": "sdpa"} | knobs)


def test_a_registered_mode_is_switched_on_and_off_mid_request_and_changes_no_token(tiny_llama: Path, registered: str):
    expected = tokens_of(make_engine(tiny_llama))
    engine = make_engine(tiny_llama)
    assert tokens_of(engine, {4: {"execution": registered}, 9: {"execution": "eager"}}) == expected
    assert [step.execution for step in engine.steps][:10] == ["eager"] * 4 + ["patient"] * 5 + ["eager"]
    assert Patient.steps == 5


def test_status_path_and_reason_name_the_registered_mode(tiny_llama: Path, registered: str):
    engine = make_engine(tiny_llama, execution=registered)
    status = take_status(engine).execution
    assert (status["asked"], status["prepared"], status["failed"]) == ("patient", [], [])
    preparing = status["preparing"]
    assert (preparing["done"], preparing["total"], preparing["current"]) == (1, PIECES, "piece 2")
    assert engine.has_preparation()
    tokens_of(engine)
    status = take_status(engine).execution
    assert (status["last"], status["reason"], status["preparing"]) == ("patient", "it waited long enough", None)
    assert path_of(engine)["execution"] == "patient"


def test_other_weights_make_the_registered_mode_prepare_again(tiny_llama: Path, registered: str):
    engine = make_engine(tiny_llama, execution=registered)
    tokens_of(engine)
    assert take_status(engine).execution["preparing"] is None
    reconfigure(engine, {"weights": "int8"})
    assert take_status(engine).execution["preparing"]["done"] == 1
    reconfigure(engine, {"weights": "model"})
    assert tokens_of(engine) == tokens_of(make_engine(tiny_llama))


def test_where_the_registered_mode_is_unsupported_it_is_refused_with_its_own_remedy(tiny_llama: Path, registered: str):
    engine = make_engine(tiny_llama)
    with pytest.raises(ConfigError) as refused:
        reconfigure(engine, {"execution": registered, "attention": "reference"})
    assert refused.value.field == "execution"
    assert refused.value.message == "'patient' execution cannot run here: it has no patience with attention=reference."
    assert refused.value.remedy == "Set attention to sdpa."
    assert engine.config.execution == "eager"


def test_the_registered_mode_is_offered_like_the_others_until_it_is_taken_away(tiny_llama: Path):
    remove = register_mode("patient", Patient)
    try:
        offered = next(entry for entry in schema() if entry["name"] == "execution")
        assert "patient" in offered["choices"]
        with pytest.raises(ConfigError):
            register_mode("patient", Patient)
    finally:
        remove()
    assert "patient" not in knob("execution").choices
    with pytest.raises(ConfigError):
        make_engine(tiny_llama, execution="patient")


def test_a_mode_that_calls_itself_by_another_name_is_not_registered():
    with pytest.raises(ValueError, match="calls itself 'patient'"):
        register_mode("impatient", Patient)
    assert "impatient" not in knob("execution").choices
