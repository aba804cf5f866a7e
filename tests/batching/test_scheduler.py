"""The scheduler alone: a stand-in for the model computes whatever is scheduled."""

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.batching.request import Request, RequestState
from engine.batching.scheduler import Schedule, ScheduledRequest, Scheduler
from engine.cache.block_pool import BlockPool
from engine.config import EngineConfig
from engine.outputs import RequestTimes
from engine.sampling.params import SamplingParams

clock = itertools.count()


def make_request(name: str, prompt: int, output: int = 4, priority: int = 0, first_token: int = 0) -> Request:
    tokens = [first_token + i for i in range(prompt)]
    times = RequestTimes(arrival=float(next(clock)))
    return Request(name, tokens, prompt, SamplingParams(max_tokens=output), priority, times, seed=0)


def compute(scheduler: Scheduler, schedule: Schedule, config: EngineConfig) -> list[str]:
    """Pretend to run the step: every sampling row gets token 7; returns who finished."""
    finished = []
    scheduler.copies_done(schedule)
    for row in schedule.rows:
        request = row.request
        request.num_computed_tokens = row.start + row.num_tokens - row.num_drafts
        if row.samples:
            request.token_ids.append(7)
        if config.prefix_cache:
            scheduler.publish_computed(request)
        if request.num_output_tokens >= request.params.max_tokens:
            scheduler.finish(request)
            finished.append(request.request_id)
    scheduler.check()
    return finished


def run(scheduler: Scheduler, config: EngineConfig, limit: int = 500) -> list[list[str]]:
    """Step until all is done; the names scheduled in each step."""
    history = []
    while scheduler.running or scheduler.num_waiting:
        schedule = scheduler.schedule(config)
        history.append([row.request.request_id for row in schedule.rows])
        compute(scheduler, schedule, config)
        assert len(history) < limit, "the scheduler does not get on"
    return history


def scheduler_with(blocks: int, *requests: Request, block_size: int = 4) -> Scheduler:
    scheduler = Scheduler(BlockPool(blocks, block_size))
    for request in requests:
        scheduler.add(request)
    return scheduler


def config_with(**knobs: object) -> EngineConfig:
    return EngineConfig.from_mapping({"prefix_cache": False, **knobs})


def test_continuous_batch_admits_a_newcomer_while_others_decode():
    config = config_with()
    scheduler = scheduler_with(100, make_request("a", 5, 10))
    compute(scheduler, scheduler.schedule(config), config)
    scheduler.add(make_request("b", 5))
    assert {row.request.request_id for row in scheduler.schedule(config).rows} == {"a", "b"}


def test_static_batch_waits_for_its_longest_member():
    config = config_with(batching="static", max_running=2)
    requests = [make_request("short", 4, 2), make_request("long", 4, 6), make_request("next", 4, 2)]
    history = run(scheduler_with(100, *requests), config)
    first_of_next = next(i for i, names in enumerate(history) if "next" in names)
    last_of_long = max(i for i, names in enumerate(history) if "long" in names)
    assert first_of_next > last_of_long


def test_static_batch_is_filled_over_several_steps_when_the_budget_is_small():
    config = config_with(batching="static", max_running=3, token_budget=4)
    history = run(scheduler_with(100, *(make_request(name, 4, 3) for name in "abc")), config)
    assert any(set(names) == {"a", "b", "c"} for names in history)


def test_switching_static_to_continuous_lets_waiting_requests_in_at_the_next_step():
    static, continuous = config_with(batching="static", max_running=2), config_with(max_running=3)
    scheduler = scheduler_with(100, *(make_request(name, 4, 9) for name in "abc"))
    compute(scheduler, scheduler.schedule(static), static)
    assert [r.request_id for r in scheduler.waiting] == ["c"]
    assert "c" in [row.request.request_id for row in scheduler.schedule(continuous).rows]


def test_long_prompt_is_cut_to_the_token_budget():
    config = config_with(token_budget=8)
    scheduler = scheduler_with(100, make_request("a", 20))
    chunks = []
    while not chunks or not chunks[-1][1]:
        schedule = scheduler.schedule(config)
        chunks.append((schedule.rows[0].num_tokens, schedule.rows[0].samples))
        compute(scheduler, schedule, config)
    assert chunks == [(8, False), (8, False), (4, True)]


