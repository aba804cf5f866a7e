"""Models: finding and reading checkpoints, the decoder and its families, tokenizers, the default model."""

from engine.models.decoder import Decoder
from engine.models.default import fetch_default_model
from engine.models.loader import LoadedModel, load_model, resolve
from engine.models.tokenizer import load_tokenizer
from engine.models.weight_swap import PreparedWeights

__all__ = [
    "Decoder",
    "LoadedModel",
    "PreparedWeights",
    "fetch_default_model",
    "load_model",
    "load_tokenizer",
    "resolve",
]
