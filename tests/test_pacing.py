"""When the next request may go out, and when the next poll should: pure functions of values.

The windows are FakeReddit's `Budget`, as Reddit keeps them; time is a number.
"""

from __future__ import annotations

import math
from collections import Counter
from email.utils import formatdate
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import fake_reddit
import pipeline
from fake_reddit import FakeReddit
from pipeline import (
    Answer,
    Budget,
    Cursor,
    Reddit,
    at_once,
    backoff,
    can_wait,
    carries,
    full_walk_turn,
    learned,
    listing_rate,
    look_back,
    poll_interval,
    retry_after,
    seconds_for,
    spent,
    stream,
    wait_for,
    window_left,
)
from virtual import VirtualClock, fetch_from

NOW = 1_790_000_000
TOTALS = (100, 600, 996, 1000, 10_000)
HOUR = 3600.0

PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)  # to explain takes minutes
simulated = settings(max_examples=5, deadline=None, phases=PHASES)
pure = settings(deadline=None, phases=PHASES)

phases = st.integers(0, 599)
rates = st.floats(0, 30)
budget_rates = st.floats(0, 20)


class Sent(NamedTuple):
    """Hold when a request went out, after the start, and what came."""

    at: float
    status: int


def ask_for(seconds, window, budget, pause=0.0, latency=0.0):
    """Ask as soon as allowed, and `pause` after each answer; give what was sent.

    pause: seconds, or a function of the budget and the time.
    """
    now, requests = 0.0, []
    while now < seconds:
        wait = wait_for(budget, 1, now)
        if wait > 0:
            now += wait
            continue
        budget = spent(budget, now)
        granted = window.spend(NOW + now)
        answer = Answer(200, window.as_headers(NOW + now), b"")
        if not granted:
            answer = Answer(*window.refusal(NOW + now))
        requests.append(Sent(now, answer.status))
        now += latency
        budget = learned(budget, answer, now, NOW + now)
        now += pause(budget, now) if callable(pause) else pause
    return requests


def statuses(requests, start=0.0):
    return Counter(status for at, status in requests if at >= start)


# Windows with headers


@pytest.mark.parametrize("total", TOTALS)
@simulated
@given(phase=phases)
def test_a_window_is_used_up_and_never_overdrawn(total, phase):
    window = fake_reddit.Budget(total=total, phase=phase)
    requests = ask_for(1800, window, Budget(60), pause=0.1)
    assert statuses(requests).keys() == {200}
    assert len(requests) >= 2.8 * min(total, 600 / 0.1)


@pytest.mark.parametrize("total", TOTALS)
@simulated
@given(phase=phases, share=st.floats(0.1, 0.9))
def test_another_client_on_the_same_budget_is_left_its_part(total, phase, share):
    window = fake_reddit.Budget(total=total, phase=phase, others=share * total / 600)
    requests = ask_for(HOUR, window, Budget(60), pause=3.0)
    # The last request of a window may be taken by the other while ours is under way.
    assert statuses(requests)[429] <= 7
    assert statuses(requests)[200] >= 0.9 * min(HOUR / 3.0, (1 - share) * total * 6)


@pytest.mark.parametrize("total", TOTALS)
@simulated
@given(phase=phases)
def test_polls_are_spread_over_the_window(total, phase):
    window = fake_reddit.Budget(total=total, phase=phase)

    def pause(budget, now):
        return poll_interval(17.0, 25.0, 1, carries(budget, now), window_left(budget, now))

    sent = [at for at, _ in ask_for(2 * HOUR, window, Budget(60), pause=pause, latency=0.3)]
    longest = max(b - a for a, b in pairwise(sent))
    assert longest <= max(25.0, 2.5 * 600 / total)
    assert len(sent) >= min(0.8 * 12 * total, 2 * HOUR / 8)