def test_without_chunked_prefill_a_prompt_is_computed_whole():
    config = config_with(token_budget=8, chunked_prefill=False)
    scheduler = scheduler_with(100, make_request("a", 20), make_request("b", 20))
    first = scheduler.schedule(config)
    assert [(row.request.request_id, row.num_tokens) for row in first.rows] == [("a", 20)]
    compute(scheduler, first, config)
    second = scheduler.schedule(config)
    assert [(row.request.request_id, row.num_tokens) for row in second.rows] == [("a", 1), ("b", 20)]


def test_partial_chunk_carries_no_draft_tokens():
    config = config_with(token_budget=8)
    request = make_request("a", 20)
    request.draft_token_ids = [1, 2]
    row = scheduler_with(100, request).schedule(config).rows[0]
    assert row.num_drafts == 0
    assert not row.samples


def test_drafts_are_cut_to_the_budget_that_is_left():
    config = config_with(token_budget=3)
    scheduler = scheduler_with(100, make_request("a", 3, 10))
    compute(scheduler, scheduler.schedule(config), config)
    scheduler.running[0].draft_token_ids = [1, 2, 3, 4]
    row = scheduler.schedule(config).rows[0]
    assert (row.num_tokens, row.num_drafts) == (3, 2)


def test_youngest_request_is_preempted_when_blocks_run_out():
    config = config_with()
    old, young = make_request("old", 7, 9), make_request("young", 7, 9)
    scheduler = scheduler_with(4, old, young)
    for _ in range(20):
        compute(scheduler, scheduler.schedule(config), config)
        if young.num_preemptions:
            break
    assert (old.num_preemptions, young.num_preemptions) == (0, 1)
    assert young.state == RequestState.PREEMPTED
    assert young.num_computed_tokens == 0
    run(scheduler, config)
    assert young.num_output_tokens == 9


def test_lower_priority_is_preempted_before_higher_whatever_came_first():
    config = config_with()
    low, high = make_request("low", 7, 9, priority=5), make_request("high", 7, 9, priority=0)
    run(scheduler_with(4, low, high), config)
    assert low.num_preemptions >= 1
    assert high.num_preemptions == 0


def test_without_preemption_nothing_is_admitted_that_could_run_out_of_blocks():
    config = config_with(preemption=False)
    requests = [make_request(name, 7, 9) for name in "abc"]
    run(scheduler_with(4, *requests), config)
    assert all(request.num_preemptions == 0 for request in requests)


def test_fully_cached_prompt_still_computes_its_last_token():
    config = EngineConfig()
    scheduler = scheduler_with(100, make_request("first", 8, 1))
    run(scheduler, config)
    again = make_request("again", 8, 1)
    scheduler.add(again)
    row = scheduler.schedule(config).rows[0]
    assert (row.start, row.num_tokens) == (7, 1)
    assert row.samples
    assert again.num_cached_tokens == 7


def test_prompt_that_leaves_a_known_prefix_inside_a_block_copies_the_tokens_in_common():
    config = EngineConfig()
    scheduler = scheduler_with(100, make_request("first", 12, 1))
    run(scheduler, config)
    other = make_request("other", 10, 1)
    other.token_ids[6:] = [90, 91, 92, 93]  # the same for six tokens: one block and a half
    scheduler.add(other)
    schedule = scheduler.schedule(config)
    row = schedule.rows[0]
    assert (row.start, row.num_tokens, other.num_cached_tokens) == (6, 4, 6)
    (copy,) = schedule.copies
    assert copy.num_tokens == 2
    assert copy.destination == other.block_ids[1]
    assert scheduler.pool.blocks[copy.source].tokens[:2] == (4, 5)
    assert (schedule.prefix_hit_tokens, schedule.prefix_query_tokens) == (6, 10)
    compute(scheduler, schedule, config)


def test_block_that_is_copied_from_is_not_given_away_before_the_copy():
    config = EngineConfig()
    scheduler = scheduler_with(4, make_request("first", 4, 1))
    run(scheduler, config)
    (known,) = [block.index for block in scheduler.pool.blocks if block.digest]
    for name in "ab":  # both want it; together with their own blocks nothing is left
        request = make_request(name, 4, 1)
        request.token_ids[3] = 99
        scheduler.add(request)
    schedule = scheduler.schedule(config)
    assert [copy.source for copy in schedule.copies] == [known, known]
    assert scheduler.pool.blocks[known].ref_count == 2
    assert known not in [block for row in schedule.rows for block in row.request.block_ids]
    compute(scheduler, schedule, config)
    assert scheduler.pool.num_free == 4


