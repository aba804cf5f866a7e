"""The block pool: counts, free list, prefix index."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.cache.block_pool import Block, BlockPool, FreeList, OutOfBlocksError, chain_digest


def digests_of(tokens: list[int], block_size: int) -> list[bytes]:
    digests: list[bytes] = []
    for start in range(0, len(tokens) - block_size + 1, block_size):
        digests.append(chain_digest(digests[-1] if digests else b"", tokens[start : start + block_size]))
    return digests


def fill_and_publish(pool: BlockPool, tokens: list[int]) -> list[int]:
    digests = digests_of(tokens, pool.block_size)
    table = pool.allocate(len(digests))
    for position, (index, digest) in enumerate(zip(table, digests, strict=True)):
        parent = digests[position - 1] if position else b""
        pool.publish(index, parent, digest, tokens[position * pool.block_size : (position + 1) * pool.block_size])
    return table


def test_failed_allocation_leaves_the_pool_unchanged():
    pool = BlockPool(4, 2)
    held = pool.allocate(3)
    with pytest.raises(OutOfBlocksError):
        pool.allocate(2)
    pool.check({"a": held})
    assert pool.num_free == 1


def test_released_prefix_is_found_again_and_shared():
    pool = BlockPool(4, 2)
    tokens = [1, 2, 3, 4]
    table = fill_and_publish(pool, tokens)
    pool.release(table)
    assert pool.num_cached == 2
    hit = pool.lookup(digests_of(tokens, 2), tokens)
    assert hit == table
    pool.share(hit)
    pool.share(hit)
    assert pool.block_states().count("s") == 2
    pool.check({"a": table, "b": table})


def test_stale_hash_is_gone_after_a_block_is_reused():
    pool = BlockPool(2, 2)
    tokens = [1, 2, 3, 4]
    pool.release(fill_and_publish(pool, tokens))
    held = pool.allocate(2)  # evicts both
    assert pool.lookup(digests_of(tokens, 2), tokens) == []
    pool.check({"a": held})


def test_lookup_compares_tokens_so_a_digest_collision_is_no_hit():
    pool = BlockPool(2, 2)
    fill_and_publish(pool, [1, 2])
    forged = digests_of([1, 2], 2)
    assert pool.lookup(forged, [7, 8]) == []


def test_least_recently_used_prefix_is_evicted_first():
    pool = BlockPool(3, 1)
    first, second = fill_and_publish(pool, [1]), fill_and_publish(pool, [2])
    pool.release(first)
    pool.release(second)
    pool.allocate(2)  # one never used, then the least recently released
    assert pool.lookup(digests_of([1], 1), [1]) == []
    assert pool.lookup(digests_of([2], 1), [2]) == second


def test_end_of_a_sequence_is_evicted_before_its_beginning():
    pool = BlockPool(2, 1)
    table = fill_and_publish(pool, [1, 2])
    pool.release(table)
    pool.allocate(1)
    assert pool.lookup(digests_of([1, 2], 1), [1, 2]) == table[:1]


def test_checker_notices_a_wrong_reference_count():
    pool = BlockPool(2, 2)
    table = pool.allocate(1)
    pool.blocks[table[0]].ref_count = 2
    with pytest.raises(AssertionError, match="holders"):
        pool.check({"a": table})


def test_checker_notices_a_stale_hash():
    pool = BlockPool(2, 2)
    table = fill_and_publish(pool, [1, 2])
    pool.blocks[table[0]].digest = b"something else"
    with pytest.raises(AssertionError):
        pool.check({"a": table})


def test_checker_notices_a_hash_that_the_index_does_not_hold():
    pool = BlockPool(2, 2)
    (index,) = pool.allocate(1)
    pool.blocks[index].digest, pool.blocks[index].tokens = b"never published", (1, 2)
    with pytest.raises(AssertionError, match="hash not in the index"):
        pool.check({"a": [index]})


def test_checker_notices_a_block_that_is_missing_among_those_sorted_by_tokens():
    pool = BlockPool(2, 2)
    table = fill_and_publish(pool, [1, 2])
    pool._children.clear()
    with pytest.raises(AssertionError, match="sorted by tokens"):
        pool.check({"a": table})


def test_block_released_twice_is_an_error():
    pool = BlockPool(2, 2)
    table = pool.allocate(1)
    pool.release(table)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(table)


def test_block_leaves_the_free_list_once():
    free, block = FreeList(), Block(0)
    free.push_tail(block)
    free.remove(block)
    with pytest.raises(AssertionError):
        free.remove(block)
    assert len(free) == 0


def test_prefix_ends_where_a_block_of_it_was_evicted_although_its_continuation_is_held():
    pool = BlockPool(3, 1)
    first, middle, last = fill_and_publish(pool, [1, 2, 3])
    pool.release([middle])
    assert pool.allocate(1) == [middle]
    assert pool.lookup(digests_of([1, 2, 3], 1), [1, 2, 3]) == [first]
    assert pool.blocks[last].digest is not None


def test_content_that_is_published_twice_stays_with_the_first_block():
    pool = BlockPool(4, 2)
    first, second = fill_and_publish(pool, [1, 2]), fill_and_publish(pool, [1, 2])
    assert pool.lookup(digests_of([1, 2], 2), [1, 2]) == first
    pool.check({"a": first, "b": second})


def test_published_block_keeps_the_content_that_it_was_published_with():
    pool = BlockPool(2, 2)
    (index,) = fill_and_publish(pool, [1, 2])
    pool.publish(index, b"", chain_digest(b"", [3, 4]), [3, 4])
    assert pool.lookup(digests_of([3, 4], 2), [3, 4]) == []
    pool.check({"a": [index]})


def test_states_and_counts_tell_free_reusable_held_and_shared_blocks_apart():
    pool = BlockPool(5, 1)
    held = fill_and_publish(pool, [1, 2, 3])
    pool.release(held[1:])
    pool.share(held[:1])
    alone = pool.allocate(1)  # a block that was never used goes first
    states = {held[0]: "s", held[1]: "c", held[2]: "c", alone[0]: "u"}
    assert pool.block_states() == "".join(states.get(index, ".") for index in range(5))
    assert pool.count_free(held) == 2
    assert pool.count_free([held[0], alone[0]]) == 0


def test_reset_tells_how_many_prefixes_it_forgot_held_ones_too():
    pool = BlockPool(4, 1)
    held, released = fill_and_publish(pool, [1]), fill_and_publish(pool, [2])
    pool.release(released)
    assert pool.reset_prefixes() == 2
    assert (pool.num_cached, pool.lookup(digests_of([1], 1), [1])) == (0, [])
    pool.check({"a": held})


def test_longest_partial_finds_the_block_that_agrees_longest_among_many():
    pool = BlockPool(300, 4)
    for index in range(250):
        fill_and_publish(pool, [index // 50, index // 10 % 5, index % 10, 7])
    found = pool.longest_partial(b"", [3, 2, 8, 9])
    assert found is not None
    index, count = found
    assert (pool.blocks[index].tokens, count) == ((3, 2, 8, 7), 3)
    assert pool.longest_partial(b"", [9, 9, 9, 9]) is None
    assert pool.longest_partial(b"another prefix", [3, 2, 8, 9]) is None


def test_evicted_block_is_no_partial_match_any_more():
    pool = BlockPool(1, 2)
    pool.release(fill_and_publish(pool, [1, 2]))
    assert pool.longest_partial(b"", [1]) == (0, 1)
    held = pool.allocate(1)
    assert pool.longest_partial(b"", [1]) is None
    pool.check({"a": held})


def agreement(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning, written without the code under test."""
    return sum(
        all(x == y for x, y in itertools.islice(zip(first, second, strict=False), n))
        for n in range(1, min(len(first), len(second)) + 1)
    )