@pure
@given(total=st.sampled_from(TOTALS), phase=phases, pages=st.integers(1, 12))
def test_a_walk_starts_only_when_the_window_carries_as_many_pages(total, phase, pages):
    budget = Budget(60, total=total, remaining=pages - 0.5, resets_at=100.0)
    assert wait_for(budget, pages, 40.0) == 60.0
    assert wait_for(budget._replace(remaining=float(pages)), pages, 40.0) == 0.0


def test_more_pages_than_a_window_holds_wait_for_a_whole_window():
    budget = Budget(60, total=5.0, remaining=4.0, resets_at=100.0)
    assert wait_for(budget, 10, 40.0) == 60.0
    assert wait_for(budget, 10, 100.0) == 0.0


def test_the_total_is_learned_and_learned_anew():
    budget = Budget(60)
    for used, remaining, total in (("1", "999.0", 1000), ("584.0", "16", 600), ("4", "96.0", 100)):
        headers = {"x-ratelimit-used": used, "x-ratelimit-remaining": remaining}
        answer = Answer(200, headers | {"x-ratelimit-reset": "300"}, b"")
        budget = learned(budget, answer, 0.0, NOW)
        assert (budget.total, budget.remaining) == (total, float(remaining))


def test_requests_past_the_limit_do_not_count_as_a_larger_total():
    headers = {"x-ratelimit-remaining": "0", "x-ratelimit-reset": "60"}
    budget = Budget(60, total=100.0, remaining=0.0, resets_at=60.0)
    answer = Answer(429, headers | {"x-ratelimit-used": "350"}, b"")
    assert learned(budget, answer, 0.0, NOW).total == 100


def test_a_429_that_tells_only_that_nothing_remains_is_no_total():
    headers = {"x-ratelimit-remaining": "0", "x-ratelimit-reset": "30"}
    budget = learned(spent(Budget(10), 0.0), Answer(429, headers, b""), 0.0, NOW)
    assert 30.0 <= wait_for(budget, 1, 0.0) <= 31.0
    for minute in range(1, 30):  # the others carry no headers
        budget = learned(spent(budget, minute * 60.0), Answer(200, {}, b""), minute * 60.0, NOW)
        assert wait_for(budget, 1, minute * 60.0) <= 12.0


@pytest.mark.parametrize("text", ["", "many", "nan", "inf", "-inf", "1e999", "0x10"])
def test_headers_that_are_no_numbers_are_as_good_as_none(text):
    headers = {f"x-ratelimit-{key}": text for key in ("used", "remaining", "reset")}
    assert learned(Budget(60), Answer(200, headers, b""), 0.0, NOW) == Budget(60)


# Without headers


@pytest.mark.parametrize("per_minute", [10, 60])
@simulated
@given(phase=st.floats(0, 59))
def test_without_headers_the_assumed_rate_is_used_up_and_not_exceeded(per_minute, phase):
    window = fake_reddit.Budget(total=per_minute, window=60, phase=phase, headers=False)
    requests = ask_for(HOUR, window, Budget(per_minute), pause=0.1)
    assert statuses(requests) == {200: 60 * per_minute}


@pytest.mark.parametrize("advice", ["empty", "seconds", "date"])
@pytest.mark.parametrize("per_minute", [1, 2, 5])
def test_a_lower_rate_is_found_and_then_exceeded_at_most_once_an_hour(per_minute, advice):
    window = fake_reddit.Budget(per_minute, 60, 13, headers=False, advice=advice)
    requests = ask_for(12 * HOUR, window, Budget(10), pause=0.1)
    assert statuses(requests)[429] <= 12 + math.log2(10 / per_minute) + 1
    refused = [at for at, status in requests if status == 429 and at > HOUR]
    assert all(b - a > 0.95 * HOUR for a, b in pairwise(refused))
    assert statuses(requests, HOUR)[200] >= 0.4 * per_minute * 11 * 60


