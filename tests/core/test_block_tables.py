"""The array of block tables that a step takes over from the one before."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.execution.step_tensors import BlockTables

BLOCK = st.integers(1, 10_000)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_rows_are_those_of_this_step_whatever_the_steps_before_were(data: st.DataObject):
    """Tables grow, give way to others (preempted, finished), change places; batches and widths grow and shrink."""
    array, live = BlockTables(), [data.draw(st.lists(BLOCK, min_size=1, max_size=5)) for _ in range(3)]
    for _ in range(data.draw(st.integers(1, 8))):
        for index in range(len(live)):
            change = data.draw(st.sampled_from(["keep", "keep", "grow", "replace"]))
            if change == "grow":
                live[index].extend(data.draw(st.lists(BLOCK, min_size=1, max_size=9)))
            elif change == "replace":
                live[index] = data.draw(st.lists(BLOCK, min_size=1, max_size=5))
        if data.draw(st.booleans()):
            live.append(data.draw(st.lists(BLOCK, min_size=1, max_size=5)))
        batch = data.draw(st.lists(st.sampled_from(live), min_size=1, unique_by=id))
        used = [data.draw(st.integers(1, len(table))) for table in batch]
        laid_out = array.lay_out(batch, used)
        assert laid_out.shape == (len(batch), max(used))
        for row, table, count in zip(laid_out, batch, used, strict=True):
            assert row[:count].tolist() == table[:count]


def test_a_row_that_did_not_change_is_not_written_again():
    tables = [[1, 2, 3], [4, 5]]
    array = BlockTables()
    first = array.lay_out(tables, [3, 2])
    first[0, 0] = 99
    tables[1].append(6)
    again = array.lay_out(tables, [3, 3])
    assert again[0, 0] == 99
    assert again[1].tolist() == [4, 5, 6]
