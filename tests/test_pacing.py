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
from pipeline import (
    Answer,
    Assumed,
    Budget,
    Cursor,
    Window,
    backoff,
    expected_lag,
    full_walk_is_due,
    interval_of,
    listing_rate,
    look_back,
    retry_after,
    spares_full_walk,
    urgency,
)
from virtual import World, fetch_from

NOW = 1_790_000_000
TOTALS = (100, 600, 996, 1000, 10_000)
HOUR = 3600.0

PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)  # to explain takes minutes
HEADLESS = Budget(Assumed(60))

simulated = settings(max_examples=5, deadline=None, phases=PHASES)
pure = settings(deadline=None, phases=PHASES)

phases = st.integers(0, 599)
rates = st.floats(0, 30)


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
        wait = budget.wait(1, now)
        if wait > 0:
            now += wait
            continue
        budget = budget.spend(now)
        granted = window.spend(NOW + now)
        answer = Answer(200, window.as_headers(NOW + now), b"")
        if not granted:
            answer = Answer(*window.refusal(NOW + now))
        requests.append(Sent(now, answer.status))
        now += latency
        budget = budget.learn(answer, now, NOW + now)
        now += pause(budget, now) if callable(pause) else pause
    return requests


def window_told(used, remaining, reset):
    """Give the three headers of a budget."""
    values = {"used": used, "remaining": remaining, "reset": reset}
    return {f"x-ratelimit-{name}": str(value) for name, value in values.items()}


def statuses(requests, start=0.0):
    return Counter(status for at, status in requests if at >= start)


# Windows with headers


@pytest.mark.parametrize("total", TOTALS)
@simulated
@given(phase=phases)
def test_a_window_is_used_up_and_never_overdrawn(total, phase):
    window = fake_reddit.Budget(total=total, phase=phase)
    requests = ask_for(1800, window, HEADLESS, pause=0.1)
    assert statuses(requests).keys() == {200}
    assert len(requests) >= 2.8 * min(total, 600 / 0.1)


@pytest.mark.parametrize("total", TOTALS)
@simulated
@given(phase=phases, share=st.floats(0.1, 0.9))
def test_another_client_on_the_same_budget_is_left_its_part(total, phase, share):
    window = fake_reddit.Budget(total=total, phase=phase, others=share * total / 600)
    requests = ask_for(HOUR, window, HEADLESS, pause=3.0)
    # The last request of a window may be taken by the other while ours is under way.
    assert statuses(requests)[429] <= 7
    assert statuses(requests)[200] >= 0.9 * min(HOUR / 3.0, (1 - share) * total * 6)


@pytest.mark.parametrize("total", TOTALS)
@simulated
@given(phase=phases)
def test_polls_are_spread_over_the_window(total, phase):
    window = fake_reddit.Budget(total=total, phase=phase)

    def pause(budget, now):
        return max(interval_of(17.0, 25.0), 1 / budget.known.rate(now))

    sent = [at for at, _ in ask_for(2 * HOUR, window, HEADLESS, pause=pause, latency=0.3)]
    longest = max(b - a for a, b in pairwise(sent))
    assert longest <= max(25.0, 2.5 * 600 / total)
    assert len(sent) >= min(0.8 * 12 * total, 2 * HOUR / 8)


@pytest.mark.parametrize("pages", [1, 2, 12])
def test_a_walk_starts_only_when_the_window_carries_as_many_pages_or_is_whole(pages):
    for remaining, wait in ((pages - 0.5, 60.0), (pages, 0.0)):
        assert Budget(Window(100.0, remaining, 100.0, 600.0)).wait(pages, 40.0) == wait
    smaller = Budget(Window(5.0, 4.0, 100.0, 600.0))
    assert (smaller.wait(10, 40.0), smaller.wait(10, 100.0)) == (60.0, 0.0)


def test_the_total_is_learned_and_learned_anew():
    budget = HEADLESS
    for used, remaining, total in (("1", "999.0", 1000), ("584.0", "16", 600), ("4", "96.0", 100)):
        answer = Answer(200, window_told(used, remaining, 300), b"")
        budget = budget.learn(answer, 0.0, NOW)
        assert isinstance(budget.known, Window)
        assert (budget.known.total, budget.known.remaining) == (total, float(remaining))


