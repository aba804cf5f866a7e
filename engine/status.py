"""What really runs: the path of every choice with its reason, a picture of the engine for people, one for its clients.

Called in the stepping thread, between two steps.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from engine import sizing
from engine.batching.admission import Admission
from engine.config import EngineConfig
from engine.core import Engine
from engine.device import on_device
from engine.outputs import EngineStatus
from engine.reconfigure import cache_on_offer
from kernels.dispatch import Op, choose

if TYPE_CHECKING:
    from engine.models import LoadedModel


@dataclasses.dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """What any thread may know of an engine that another thread steps. Immutable; a newer one takes its place.

    Attributes:
        model_name: of the loaded model.
        device: where it computes.
        tokenizer: of the model; encoding and decoding change nothing of it.
        vocab_size: token ids are below it.
        config: the knobs.
        admission: what a request is checked against; the envelope is there.
    """

    model_name: str
    device: torch.device
    tokenizer: Any
    vocab_size: int
    config: EngineConfig
    admission: Admission

    @property
    def max_model_len(self) -> int:
        """Tokens that one request may hold."""
        return self.admission.envelope.max_model_len

    def shows(self, engine: Engine) -> bool:
        """True while nothing of it has changed."""
        return self.config is engine.config and self.admission is engine.admission


def take_snapshot(engine: Engine) -> EngineSnapshot:
    """What is true of the engine now."""
    model = engine.model
    return EngineSnapshot(
        model.name, model.device, model.tokenizer, model.decoder.vocab_size, engine.config, engine.admission
    )


def take_status(engine: Engine) -> EngineStatus:
    """A consistent picture between two steps."""
    model, config = engine.model, engine.config
    with on_device(model.device):
        engine.executor.poll()  # an idle engine takes no steps, and what is prepared should show
    offer = cache_on_offer(engine)
    return EngineStatus(
        model=sizing.describe_model(model, config),
        config=config.to_dict(),
        config_hash=config.hash(),
        path=path_of(engine),
        memory=sizing.memory_report(model, engine.envelope, engine.cache),
        block_size=config.block_size,
        num_blocks=engine.envelope.num_blocks,
        max_model_len=engine.envelope.max_model_len,
        blocks=engine.scheduler.pool.block_states(),
        running=len(engine.scheduler.running),
        waiting=engine.scheduler.num_waiting,
        totals=dict(engine.totals),
        resize=None if offer is None else dataclasses.asdict(offer),
        execution=engine.executor.status(),
        speculation=engine.drafting.to_dict(),
    )


def path_of(engine: Engine) -> dict[str, str]:
    """What really runs and why these kernels and not quicker ones, for the record of every run."""
    model, config, kernels = engine.model, engine.config, engine.kernels
    return {
        "device": str(model.device),
        "decoder": model.decoder_path(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": kernels.attention_path,
        "weights": model.weights_path(),
        "kv_cache": sizing.kv_format_name(config, model.dtype),
        "execution": engine.executor.path(),
        "sampling": kernels.sampling_path,
        "speculation": config.speculation,
        "threads": str(torch.get_num_threads()),
        **_reasons(model, config),
    }


def _reasons(model: LoadedModel, config: EngineConfig) -> dict[str, str]:
    """What the dispatcher says of each choice of kernels, by the knob that asked."""
    asked: dict[str, tuple[Op, str]] = {
        "attention": ("paged_attention", config.attention),
        "linear": ("linear", config.linear if model.decoder.swaps_weights else "torch"),
        "sampling": ("sample", config.sampling),
    }
    heads = {"attention": model.decoder.head_dim}
    reasons = {
        f"{name}_reason": choose(op, value, device=model.device, dtype=model.dtype, head_dim=heads.get(name)).reason
        for name, (op, value) in asked.items()
    }
    reasons["linear_reason"] = " ".join(filter(None, [model.left_to_torch(), reasons["linear_reason"]]))
    return reasons
