"""Capacity: pure functions from a model's shape and a GPU's memory to what fits. No torch, no I/O but bundled data."""

from engine.capacity.advice.curve import CurvePoint, concurrency_curve
from engine.capacity.advice.deployment import Deployment, deploy
from engine.capacity.advice.document import as_json, as_markdown, as_yaml, compare_documents, plan_document
from engine.capacity.advice.launch import launch_commands
from engine.capacity.advice.pareto import ParetoPoint, pareto
from engine.capacity.advice.remedies import Remedy, what_would_fit
from engine.capacity.advice.sensitivity import Swing, sensitivity
from engine.capacity.advice.solver import Goal, Solution, solve, solve_cached
from engine.capacity.hardware import Gpu, custom_gpu, find_gpu, gpus
from engine.capacity.memory.activation import activation_bytes
from engine.capacity.memory.budget import KVCacheSize, size_kv_cache
from engine.capacity.memory.formats import weight_format
from engine.capacity.memory.kv import compare_kv_formulas, kv_bytes_per_block, kv_bytes_per_sequence, kv_bytes_per_token
from engine.capacity.memory.parallel import possible_tp
from engine.capacity.memory.plan import Plan, plan, plan_from_names
from engine.capacity.memory.profiles import PROFILES, find_profile, profile_weight_format
from engine.capacity.memory.request import PlanRequest
from engine.capacity.memory.weights import ParameterCount, parameter_count, weight_bytes
from engine.capacity.model.catalog import model_config, model_names, model_spec
from engine.capacity.model.shape import SHAPE_FIELDS, spec_of_shape
from engine.capacity.model.spec import ModelSpec
from engine.capacity.speed.serving import OperatingPoint, Serving, serving
from engine.capacity.speed.workload import Objectives, Workload

__all__ = [
    "PROFILES",
    "SHAPE_FIELDS",
    "CurvePoint",
    "Deployment",
    "Goal",
    "Gpu",
    "KVCacheSize",
    "ModelSpec",
    "Objectives",
    "OperatingPoint",
    "ParameterCount",
    "ParetoPoint",
    "Plan",
    "PlanRequest",
    "Remedy",
    "Serving",
    "Solution",
    "Swing",
    "Workload",
    "activation_bytes",
    "as_json",
    "as_markdown",
    "as_yaml",
    "compare_documents",
    "compare_kv_formulas",
    "concurrency_curve",
    "custom_gpu",
    "deploy",
    "find_gpu",
    "find_profile",
    "gpus",
    "kv_bytes_per_block",
    "kv_bytes_per_sequence",
    "kv_bytes_per_token",
    "launch_commands",
    "model_config",
    "model_names",
    "model_spec",
    "parameter_count",
    "pareto",
    "plan",
    "plan_document",
    "plan_from_names",
    "possible_tp",
    "profile_weight_format",
    "sensitivity",
    "serving",
    "size_kv_cache",
    "solve",
    "solve_cached",
    "spec_of_shape",
    "weight_bytes",
    "weight_format",
    "what_would_fit",
]
