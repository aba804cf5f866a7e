"""Public functions that no product code calls yet, each with the feature that will: the list in ``README.md``.

Their tests carry the marker ``waiting`` and run with ``make test-waiting``, not with every run of the suite. Whoever
builds the feature takes the row away, and the marker from its tests. What no feature is waiting for is deleted.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Waiting:
    """Functions of one module and the feature that will call them.

    Attributes:
        module: e.g. ``"kernels.verification"``.
        names: its public functions that nothing calls.
        feature: what will call them.
    """

    module: str
    names: tuple[str, ...]
    feature: str


WAITING = (
    Waiting(
        "kernels.attention_mass",
        ("attention_mass_reference", "attention_mass_triton"),
        "KV policies that score positions by their attention (`kv_policy=snapkv`, `h2o`)",
    ),
    Waiting(
        "kernels.verification",
        ("verify_reference", "verify_stochastic_reference", "verify_stochastic_triton", "verify_triton"),
        "speculation by draft models on the GPU (`speculation=draft`, `head`)",
    ),
    Waiting(
        "kernels.weight_only_packing",
        ("pack_nf4",),
        "checkpoints multiplied as they are stored (`weights=stored`), those of bitsandbytes in NF4",
    ),
    Waiting(
        "engine.models.weight_swap",
        ("measure_errors",),
        "weight methods that report each layer's error (`weight_method=gptq`, `awq`, `hqq`)",
    ),
    Waiting(
        "engine.quantization.error",
        ("QuantizationError", "quantization_error"),
        "weight methods that report each layer's error (`weight_method=gptq`, `awq`, `hqq`)",
    ),
)


def waiting_files() -> tuple[str, ...]:
    """Files of this folder none of whose kernels is called yet, by name."""
    return ("attention_mass", "verification")