def test_a_429_without_advice_doubles_the_spacing_which_then_shrinks_slowly():
    budget = Budget(10)
    refusal = Answer(429, {}, b"")
    spacings = []
    for hour in range(4):
        budget = learned(budget, refusal, hour * 60.0, NOW)
        spacings.append(1 / carries(budget, hour * 60.0))
    assert spacings == pytest.approx([12.0, 24.0, 48.0, 96.0])
    later = [1 / carries(budget, 180.0 + hours * HOUR) for hours in (0.5, 1.0, 2.0, 3.0, 4.0, 9.0)]
    assert later == pytest.approx([96.0, 48.0, 24.0, 12.0, 6.0, 6.0])


@pure
@given(doublings=st.integers(0, 6), sent=st.integers(0, 12), pages=st.integers(1, 12))
def test_so_many_requests_go_out_within_the_seconds_told(doublings, sent, pages):
    budget, now = Budget(10, doublings=doublings), 0.0
    for _ in range(sent):
        budget = spent(budget, now)
    ends = seconds_for(budget, pages, now)
    for _ in range(pages):
        now += wait_for(budget, 1, now)
        budget = spent(budget, now)
    assert now <= ends


def test_a_window_that_is_known_makes_429s_without_advice_count_for_less():
    budget = Budget(60, total=600, remaining=590, resets_at=500)
    for _ in range(9):
        budget = learned(budget, Answer(429, {}, b""), 0.0, NOW)
    assert carries(budget, 0.0) == pytest.approx(1 / 8)
    assert carries(budget, 601.0) == pytest.approx(1 / 4)
    assert at_once(budget, 1801.0) == 600


def test_a_doubling_that_is_forgiven_leaves_no_trace():
    told = {"x-ratelimit-used": "1", "x-ratelimit-remaining": "9999", "x-ratelimit-reset": "599"}
    budget = learned(Budget(10), Answer(429, {}, b""), 0.0, NOW)
    budget = learned(budget, Answer(200, told, b""), HOUR + 1, NOW)
    for _ in range(100):
        budget = spent(budget, HOUR + 2)
    assert wait_for(budget, 1, HOUR + 2) == 0.0
    assert at_once(budget, HOUR + 2) == 9899


def test_no_wait_grows_without_bound():
    budget, now = Budget(10), 0.0
    for _ in range(50):
        budget = learned(spent(budget, now), Answer(429, {}, b""), now, NOW)
        now += wait_for(budget, 1, now)
    assert wait_for(learned(budget, Answer(429, {}, b""), now, NOW), 1, now) <= 600


@pytest.mark.parametrize("advice", ["plain", "zero", "seconds", "date"])
def test_a_window_that_another_client_has_emptied_is_not_asked_all_the_time(advice):
    window = fake_reddit.Budget(total=100, others=1.7, advice=advice)
    requests = ask_for(2 * HOUR, window, Budget(60), pause=3.0)
    assert statuses(requests)[429] <= 12 * 12
    assert statuses(requests)[200] >= 6


# Advice


def told(**headers):
    return {name.replace("_", "-"): value for name, value in headers.items()}


def test_retry_after_is_read_as_seconds_or_as_a_date():
    assert retry_after("4", NOW) == 4.0
    assert retry_after("4.5", NOW) == 4.5
    assert retry_after(formatdate(NOW + 90, usegmt=True), NOW) == 90.0
    assert retry_after("Monday, 21-Sep-26 14:50:15 GMT", NOW) == 2215.0  # the form of RFC 850
    assert retry_after(None, NOW) is None
    assert retry_after("", NOW) is None
    assert retry_after("soon", NOW) is None
    assert retry_after("nan", NOW) is None
    assert retry_after("Mon, 99 Foo 2026 25:61:61 GMT", NOW) is None


