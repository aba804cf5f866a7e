"""The tensors of the cache: copies between blocks."""

import torch

from engine.cache.kv_cache import BlockCopy, KVCache


def make_cache(dtype: torch.dtype = torch.float32) -> KVCache:
    cache = KVCache(
        num_layers=3, num_blocks=5, block_size=4, num_kv_heads=2, head_dim=8, dtype=dtype, device=torch.device("cpu")
    )
    generator = torch.Generator().manual_seed(0)
    for tensor in (*cache.keys, *cache.values):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return cache


def test_copy_takes_the_first_tokens_of_a_block_in_every_layer_and_touches_nothing_else():
    for dtype in (torch.float32, torch.bfloat16):
        cache = make_cache(dtype)
        expected = [tensor.clone() for tensor in (*cache.keys, *cache.values)]
        cache.copy_blocks([BlockCopy(1, 3, 2), BlockCopy(4, 0, 3)])
        for tensor in expected:
            tensor[3, :2] = tensor[1, :2].clone()
            tensor[0, :3] = tensor[4, :3].clone()
        assert all(torch.equal(a, b) for a, b in zip((*cache.keys, *cache.values), expected, strict=True))


def test_several_requests_may_copy_from_the_same_block():
    cache = make_cache()
    cache.copy_blocks([BlockCopy(1, 2, 4), BlockCopy(1, 3, 1)])
    for tensor in (*cache.keys, *cache.values):
        assert torch.equal(tensor[2], tensor[1])
        assert torch.equal(tensor[3, :1], tensor[1, :1])
        assert not torch.equal(tensor[3, 1:], tensor[1, 1:])