class PoolMachine(RuleBasedStateMachine):
    """Random holders allocate, publish, share and release; the checker runs after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(8, 2)
        self.tables: dict[str, list[int]] = {}
        self.texts: dict[str, list[int]] = {}
        self.count = 0

    @rule(tokens=st.lists(st.integers(0, 2), min_size=2, max_size=8))
    def admit(self, tokens: list[int]) -> None:
        tokens = tokens[: len(tokens) // 2 * 2]
        hit = self.pool.lookup(digests_of(tokens, 2), tokens)
        fresh = len(tokens) // 2 - len(hit)
        if fresh + self.pool.count_free(hit) > self.pool.num_free:
            return
        self.pool.share(hit)
        self.count += 1
        self.tables[str(self.count)] = [*hit, *self.pool.allocate(fresh)]
        self.texts[str(self.count)] = tokens

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.tables)))
        tokens = self.texts[name]
        digests = digests_of(tokens, 2)
        for position, digest in enumerate(digests):
            parent = digests[position - 1] if position else b""
            self.pool.publish(self.tables[name][position], parent, digest, tokens[position * 2 : position * 2 + 2])

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.tables)))
        self.pool.release(self.tables.pop(name))
        del self.texts[name]

    @rule(parent=st.lists(st.integers(0, 2), max_size=4), tokens=st.lists(st.integers(0, 2), min_size=1, max_size=2))
    def look_for_a_partial_block(self, parent: list[int], tokens: list[int]) -> None:
        digest = digests_of(parent, 2)[-1] if len(parent) >= 2 else b""
        agreeing = {
            block.index: agreement(block.tokens, tokens)
            for block in self.pool.blocks
            if block.digest is not None and block.parent == digest
        }
        found = self.pool.longest_partial(digest, tokens)
        if found is None:
            assert max(agreeing.values(), default=0) == 0
        else:
            assert agreeing[found[0]] == found[1] == max(agreeing.values()) > 0

    @rule(count=st.integers(9, 20))
    def fail_to_allocate(self, count: int) -> None:
        with pytest.raises(OutOfBlocksError):
            self.pool.allocate(count)

    @rule()
    def reset(self) -> None:
        self.pool.reset_prefixes()

    @invariant()
    def consistent(self) -> None:
        self.pool.check(self.tables)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
