"""The pool of KV blocks: reference counts, a free list that is the LRU, and the index of reusable prefixes.

    block ──ref_count > 0── held by one request, or shared by several with the same prefix
      └─ref_count = 0────── in the free list; if it still carries a hash, a later prompt may take it back

Free blocks are taken from the head of a doubly linked list and returned to its tail, so the least recently used
prefix is evicted first; taking a block from the middle (a prefix hit) is O(1). Blocks without a hash are returned to
the head: there is nothing in them worth keeping. The design follows vLLM's V1 block pool (Kwon et al. 2023).

A prompt may also leave a known prefix in the middle of a block. For that the reusable blocks that follow the same
prefix are kept sorted by their tokens: of a sorted list, the entry with the longest common prefix is a neighbour of
the place where the wanted tokens would stand, so one bisection finds it (:meth:`BlockPool.longest_partial`).
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence


class OutOfBlocksError(Exception):
    """Fewer blocks are free than were asked for. The pool is unchanged."""


@dataclasses.dataclass(slots=True, eq=False)
class Block:
    """One block of the KV cache.

    Attributes:
        index: its number, the row in every layer's cache tensor.
        ref_count: how many requests hold it.
        digest: chained hash of the prefix that ends with this block; None while it is not reusable.
        parent: digest of the prefix before this block while ``digest`` is set, ``b""`` for a first block.
        tokens: the tokens of this block while ``digest`` is set: compared on every hit, so that a hash collision or
            a stale hash can never hand out somebody else's keys and values.
    """

    index: int
    ref_count: int = 0
    digest: bytes | None = None
    parent: bytes = b""
    tokens: tuple[int, ...] = ()
    previous: Block | None = None
    next: Block | None = None


def chain_digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Digest of a block's tokens and of all blocks before it (SHA-256).

    Args:
        parent: digest of the block before, ``b""`` for the first.
        tokens: the block's tokens, ``block_size`` of them.
    """
    return hashlib.sha256(parent + array("q", tokens).tobytes()).digest()


class FreeList:
    """Doubly linked list of free blocks between two sentinels. Every operation is O(1)."""

    def __init__(self) -> None:
        self._head = Block(-1)
        self._tail = Block(-2)
        self._head.next, self._tail.previous = self._tail, self._head
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Block]:
        block = self._head.next
        while block is not None and block is not self._tail:
            yield block
            block = block.next

    def push_tail(self, block: Block) -> None:
        """Most recently used: evicted last."""
        assert self._tail.previous is not None
        self._insert(self._tail.previous, block)

    def push_head(self, block: Block) -> None:
        """Nothing worth keeping: taken first."""
        self._insert(self._head, block)

    def pop_head(self) -> Block:
        """The least recently used block."""
        block = self._head.next
        assert block is not None
        assert block is not self._tail, "pop from an empty free list"
        self.remove(block)
        return block

    def remove(self, block: Block) -> None:
        """Take a block out of the middle."""
        assert block.previous is not None
        assert block.next is not None
        block.previous.next, block.next.previous = block.next, block.previous
        block.previous = block.next = None
        self._length -= 1

    def _insert(self, after: Block, block: Block) -> None:
        before = after.next
        assert before is not None
        block.previous, block.next = after, before
        after.next = before.previous = block
        self._length += 1