advice = st.one_of(
    st.builds(lambda n: told(retry_after=str(n)), st.integers(-5, 4000)),
    st.builds(
        lambda n: told(retry_after=formatdate(NOW + n, usegmt=True)), st.integers(-100, 4000)
    ),
    st.builds(lambda text: told(retry_after=text), st.text(max_size=5)),
    st.just({}),
)
limits = st.one_of(
    st.builds(
        lambda used, remaining, reset: told(
            x_ratelimit_used=str(used),
            x_ratelimit_remaining=str(remaining),
            x_ratelimit_reset=str(reset),
        ),
        st.integers(0, 2000),
        st.one_of(st.sampled_from(["0", "0.0", "0.5", "1", "-3"]), st.floats(0, 1000)),
        st.integers(0, 600),
    ),
    st.just({}),
)
answers = st.builds(
    lambda status, one, other: Answer(status, {**one, **other}, b""),
    st.sampled_from([200, 200, 200, 429, 429, 500, 503]),
    advice,
    limits,
)


def forbidden_until(answer, now, utc):
    """Give the time before which an answer forbids the next request: the test's own reading."""
    until = now
    text = answer.headers.get("retry-after", "")
    seconds = retry_after(text, utc)
    if seconds is not None:
        until = max(until, now + min(max(1.0, seconds), 86_400.0))  # more is a mistake
    if float(answer.headers.get("x-ratelimit-remaining", 1)) < 1:
        until = max(until, now + max(1.0, float(answer.headers["x-ratelimit-reset"])))
    return until


@pure
@given(
    per_minute=st.sampled_from([10, 60]),
    came=st.lists(st.tuples(answers, st.floats(0, 30), st.integers(1, 12)), max_size=12),
)
def test_nothing_is_asked_while_remaining_is_0_or_within_a_retry_after(per_minute, came):
    budget, now, forbidden = Budget(per_minute), 0.0, 0.0
    for answer, pause, pages in came:
        now += pause
        allowed = now + wait_for(budget, pages, now)
        free = at_once(budget, now)
        assert allowed >= forbidden - 1e-6
        assert free == 0 or now >= forbidden - 1e-6
        now = allowed
        budget = learned(spent(budget, now), answer, now, NOW)
        forbidden = forbidden_until(answer, now, NOW)


@pure
@given(came=st.lists(st.tuples(answers, st.floats(0, 30)), max_size=12), pages=st.integers(1, 12))
def test_every_wait_ends_and_then_something_may_be_asked(came, pages):
    budget, now = Budget(10), 0.0
    for answer, pause in came:
        now += pause
        budget = learned(spent(budget, now), answer, now, NOW)
    for _ in range(10):
        wait = wait_for(budget, pages, now)
        assert 0.0 <= wait <= 86_400.0
        now += wait
    assert wait == 0.0
    assert at_once(budget, now) >= 1
    assert carries(budget, now) > 0


def test_rounding_does_not_let_a_wait_end_before_something_may_be_asked():
    began = 4.581669069240554
    budget = Budget(10, sent=(began,) * 10)
    assert at_once(budget, began + wait_for(budget, 1, began)) >= 1


# How often, how far back, how deep


def page(*times):
    return [{"id": str(at), "created_utc": at} for at in times]


def test_the_rate_is_that_of_the_newer_half():
    assert listing_rate(page(109, 108, 107, 106, 105, 104, 103, 102, 101, 100)) == 1.0
    assert listing_rate(page(109, 108, 107, 106, 105, 104, 3, 2, 1, 0)) == 1.0
    assert listing_rate(page(100, 100, 100, 100)) == 2.0
    assert listing_rate(page(100)) == 0.0
    assert listing_rate([]) == 0.0
    assert listing_rate([{"id": "a"}, {"id": "b", "created_utc": "x"}]) == 0.0


@pytest.mark.parametrize(
    ("rate", "interval", "seconds"),
    [
        (17.0, 25.0, 100 / 17),
        (500.0, 25.0, 1.0),
        (1.0, 25.0, 25.0),
        (1.0, 3600.0, 100.0),
        (0.0, 25.0, 25.0),
        (0.0, 3600.0, 3600.0),
    ],
)
def test_a_poll_comes_when_a_page_of_posts_has(rate, interval, seconds):
    assert poll_interval(rate, interval, 1, 100.0, 600.0) == pytest.approx(seconds)