def test_requests_past_the_limit_do_not_count_as_a_larger_total():
    budget = Budget(Window(100.0, 0.0, 60.0, 600.0))
    answer = Answer(429, window_told(350, 0, 60), b"")
    assert budget.learn(answer, 0.0, NOW).wait(100, 61.0) == 0.0
    assert budget.learn(answer, 0.0, NOW).free(61.0) == 100


def test_a_429_that_tells_only_that_nothing_remains_is_no_total():
    headers = {"x-ratelimit-remaining": "0", "x-ratelimit-reset": "30"}
    budget = Budget(Assumed(10)).spend(0.0).learn(Answer(429, headers, b""), 0.0, NOW)
    assert 30.0 <= budget.wait(1, 0.0) <= 31.0
    for minute in range(1, 30):  # the others carry no headers
        budget = budget.spend(minute * 60.0).learn(Answer(200, {}, b""), minute * 60.0, NOW)
        assert budget.wait(1, minute * 60.0) <= 12.0


@pytest.mark.parametrize("text", ["", "many", "nan", "inf", "-inf", "1e999", "0x10"])
def test_headers_that_are_no_numbers_are_as_good_as_none(text):
    answer = Answer(200, window_told(text, text, text), b"")
    assert HEADLESS.learn(answer, 0.0, NOW) == HEADLESS


# Without headers


@pytest.mark.parametrize("per_minute", [10, 60])
@simulated
@given(phase=st.floats(0, 59))
def test_without_headers_the_assumed_rate_is_used_up_and_not_exceeded(per_minute, phase):
    window = fake_reddit.Budget(total=per_minute, window=60, phase=phase, headers=False)
    requests = ask_for(HOUR, window, Budget(Assumed(per_minute)), pause=0.1)
    assert statuses(requests) == {200: 60 * per_minute}


@pytest.mark.parametrize("advice", ["empty", "seconds", "date"])
@pytest.mark.parametrize("per_minute", [1, 2, 5])
def test_a_lower_rate_is_found_and_then_exceeded_at_most_once_an_hour(per_minute, advice):
    window = fake_reddit.Budget(per_minute, 60, 13, headers=False, advice=advice)
    requests = ask_for(12 * HOUR, window, Budget(Assumed(10)), pause=0.1)
    assert statuses(requests)[429] <= 12 + math.log2(10 / per_minute) + 1
    refused = [at for at, status in requests if status == 429 and at > HOUR]
    assert all(b - a > 0.95 * HOUR for a, b in pairwise(refused))
    assert statuses(requests, HOUR)[200] >= 0.4 * per_minute * 11 * 60


def test_a_429_without_advice_doubles_the_spacing_which_then_shrinks_slowly():
    budget = Budget(Assumed(10))
    refusal = Answer(429, {}, b"")
    spacings = []
    for hour in range(4):
        budget = budget.learn(refusal, hour * 60.0, NOW)
        spacings.append(1 / budget.known.rate(hour * 60.0))
    assert spacings == pytest.approx([12.0, 24.0, 48.0, 96.0])
    later = [
        1 / budget.known.rate(180.0 + hours * HOUR) for hours in (0.5, 1.0, 2.0, 3.0, 4.0, 9.0)
    ]
    assert later == pytest.approx([96.0, 48.0, 24.0, 12.0, 6.0, 6.0])


def test_a_429_without_advice_waits_longer_each_time_in_a_window_that_is_known():
    budget, waits = Budget(Window(600, 590, 500, 600)), []
    for _ in range(8):
        budget = budget.learn(Answer(429, {}, b""), 0.0, NOW)
        waits.append(budget.wait(1, 0.0))
    assert waits == [2, 4, 8, 16, 32, 64, 64, 64]
    assert budget.learn(Answer(200, {}, b""), 64.0, NOW).free(64.0) == 590


@pytest.mark.parametrize("length", [10.0, 60.0, 600.0, 3600.0])
def test_a_window_is_as_long_as_the_longest_reset_that_was_told(length):
    budget = HEADLESS
    for reset in (0.3 * length, length - 1, 0.5 * length):
        budget = budget.learn(Answer(200, window_told(1, 5, reset), b""), 0.0, NOW)
    assert budget.wait(7, 0.0) == 0.5 * length + 1
    for _ in range(6):
        budget = budget.spend(0.5 * length + 1)
    assert budget.wait(1, 0.5 * length + 1) == length


