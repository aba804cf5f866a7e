"""The products of a mixture of experts in one launch, interpreted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.expert_linear import CONFIGS, expert_linear_reference, expert_linear_triton, sort_by_expert


def chosen_experts(num_tokens, num_experts, per_token, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(num_experts, generator=generator)[:per_token] for _ in range(num_tokens)]
    return torch.stack(rows)


def test_sorting_keeps_the_order_of_tokens_and_counts_empty_experts():
    routing = sort_by_expert(torch.tensor([[3, 1], [1, 0], [3, 2]]), 5)
    assert routing.order.tolist() == [3, 1, 2, 5, 0, 4]
    assert routing.offsets.tolist() == [0, 1, 3, 4, 6, 6]


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    num_tokens=st.sampled_from([1, 2, 17, 40]),
    experts=st.sampled_from([(1, 1), (4, 2), (8, 3), (5, 5)]),
    outputs=st.sampled_from([1, 33, 70]),
    inputs=st.sampled_from([8, 65]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    seed=st.integers(0, 99),
)
def test_every_pair_meets_the_weight_of_its_expert(num_tokens, experts, outputs, inputs, dtype, seed):
    num_experts, per_token = experts
    routing = sort_by_expert(chosen_experts(num_tokens, num_experts, per_token, seed), num_experts)
    weight = torch.randn(num_experts, outputs, inputs).to(dtype)
    shares = torch.rand(num_tokens, per_token)
    tolerance = {torch.float32: 3e-5, torch.float16: 0.03}[dtype]
    for of_tokens, rows in ((True, num_tokens), (False, num_tokens * per_token)):
        for pair_weights in (None, shares):
            asked = {"of_tokens": of_tokens, "pair_weights": pair_weights}
            x = torch.randn(rows, inputs).to(dtype)
            expected = expert_linear_reference(x, weight, routing, **asked)
            found = expert_linear_triton(x, weight, routing, **asked)
            torch.testing.assert_close(found, expected, atol=tolerance, rtol=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_all_tokens_may_go_to_one_expert(name):
    routing = sort_by_expert(torch.full((150, 1), 2), 4)
    x, weight = torch.randn(150, 16), torch.randn(4, 20, 16)
    found = expert_linear_triton(x, weight, routing, of_tokens=True, config=name)
    torch.testing.assert_close(found, x @ weight[2].t(), atol=3e-5, rtol=1e-4)


def test_two_products_and_a_sum_are_the_mixture():
    from engine.layers.linear import Linear
    from engine.layers.mixture import MixtureMLP
    from engine.layers.mlp import GatedMLP
    from engine.quantization.formats import ModelDtypeFormat
    from kernels.gated_mul import gated_mul_triton

    gate_up, down = torch.randn(5, 2 * 24, 16), torch.randn(5, 16, 24)
    experts = [
        GatedMLP(Linear(ModelDtypeFormat(first)), Linear(ModelDtypeFormat(second)), "silu")
        for first, second in zip(gate_up, down, strict=True)
    ]
    mixture, x = MixtureMLP(torch.randn(5, 16), experts, 2, normalizes=True), torch.randn(9, 16)
    shares, chosen = mixture.route(x)
    routing = sort_by_expert(chosen, 5)
    hidden = gated_mul_triton(expert_linear_triton(x, gate_up, routing, of_tokens=True), "silu")
    pairs = expert_linear_triton(hidden, down, routing, of_tokens=False, pair_weights=shares)
    torch.testing.assert_close(pairs.view(9, 2, 16).sum(dim=1), mixture(x), atol=1e-3, rtol=1e-4)


def test_shapes_that_do_not_fit_are_refused_by_name():
    routing = sort_by_expert(torch.tensor([[0], [1]]), 2)
    with pytest.raises(ValueError, match="x must be"):
        expert_linear_triton(torch.randn(3, 8), torch.randn(2, 4, 8), routing, of_tokens=True)
    with pytest.raises(ValueError, match="routing is of 2 experts"):
        expert_linear_triton(torch.randn(2, 8), torch.randn(3, 4, 8), routing, of_tokens=True)
