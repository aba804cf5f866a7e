"""Capacity: pure functions from a model's shape and a GPU's memory to what fits. No torch, no I/O but bundled data."""

from engine.capacity.activation import activation_bytes
from engine.capacity.budget import KVCacheSize, size_kv_cache
from engine.capacity.catalog import model_config, model_names, model_spec
from engine.capacity.curve import CurvePoint, concurrency_curve
from engine.capacity.formats import weight_format
from engine.capacity.hardware import Gpu, custom_gpu, find_gpu, gpus
from engine.capacity.kv import compare_kv_formulas, kv_bytes_per_block, kv_bytes_per_sequence, kv_bytes_per_token
from engine.capacity.parallel import possible_tp
from engine.capacity.plan import Plan, plan, plan_from_names
from engine.capacity.profiles import PROFILES, find_profile, profile_weight_format
from engine.capacity.remedies import Remedy, what_would_fit
from engine.capacity.request import PlanRequest
from engine.capacity.spec import ModelSpec
from engine.capacity.weights import ParameterCount, parameter_count, weight_bytes

__all__ = [
    "PROFILES",
    "CurvePoint",
    "Gpu",
    "KVCacheSize",
    "ModelSpec",
    "ParameterCount",
    "Plan",
    "PlanRequest",
    "Remedy",
    "activation_bytes",
    "compare_kv_formulas",
    "concurrency_curve",
    "custom_gpu",
    "find_gpu",
    "find_profile",
    "gpus",
    "kv_bytes_per_block",
    "kv_bytes_per_sequence",
    "kv_bytes_per_token",
    "model_config",
    "model_names",
    "model_spec",
    "parameter_count",
    "plan",
    "plan_from_names",
    "possible_tp",
    "profile_weight_format",
    "size_kv_cache",
    "weight_bytes",
    "weight_format",
    "what_would_fit",
]