def test_a_doubling_that_is_forgiven_leaves_no_trace():
    budget = Budget(Assumed(10)).learn(Answer(429, {}, b""), 0.0, NOW)
    budget = budget.learn(Answer(200, window_told(1, 9999, 599), b""), HOUR + 1, NOW)
    for _ in range(100):
        budget = budget.spend(HOUR + 2)
    assert budget.wait(1, HOUR + 2) == 0.0
    assert budget.free(HOUR + 2) == 9899


def test_no_wait_grows_without_bound():
    budget, now = Budget(Assumed(10)), 0.0
    for _ in range(50):
        budget = budget.spend(now).learn(Answer(429, {}, b""), now, NOW)
        now += budget.wait(1, now)
    assert budget.learn(Answer(429, {}, b""), now, NOW).wait(1, now) <= 600


@pytest.mark.parametrize("advice", ["plain", "zero", "seconds", "date"])
def test_a_window_that_another_client_has_emptied_is_not_asked_all_the_time(advice):
    window = fake_reddit.Budget(total=100, others=1.7, advice=advice)
    requests = ask_for(2 * HOUR, window, HEADLESS, pause=3.0)
    assert statuses(requests)[429] <= 12 * 12
    assert statuses(requests)[200] >= 6


# Advice


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("4", 4.0),
        ("4.5", 4.0),  # there are whole seconds only (RFC 9110)
        (formatdate(NOW + 90, usegmt=True), 90.0),
        ("Monday, 21-Sep-26 14:50:15 GMT", 2215.0),  # the form of RFC 850
        *((text, None) for text in (None, "", "soon", "nan", "Mon, 99 Foo 2026 25:61:61 GMT")),
    ],
)
def test_retry_after_is_read_as_seconds_or_as_a_date(text, seconds):
    assert retry_after(text, NOW) == seconds


