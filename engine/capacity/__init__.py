"""Capacity: pure functions from a model's shape and a GPU's memory to what fits. No torch, no I/O but bundled data."""

from engine.capacity.advice.curve import CurvePoint, concurrency_curve
from engine.capacity.advice.deployment import Deployment, deploy
from engine.capacity.advice.document import as_json, as_markdown, as_yaml, compare_documents, plan_document
from engine.capacity.advice.launch import launch_commands
from engine.capacity.advice.pareto import ParetoPoint, pareto
from engine.capacity.advice.remedies import Remedy, what_would_fit
from engine.capacity.advice.sensitivity import Swing, sensitivity
from engine.capacity.advice.solver import Goal, Solution, solve, solve_cached
from engine.capacity.formats import (
    ComputeDtype,
    KVPrecision,
    WeightPrecision,
    compute_dtype,
    kv_precision,
    weight_precision,
)
from engine.capacity.hardware import Gpu, custom_gpu, find_gpu, gpus
from engine.capacity.memory.activation import activation_bytes
from engine.capacity.memory.budget import MemoryBudget, check_holds_a_block, memory_budget
from engine.capacity.memory.kv import CacheLayout, kv_bytes_per_block, kv_bytes_per_sequence, kv_bytes_per_token
from engine.capacity.memory.kv_formula import compare_kv_formulas
from engine.capacity.memory.parallel import possible_tp
from engine.capacity.memory.plan import Plan, plan, plan_from_names
from engine.capacity.memory.profiles import PROFILES, find_profile, profile_weight_precision
from engine.capacity.memory.request import CompleteRequest, PlanRequest, complete
from engine.capacity.memory.weights import weight_bytes
from engine.capacity.model.catalog import model_config, model_names, model_spec
from engine.capacity.model.parameters import ParameterCount, parameter_count
from engine.capacity.model.shape import SHAPE_FIELDS, spec_of_shape
from engine.capacity.model.sharding import Shard, Stage
from engine.capacity.model.spec import ModelSpec
from engine.capacity.speed.operating_point import OperatingPoint
from engine.capacity.speed.serving import Serving, serving
from engine.capacity.speed.workload import Objectives, PlannedWorkload

__all__ = [
    "PROFILES",
    "SHAPE_FIELDS",
    "CacheLayout",
    "CompleteRequest",
    "ComputeDtype",
    "CurvePoint",
    "Deployment",
    "Goal",
    "Gpu",
    "KVPrecision",
    "MemoryBudget",
    "ModelSpec",
    "Objectives",
    "OperatingPoint",
    "ParameterCount",
    "ParetoPoint",
    "Plan",
    "PlanRequest",
    "PlannedWorkload",
    "Remedy",
    "Serving",
    "Shard",
    "Solution",
    "Stage",
    "Swing",
    "WeightPrecision",
    "activation_bytes",
    "as_json",
    "as_markdown",
    "as_yaml",
    "check_holds_a_block",
    "compare_documents",
    "compare_kv_formulas",
    "complete",
    "compute_dtype",
    "concurrency_curve",
    "custom_gpu",
    "deploy",
    "find_gpu",
    "find_profile",
    "gpus",
    "kv_bytes_per_block",
    "kv_bytes_per_sequence",
    "kv_bytes_per_token",
    "kv_precision",
    "launch_commands",
    "memory_budget",
    "model_config",
    "model_names",
    "model_spec",
    "parameter_count",
    "pareto",
    "plan",
    "plan_document",
    "plan_from_names",
    "possible_tp",
    "profile_weight_precision",
    "sensitivity",
    "serving",
    "solve",
    "solve_cached",
    "spec_of_shape",
    "weight_bytes",
    "weight_precision",
    "what_would_fit",
]