def test_prompt_that_needs_the_whole_cache_gives_up_the_copy_rather_than_wait_for_ever():
    config = EngineConfig()
    scheduler = scheduler_with(2, make_request("first", 7, 1))
    run(scheduler, config)
    other = make_request("other", 7, 1)
    other.token_ids[2:] = [90, 91, 92, 93, 94]
    scheduler.add(other)
    schedule = scheduler.schedule(config)
    assert schedule.copies == []
    assert schedule.rows[0].start == 0
    compute(scheduler, schedule, config)
    assert other.num_output_tokens == 1


def test_request_that_does_not_fit_is_tried_again_only_after_blocks_were_given_back():
    config = config_with(prefix_cache=True)
    running, big = make_request("running", 7, 9), make_request("big", 15, 1, first_token=50)
    scheduler = scheduler_with(5, running, big)
    lookups = []
    lookup = scheduler.pool.lookup
    scheduler.pool.lookup = lambda *a: lookups.append(a) or lookup(*a)  # type: ignore[method-assign, func-returns-value]
    history = run(scheduler, config)
    assert history[-1] == ["big"]
    assert len(lookups) == 3, "once for the first, once when it did not fit, once when it did"


def test_prompt_that_stays_whole_is_still_cut_to_the_envelope_that_memory_was_reserved_for():
    config = config_with(chunked_prefill=False, token_budget=8, max_num_batched_tokens=16)
    scheduler = scheduler_with(100, make_request("decoding", 2, 9))
    compute(scheduler, scheduler.schedule(config), config)
    scheduler.add(make_request("long", 40))
    steps = []
    while not steps or steps[-1] != [1, 1]:
        schedule = scheduler.schedule(config)
        steps.append([row.num_tokens for row in schedule.rows])
        compute(scheduler, schedule, config)
    assert steps == [[1, 15], [1, 15], [1, 10], [1, 1]]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_who_is_preempted_never_outranks_or_predates_who_stays(data: st.DataObject):
    scheduler = Scheduler(BlockPool(data.draw(st.integers(6, 12)), 4))
    config = config_with(prefix_cache=data.draw(st.booleans()))
    for i in range(data.draw(st.integers(2, 6))):
        prompt, output = data.draw(st.integers(1, 12)), data.draw(st.integers(2, 12))
        scheduler.add(make_request(f"r{i}", prompt, output, data.draw(st.integers(0, 1)), 100 * i))
    for _ in range(400):
        before = list(scheduler.running)
        schedule = scheduler.schedule(config)
        put_back = [request for request in before if request.state == RequestState.PREEMPTED]
        for request in put_back:
            stayed = [other for other in before if other.state == RequestState.RUNNING]
            rank = (request.priority, request.admission_index)
            assert all((other.priority, other.admission_index) < rank for other in stayed)
        assert len(put_back) == schedule.preempted
        assert schedule.rows, "somebody gets on in every step"
        compute(scheduler, schedule, config)
        if not scheduler.running and not scheduler.num_waiting:
            return
    pytest.fail("the scheduler does not get on")


def test_preempted_request_may_come_back_through_the_prefix_cache():
    config = EngineConfig()
    old, young = make_request("old", 7, 9), make_request("young", 7, 9, first_token=50)
    scheduler = scheduler_with(6, old, young)
    run(scheduler, config)
    assert young.num_output_tokens == old.num_output_tokens == 9
    scheduler.pool.check({})
    assert scheduler.pool.num_free == 6


def test_blocks_computed_under_swapped_weights_are_not_published():
    config = EngineConfig()
    request = make_request("a", 8, 3)
    scheduler = scheduler_with(100, request)
    request.publishable = False
    schedule = scheduler.schedule(config)
    compute(scheduler, schedule, config)
    twin = make_request("b", 8)
    scheduler.add(twin)
    row = next(row for row in scheduler.schedule(config).rows if row.request is twin)
    assert row.start == 0