class BlockPool:
    """Hands out block indices and remembers which of them hold which prefix.

    Args:
        num_blocks: how many there are.
        block_size: tokens a block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.blocks = [Block(index) for index in range(num_blocks)]
        self._free = FreeList()
        for block in self.blocks:
            self._free.push_tail(block)
        self._index: dict[bytes, Block] = {}
        # Reusable blocks by the prefix before them: (tokens, block index), sorted.
        self._children: dict[bytes, list[tuple[tuple[int, ...], int]]] = {}
        self._num_cached = 0

    @property
    def num_blocks(self) -> int:
        """Blocks in all."""
        return len(self.blocks)

    @property
    def num_free(self) -> int:
        """Blocks that no request holds (some may hold a reusable prefix)."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Free blocks that hold a reusable prefix."""
        return self._num_cached

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` blocks; reusable prefixes in them are forgotten.

        Raises:
            OutOfBlocksError: if fewer are free; then nothing has changed.
        """
        if count > len(self._free):
            raise OutOfBlocksError(f"{count} blocks wanted, {len(self._free)} free")
        taken = []
        for _ in range(count):
            block = self._free.pop_head()
            self._forget(block)
            block.ref_count = 1
            taken.append(block.index)
        return taken

    def share(self, indices: Sequence[int]) -> None:
        """Add one holder to each block: a prefix hit. Free ones leave the free list."""
        for index in indices:
            block = self.blocks[index]
            if block.ref_count == 0:
                self._free.remove(block)
                self._num_cached -= block.digest is not None
            block.ref_count += 1

    def release(self, indices: Sequence[int]) -> None:
        """Take one holder from each block; those without holders become free.

        The last block of a sequence goes first: a prefix is more likely to be asked for than its continuation.
        """
        for index in reversed(indices):
            block = self.blocks[index]
            assert block.ref_count > 0, f"block {index} released twice"
            block.ref_count -= 1
            if block.ref_count == 0:
                self._num_cached += block.digest is not None
                (self._free.push_tail if block.digest else self._free.push_head)(block)

    def lookup(self, digests: Sequence[bytes], tokens: Sequence[int]) -> list[int]:
        """Blocks that hold the longest known prefix of ``tokens``; nobody holds them yet on our behalf.

        Args:
            digests: chained digests of the first full blocks of ``tokens``.
            tokens: the text, at least ``len(digests) * block_size`` tokens.
        """
        found: list[int] = []
        for position, digest in enumerate(digests):
            block = self._index.get(digest)
            start = position * self.block_size
            if block is None or block.tokens != tuple(tokens[start : start + self.block_size]):
                break
            found.append(block.index)
        return found

    def longest_partial(self, parent: bytes, tokens: Sequence[int]) -> tuple[int, int] | None:
        """The reusable block whose beginning agrees with most of ``tokens``: O(log n) of the blocks after ``parent``.

        Args:
            parent: digest of the prefix before, ``b""`` at the beginning of a text.
            tokens: what follows it; at most a block's worth is compared.

        Returns:
            The block's index and how many of its first tokens agree, at least 1; None if there is no such block.
            Nobody holds it yet on our behalf.
        """
        siblings = self._children.get(parent)
        if not siblings:
            return None
        wanted = tuple(tokens)
        place = bisect.bisect_left(siblings, (wanted,))
        neighbours = siblings[max(place - 1, 0) : place + 1]
        count, index = max((_common_prefix(held, wanted), index) for held, index in neighbours)
        return (index, count) if count else None

    def count_free(self, indices: Sequence[int]) -> int:
        """How many of these blocks are in the free list now."""
        return sum(1 for index in indices if self.blocks[index].ref_count == 0)

    def publish(self, index: int, parent: bytes, digest: bytes, tokens: Sequence[int]) -> None:
        """Make a full, computed block findable. If its content is already published, that one stays.

        Args:
            index: the block.
            parent: digest of the prefix before it, ``b""`` for a first block.
            digest: ``chain_digest(parent, tokens)``.
            tokens: its tokens, ``block_size`` of them.
        """
        block = self.blocks[index]
        if block.digest is None and digest not in self._index:
            block.digest, block.parent, block.tokens = digest, parent, tuple(tokens)
            self._index[digest] = block
            bisect.insort(self._children.setdefault(parent, []), (block.tokens, index))

    def reset_prefixes(self) -> int:
        """Forget every reusable prefix, of held blocks too (their content may no longer be what it was).

        Returns:
            How many blocks were reusable.
        """
        known = list(self._index.values())
        for block in known:
            block.digest, block.parent, block.tokens = None, b"", ()
        self._index.clear()
        self._children.clear()
        self._num_cached = 0
        return len(known)

    def block_states(self) -> str:
        """One letter a block: "." free, "c" free and reusable, "u" held by one request, "s" by several."""
        return "".join(
            ("c" if block.digest else ".") if block.ref_count == 0 else ("u" if block.ref_count == 1 else "s")
            for block in self.blocks
        )

    def check(self, tables: Mapping[str, Iterable[int]]) -> None:
        """Recompute everything from scratch and compare (the executable invariants of this room).

        Args:
            tables: the block table of every request that holds blocks.

        Raises:
            AssertionError: naming the block and what is wrong with it.
        """
        holders = [0] * self.num_blocks
        for request_id, table in tables.items():
            entries = list(table)
            assert len(set(entries)) == len(entries), f"request {request_id} lists a block twice: {entries}"
            for index in entries:
                holders[index] += 1
        listed = [block.index for block in self._free]
        assert len(listed) == len(set(listed)) == len(self._free), "the free list repeats a block or miscounts"
        free = set(listed)
        for block in self.blocks:
            expected = holders[block.index]
            assert block.ref_count == expected, f"block {block.index}: {block.ref_count} holders, should be {expected}"
            assert (block.index in free) == (expected == 0), (
                f"block {block.index}: free list disagrees with its holders"
            )
            indexed = block.digest is not None and self._index.get(block.digest) is block
            assert indexed == (block.digest is not None), f"block {block.index}: hash not in the index"
            assert block.digest is None or len(block.tokens) == self.block_size, (
                f"block {block.index}: partial but hashed"
            )
        cached = sum(1 for block in self._index.values() if block.ref_count == 0)
        assert self._num_cached == cached, f"{self._num_cached} cached blocks counted, {cached} there"
        assert all(block.digest == digest for digest, block in self._index.items()), "the index holds a stale hash"
        self._check_children()

    def _check_children(self) -> None:
        expected: dict[bytes, list[tuple[tuple[int, ...], int]]] = {}
        for block in self._index.values():
            expected.setdefault(block.parent, []).append((block.tokens, block.index))
        assert self._children == {parent: sorted(entries) for parent, entries in expected.items()}, (
            "the blocks sorted by tokens are not those of the index"
        )

    def _forget(self, block: Block) -> None:
        if block.digest is not None:
            del self._index[block.digest]
            siblings = self._children[block.parent]
            del siblings[bisect.bisect_left(siblings, (block.tokens, block.index))]
            if not siblings:
                del self._children[block.parent]
            self._num_cached -= block.ref_count == 0
            block.digest, block.parent, block.tokens = None, b"", ()


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts begin with in common."""
    length = min(len(first), len(second))
    return next((i for i in range(length) if first[i] != second[i]), length)