@pure
@given(
    rate=rates,
    interval=st.floats(1, 3600),
    pages=st.integers(1, 12),
    budget=budget_rates,
    left=st.floats(0, 600),
)
def test_polls_are_affordable_and_no_rarer_than_need_be(rate, interval, pages, budget, left):
    pause = poll_interval(rate, interval, pages, budget, left)
    assert pause >= 1.0
    assert pages / pause <= budget * 1.001 or pause >= left  # then the budget is new
    assert pause <= max(interval, left)
    assert pause <= interval or pages / pause >= budget * 0.999


class Memory:
    """Know every post, and a cursor of five seconds ago."""

    def __init__(self, clock):
        self.clock = clock

    def cursors(self, names):
        ago = int(self.clock.now) - 5
        return {name: Cursor(0, ago, ago) for name in names}

    def unstored(self, posts):
        return []


@pytest.mark.parametrize("others", [0.0, 0.1, 0.2, 0.3, 1.7])
def test_no_pause_is_longer_than_the_rest_of_the_window(others):
    clock = VirtualClock(NOW)
    reddit = FakeReddit(clock)
    for n in range(300):
        reddit.add(fake_reddit.make_post(n, NOW - 300 + n))
    reddit.budgets["oauth"] = fake_reddit.Budget(total=100, others=others)
    access = pipeline.Access("", "app-id", "app-secret")
    source = Reddit(access, fetch_from(reddit, clock), clock)
    following = stream(source, ["python"], Memory(clock))
    times = [clock.elapsed]
    while times[-1] < 2 * HOUR:
        next(following)
        times.append(clock.elapsed)
    assert max(b - a for a, b in pairwise(times)) <= 610


def test_the_look_back_begins_with_30_seconds():
    assert look_back([], 1.0, 1.0) == 30.0
    assert look_back([0.0] * 999, 0.0, 1.0) == 30.0


def test_the_look_back_adapts_to_the_lateness_seen():
    assert look_back([0.0] * 1000, 1.0, 1.0) == 5.0
    assert look_back([0.0] * 999 + [8.0], 1.0, 1.0) == 17.0
    assert look_back([0.0] * 999 + [59.0], 1.0, 1.0) == 60.0
    assert look_back([0.0] * 1999 + [59.0], 1.0, 1.0) == 5.0


def test_the_look_back_shrinks_when_the_budget_is_scarce():
    at_17_a_second = [look_back([], 17.0, a_minute / 60) for a_minute in (60, 40, 20, 15, 10)]
    assert at_17_a_second[0] == at_17_a_second[1] == pytest.approx(500 / 17, rel=0.03)
    assert at_17_a_second[1] > at_17_a_second[2] > at_17_a_second[3] == at_17_a_second[4] == 5.0


@pure
@given(
    lateness=st.lists(st.floats(0, 60), max_size=20).map(lambda some: some * 100),
    rate=rates,
    budget=budget_rates,
)
def test_the_look_back_is_never_more_than_a_minute_or_half_a_listing(lateness, rate, budget):
    seconds = look_back(lateness, rate, budget)
    assert 0.0 <= seconds <= 60.0
    assert seconds * rate <= 500.001


@pure
@given(rate=st.floats(0.001, 30), budget=budget_rates, more=st.floats(0, 5))
def test_a_larger_budget_never_shortens_the_look_back(rate, budget, more):
    assert look_back([], rate, budget) <= look_back([], rate, budget + more)


def full_walks(times, rate, budget, names=1):
    """Give the times of the full walks, and the number of the name."""
    polled, walks = times[0], []
    for now in times[1:]:
        turn = full_walk_turn([polled] * names, now, rate, budget)
        if turn is not None:
            walks.append((now, turn))
        polled = now
    return walks


DAY = [NOW + n * 25.0 for n in range(3456)]