def test_every_running_request_gets_on_when_the_budget_is_below_their_number():
    config = config_with(token_budget=2)
    scheduler = scheduler_with(100, *(make_request(name, 2, 6) for name in "abcde"))
    history = run(scheduler, config)
    longest_wait = max(
        max(b - a for a, b in itertools.pairwise([i for i, names in enumerate(history) if name in names]))
        for name in "abcde"
    )
    assert longest_wait <= 4


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.large_base_example])
@given(data=st.data())
def test_all_requests_finish_under_any_knobs_and_toggles(data: st.DataObject):
    blocks = data.draw(st.integers(6, 16), label="blocks")
    scheduler = Scheduler(BlockPool(blocks, 4))
    requests = [
        make_request(
            f"r{i}",
            prompt=data.draw(st.integers(1, 14)),
            output=data.draw(st.integers(1, 10)),
            priority=data.draw(st.integers(0, 2)),
            first_token=data.draw(st.sampled_from([0, 100])),
        )
        for i in range(data.draw(st.integers(1, 7), label="requests"))
    ]
    pending = list(requests)
    cancelled: set[str] = set()
    for step in range(2000):
        if pending and data.draw(st.booleans()):
            scheduler.add(pending.pop(0))
        knobs = data.draw(
            st.fixed_dictionaries(
                {
                    "batching": st.sampled_from(["continuous", "static"]),
                    "token_budget": st.integers(1, 20),
                    "max_running": st.integers(1, 8),
                    "prefix_cache": st.booleans(),
                    "preemption": st.booleans(),
                    "chunked_prefill": st.booleans(),
                }
            )
            if step % 5 == 0
            else st.just(None)
        )
        if knobs is not None:
            config = EngineConfig.from_mapping(knobs)
        if step % 11 == 10 and scheduler.running and data.draw(st.booleans()):
            victim = scheduler.running[-1]
            scheduler.finish(victim)
            cancelled.add(victim.request_id)
        for request in scheduler.running:
            request.draft_token_ids = [7] * min(2, request.max_total_tokens - request.num_tokens - 1)
        schedule = scheduler.schedule(config)
        assert len({id(row.request) for row in schedule.rows}) == len(schedule.rows)
        if config.chunked_prefill:
            assert sum(row.num_tokens for row in schedule.rows) <= config.token_budget
        compute(scheduler, schedule, config)
        if not pending and not scheduler.running and not scheduler.num_waiting:
            break
    else:
        pytest.fail("not finished after 2,000 steps")
    for request in requests:
        assert request.state == RequestState.FINISHED
        if request.request_id not in cancelled:
            assert request.num_output_tokens == request.params.max_tokens
    assert scheduler.pool.num_free == blocks


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    window=st.integers(1, 20),
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6),
    knobs=st.fixed_dictionaries(
        {"prefix_cache": st.booleans(), "preemption": st.booleans(), "token_budget": st.integers(1, 24)}
    ),
)
def test_with_windows_everybody_finishes_and_holds_no_more_than_its_window(window, sizes, knobs):
    """`check` (after every step) also asserts that nothing was given back that a query to come sees."""
    config = config_with(max_num_batched_tokens=24, **knobs)
    scheduler = Scheduler(BlockPool(20, 4), window)
    for index, (prompt, output) in enumerate(sizes):
        scheduler.add(make_request(str(index), prompt, output, first_token=index % 2))
    for _ in range(2000):
        if not (scheduler.running or scheduler.num_waiting):
            return
        held = {request.request_id: len(request.held_blocks) for request in scheduler.running}
        assert all(blocks <= -(-(window + 24) // 4) + 2 for blocks in held.values())
        compute(scheduler, scheduler.schedule(config), config)
    pytest.fail("the scheduler does not get on")


def test_blocks_behind_every_window_serve_other_requests():
    config = config_with()
    long = make_request("long", 4, 60)
    scheduler = Scheduler(BlockPool(8, 4), window=8)  # 32 tokens of room for a request of 64
    scheduler.add(long)
    for _ in range(40):
        compute(scheduler, scheduler.schedule(config), config)
    assert long.num_tokens == 44
    assert len(long.held_blocks) <= 3
    scheduler.add(make_request("other", 16, 4))
    assert "other" in [name for names in run(scheduler, config) for name in names]
    assert long.num_preemptions == 0
    assert scheduler.pool.num_free == 8


def test_without_windows_no_block_is_given_back_early():
    config = config_with()
    request = make_request("a", 30, 4)
    scheduler = scheduler_with(20, request)
    compute(scheduler, scheduler.schedule(config), config)
    scheduler.schedule(config)
    assert (request.num_freed, len(request.held_blocks)) == (0, 8)


def test_row_samples_where_it_reaches_the_newest_known_token_whatever_drafts_follow():
    request = make_request("a", 5)
    assert ScheduledRequest(request, start=4, num_tokens=3, num_drafts=2).samples
    assert ScheduledRequest(request, start=0, num_tokens=5, num_drafts=0).samples
    assert not ScheduledRequest(request, start=0, num_tokens=5, num_drafts=2).samples
    assert not ScheduledRequest(request, start=0, num_tokens=3, num_drafts=0).samples


def test_a_new_scheduler_is_empty():
    scheduler = scheduler_with(4)
    assert (scheduler.running, scheduler.waiting, scheduler.num_waiting) == ([], (), 0)
    assert scheduler.schedule(config_with()).rows == []


def test_request_that_waits_can_be_finished():
    first, second = make_request("a", 4), make_request("b", 4)
    scheduler = scheduler_with(8, first, second)
    scheduler.finish(first)
    assert (first.state, scheduler.waiting) == (RequestState.FINISHED, (second,))
    scheduler.check()


def test_request_that_is_put_back_forgets_its_drafts_and_counts_it():
    config = config_with()
    request = make_request("a", 4)
    scheduler = scheduler_with(8, request)
    compute(scheduler, scheduler.schedule(config), config)
    request.draft_token_ids = [7, 7]
    assert scheduler.vacate() == 1
    assert (request.state, request.draft_token_ids, request.num_preemptions) == (RequestState.PREEMPTED, [], 1)


def test_starting_over_queues_everybody_again_and_counts_those_that_ran():
    config = config_with(max_running=2)
    ran, put_back, waited = (make_request(name, 4) for name in "abc")
    scheduler = scheduler_with(50, ran, put_back, waited)
    compute(scheduler, scheduler.schedule(config), config)
    for request in (ran, put_back):
        request.times.first_scheduled = 1.0  # the engine notes it
    scheduler.vacate()
    compute(scheduler, scheduler.schedule(config_with(max_running=1)), config)
    assert (ran.state, put_back.state) == (RequestState.RUNNING, RequestState.PREEMPTED)
    ran.draft_token_ids = [7]
    scheduler.start_over([waited, put_back, ran], BlockPool(50, 4))
    states = [(request.state, request.num_preemptions) for request in (ran, put_back, waited)]
    assert states == [(RequestState.PREEMPTED, 2), (RequestState.PREEMPTED, 1), (RequestState.WAITING, 0)]
    assert (ran.draft_token_ids, ran.block_ids, ran.num_computed_tokens) == ([], [], 0)
    assert scheduler.waiting == (ran, put_back, waited)
    scheduler.check()
    run(scheduler, config)


def test_static_batch_after_a_time_of_continuous_batching_is_whoever_runs_then():
    static, continuous = config_with(batching="static", max_running=2), config_with(max_running=3)
    scheduler = scheduler_with(100, *(make_request(name, 4, 9) for name in "abc"))
    for config in (static, continuous):
        compute(scheduler, scheduler.schedule(config), config)
    scheduler.vacate()
    again = scheduler.schedule(config_with(batching="static", max_running=3))
    assert [row.request.request_id for row in again.rows] == ["a", "b", "c"]


def test_budget_that_is_too_small_for_all_leaves_nobody_out_twice_in_a_row():
    scheduler = scheduler_with(100, *(make_request(name, 4, 20) for name in "abc"))
    compute(scheduler, scheduler.schedule(config_with(token_budget=64)), config_with())
    small = config_with(token_budget=2)
    left_out = []
    for _ in range(8):
        schedule = scheduler.schedule(small)
        left_out.append({"a", "b", "c"} - {row.request.request_id for row in schedule.rows})
        compute(scheduler, schedule, small)
    assert all(len(names) == 1 for names in left_out)
    assert not any(now & then for now, then in itertools.pairwise(left_out))


def test_request_that_found_no_blocks_is_admitted_in_the_step_after_some_were_given_back():
    config = config_with()
    holder, large = make_request("a", 8, 20), make_request("b", 12)
    scheduler = scheduler_with(4, holder, large)
    for _ in range(2):
        schedule = scheduler.schedule(config)
        assert [row.request for row in schedule.rows] == [holder]
        compute(scheduler, schedule, config)
    scheduler.finish(holder)
    assert [row.request for row in scheduler.schedule(config).rows] == [large]


def test_request_that_was_put_back_does_not_return_in_the_same_step_although_a_chunk_of_it_would_fit():
    config = config_with(token_budget=64)
    first, second = make_request("a", 7, 20), make_request("b", 7, 20)
    scheduler = scheduler_with(4, first, second)
    for _ in range(2):
        compute(scheduler, scheduler.schedule(config), config)
    schedule = scheduler.schedule(config_with(token_budget=5))
    assert [row.request for row in schedule.rows] == [first]
    assert (schedule.preempted, scheduler.waiting) == (1, (second,))