later = st.integers(-100, 4000)
advice = st.one_of(
    st.builds(lambda n: {"retry-after": str(n)}, later),
    st.builds(lambda n: {"retry-after": formatdate(NOW + n, usegmt=True)}, later),
    st.builds(lambda text: {"retry-after": text}, st.text(max_size=5)),
    st.just({}),
)
remaining = st.one_of(st.sampled_from(["0", "0.0", "0.5", "1", "-3"]), st.floats(0, 1000))
limits = st.one_of(
    st.builds(window_told, st.integers(0, 2000), remaining, st.integers(0, 600)), st.just({})
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
    budget, now, forbidden = Budget(Assumed(per_minute)), 0.0, 0.0
    for answer, pause, pages in came:
        now += pause
        allowed = now + budget.wait(pages, now)
        free = budget.free(now)
        assert allowed >= forbidden - 1e-6
        assert free == 0 or now >= forbidden - 1e-6
        now = allowed
        budget = budget.spend(now).learn(answer, now, NOW)
        forbidden = forbidden_until(answer, now, NOW)


@pure
@given(came=st.lists(st.tuples(answers, st.floats(0, 30)), max_size=12), pages=st.integers(1, 12))
def test_every_wait_ends_and_then_something_may_be_asked(came, pages):
    budget, now = Budget(Assumed(10)), 0.0
    for answer, pause in came:
        now += pause
        budget = budget.spend(now).learn(answer, now, NOW)
    for _ in range(10):
        wait = budget.wait(pages, now)
        assert 0.0 <= wait <= 86_400.0
        now += wait
    assert wait == 0.0
    assert budget.free(now) >= 1
    assert budget.known.rate(now) > 0


def test_rounding_does_not_let_a_wait_end_before_something_may_be_asked():
    began = 4.581669069240554
    budget = Budget(Assumed(10, (began,) * 10))
    assert budget.free(began + budget.wait(1, began)) >= 1


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
    assert interval_of(rate, interval) == pytest.approx(seconds)


@pure
@given(rates=st.lists(st.floats(1e-5, 30), min_size=2, max_size=9))
def test_no_listing_waits_for_ever_however_busy_the_others_are(rates):
    assert urgency(rates[0], 1e5) > max(urgency(rate, 25.0) for rate in rates)
    assert urgency(0.0, 60.0) == urgency(1 / 86400, 60.0) < urgency(1 / 86399, 60.0)  # one a day


@pytest.mark.parametrize("others", [0.0, 0.1, 0.2, 0.3, 1.7])
def test_no_pause_is_longer_than_the_rest_of_the_window(others, tmp_path):
    world = World(str(tmp_path / "posts.db"))
    world.serve = fetch_from(world.reddit, world.clock)
    world.list_posts("p", 300, -300, 1)
    world.reddit.budgets["oauth"] = fake_reddit.Budget(total=100, others=others)
    times = [world.clock.elapsed]
    with world.database:
        for _ in world.follow():
            times.append(world.clock.elapsed)
            if times[-1] >= 2 * HOUR:
                break
    assert max(b - a for a, b in pairwise(times)) <= 610


def test_the_lag_expected_is_30_seconds_until_enough_is_known_and_then_what_is_seen():
    assert expected_lag([]) == expected_lag([0.0] * 999) == 30
    assert expected_lag([0.0] * 1000) == 5
    assert expected_lag([0.0] * 999 + [8.0]) == 17
    assert expected_lag([0.0] * 999 + [59.0]) == 60
    assert expected_lag([0.0] * 1999 + [59.0]) == 5


@pure
@given(lags=st.lists(st.floats(0, 60), max_size=20).map(lambda some: some * 100), rate=rates)
def test_the_look_back_is_never_more_than_a_minute_or_half_a_listing(lags, rate):
    seconds = look_back(expected_lag(lags), rate)
    assert 0.0 <= seconds <= 60.0
    assert seconds * rate <= 500.001


def full_walks(times, rate, share, name="python"):
    """Give the times of a name's full walks."""
    polled, walks = times[0], []
    for now in times[1:]:
        if full_walk_is_due(Cursor(name, 0, 0, polled), now, rate, share):
            walks.append(now)
        polled = now
    return walks


DAY = [NOW + n * 25.0 for n in range(3456)]


@pytest.mark.parametrize(
    ("rate", "share", "walks"),
    [
        (17.0, 1.0, 288),  # every 5 minutes
        (1.0, 1.0, 288),
        (0.1, 1.0, 72),  # a page covers 17 minutes
        (0.1, 0.01, 5),  # 10 pages are a tenth of the budget in 10,000 s
        (1 / 300, 1.0, 2),  # hardly ever
        (0.0, 1.0, 0),
    ],
)
def test_the_whole_listing_is_walked_as_age_and_budget_allow(rate, share, walks):
    assert len(full_walks(DAY, rate, share)) == pytest.approx(walks, abs=1)


def test_the_turns_of_several_names_do_not_fall_together():
    walks = Counter(at for n in range(60) for at in full_walks(DAY, 1.0, 1 / 60, f"name{n}"))
    assert sum(walks.values()) == pytest.approx(60 * 9, abs=60)
    assert max(walks.values()) <= 6


@pytest.mark.parametrize("hours", [1, 24])
def test_a_rare_run_meets_every_name_in_time(hours):
    runs = [NOW + n * hours * HOUR for n in range(200)]
    assert all(full_walks(runs, 1 / 300, 1 / 60, f"name{n}") for n in range(60))


@pytest.mark.parametrize(
    ("rate", "per_minute", "spare"),
    [(17.0, 60, True), (8.3, 10, True), (8.4, 10, False), (0.0, 1, True)],
)
def test_no_listing_loses_its_tail_while_another_is_walked_in_full(rate, per_minute, spare):
    assert spares_full_walk(rate, per_minute / 60) is spare


@pure
@given(st.lists(st.floats(-1e7, 1e7), max_size=20), st.floats(0.01, 30), st.floats(0.01, 10))
def test_a_clock_that_is_set_causes_one_full_walk_at_most(steps, rate, share):
    times = [NOW + 0.0]
    for step in steps:
        times += [times[-1] + step, times[-1] + step + 1.0]
    assert len(full_walks(times, rate, share)) <= 2 * len(steps)
    assert full_walks([times[-1], times[-1]], rate, share) == []  # nor does a restart


@pure
@given(failures=st.integers(1, 10_000), rate=rates, chance=st.floats(0, 0.999))
def test_a_wait_after_failures_is_jittered_and_bounded(failures, rate, chance):
    seconds = backoff(failures, rate, chance)
    assert 0.5 <= seconds <= min(60.0, max(5.0, 100 / max(rate, 1e-9))) * 1.001
    assert backoff(failures, rate, 0.0) == pytest.approx(
        backoff(failures, rate, 0.9999) / 2, rel=1e-3
    )
    assert seconds <= backoff(failures + 1, rate, chance)


def test_waits_after_failures_double_up_to_the_longest():
    assert [backoff(n, 1.0, 0.0) for n in range(1, 9)] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert [backoff(n, 17.0, 0.0) for n in range(1, 6)] == pytest.approx(
        [0.5, 1, 2, 2.94, 2.94], abs=0.01
    )