@pytest.mark.parametrize(
    ("rate", "budget", "walks"),
    [
        (17.0, 1.0, 288),  # every 5 minutes
        (1.0, 1.0, 288),
        (0.1, 1.0, 72),  # a page covers 17 minutes
        (0.1, 0.01, 5),  # 10 pages are a tenth of the budget in 10,000 s
        (1 / 300, 1.0, 2),  # hardly ever
        (0.0, 1.0, 0),
        (17.0, 0.0, 0),
    ],
)
def test_the_whole_listing_is_walked_as_age_and_budget_allow(rate, budget, walks):
    assert len(full_walks(DAY, rate, budget)) == pytest.approx(walks, abs=1)


@pytest.mark.parametrize(("names", "walks"), [(2, 288), (3, 288), (4, 144), (11, 72)])
def test_several_names_take_turns_within_a_tenth_of_the_budget(names, walks):
    counts = Counter(turn for _, turn in full_walks(DAY, 1.0, 1 / 3, names))
    assert sum(counts.values()) == pytest.approx(288, abs=1)
    assert max(counts.values()) - min(counts[n] for n in range(names)) <= 2


@pytest.mark.parametrize("names", [2, 3, 6, 12, 60])
@pytest.mark.parametrize("hours", [1, 24])
def test_a_rare_run_meets_every_name_in_time(names, hours):
    runs = [NOW + n * hours * HOUR for n in range(20 * names)]
    counts = Counter(turn for _, turn in full_walks(runs, 1 / 300, 1.0, names))
    assert len(counts) == names


@pytest.mark.parametrize(
    ("rate", "seconds", "can"),
    [(4.0, 60.0, True), (5.0, 60.0, False), (17.0, 10.0, True), (0.0, 121.0, False)],
)
def test_what_is_listed_waits_for_a_full_walk_while_the_listing_holds_it(rate, seconds, can):
    assert can_wait(rate, seconds) is can


def test_a_turn_is_used_by_a_poll_of_its_own_name_alone():
    now = NOW + 1000.0
    turn = full_walk_turn([NOW, NOW], now, 1.0, 1.0)
    polled = [now, now]
    assert turn is not None
    polled[turn] = float(NOW)
    assert full_walk_turn(polled, now, 1.0, 1.0) == turn
    assert full_walk_turn([now, now], now, 1.0, 1.0) is None


def test_a_restart_repeats_no_full_walk():
    assert full_walks([NOW, NOW + 1, NOW + 2], 17.0, 1.0) == []


@pure
@given(st.lists(st.floats(-1e7, 1e7), max_size=20), st.floats(0.01, 30), st.floats(0.01, 10))
def test_a_clock_that_is_set_causes_one_full_walk_at_most(steps, rate, budget):
    times = [NOW + 0.0]
    for step in steps:
        times += [times[-1] + step, times[-1] + step + 1.0]
    assert len(full_walks(times, rate, budget)) <= 2 * len(steps)
    polled = times[-1]
    assert full_walks([polled, polled], rate, budget) == []


@pure
@given(failures=st.integers(1, 10_000), rate=st.none() | rates, chance=st.floats(0, 0.999))
def test_a_wait_after_failures_is_jittered_and_bounded(failures, rate, chance):
    seconds = backoff(failures, rate, chance)
    longest = 5.0 if rate is None else min(60.0, max(5.0, 100 / max(rate, 1e-9)))
    assert 0.5 <= seconds <= longest * 1.001
    assert backoff(failures, rate, 0.0) == pytest.approx(
        backoff(failures, rate, 0.9999) / 2, rel=1e-3
    )
    assert seconds <= backoff(failures + 1, rate, chance)


def test_waits_after_failures_double_up_to_the_longest():
    assert [backoff(n, 1.0, 0.0) for n in range(1, 9)] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert [backoff(n, 17.0, 0.0) for n in range(1, 6)] == pytest.approx(
        [0.5, 1, 2, 2.94, 2.94], abs=0.01
    )
    assert [backoff(n, None, 0.0) for n in range(1, 6)] == [0.5, 1, 2, 2.5, 2.5]
