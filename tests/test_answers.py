"""What each answer of Reddit leads to: waiting, a new token, the feed, an end, or posts.

CASES is the table: each of its rows is asked for through a real server, while the waiting is
done by a virtual clock. With REDPIPE_SAMPLES the recorded answers go through it as well.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import secrets
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from email.utils import formatdate
from typing import NamedTuple

import pytest

from fake_reddit import (
    ATOM,
    GIANT,
    HANG,
    HTML,
    JSON,
    REFUSE,
    RESET,
    TRUNCATE,
    FakeReddit,
    atom_feed,
    block_page,
    error_reply,
    gzip_bomb,
    json_reply,
    login_page,
    make_post,
    reply,
    thing,
    wrong_gzip,
)
from pipeline import (
    RULES,
    Access,
    Answer,
    Database,
    Failed,
    Reddit,
    RedpipeError,
    Request,
    http_fetch,
    load,
    read_answer,
    rule_for,
    stream,
    transform,
)
from virtual import VirtualClock, fetch_from

NOW = 1_790_000_000
POSTS = [make_post(n, NOW - 100 + n) for n in range(3)]
IDS = [post["id"] for post in POSTS]
DOCTYPE = '<?xml version="1.0"?><!DOCTYPE feed [<!ENTITY a "aaaaaaaaaa">]>'


class Nothing:
    """Remember no post and no cursor, as an empty database does."""

    def cursors(self, names):
        return {}

    def unstored(self, posts):
        return list(posts)


class Outcome(NamedTuple):
    """Hold what an answer leads to.

    asked: who was asked after it, until posts came; waited: seconds before that;
    end: the exit status, when it was final; said: messages for the user.
    """

    asked: tuple[str, ...] = ()
    waited: float = 0.0
    end: int = 0
    said: tuple[str, ...] = ()
    posts: tuple[str, ...] = tuple(IDS)


def retried(sentence, *asked):
    return Outcome(asked, 0.5, said=(f"{sentence}; trying again", "Reddit answers again"))


def final(status, sentence):
    return Outcome(end=status, said=(sentence,), posts=())


def again(source, seconds):
    return Outcome((source,), seconds)


def page_of(*children, **data):
    head = {"after": None, "children": list(children), **data}
    return json_reply(200, {"kind": "Listing", "data": head})


def too_many(**headers):
    return json_reply(429, {"message": "Too Many Requests", "error": 429}, **headers)


def limits(remaining, reset):
    return {"x_ratelimit_remaining": remaining, "x_ratelimit_reset": reset}


HTML_401 = reply(401, "<html>Unauthorized</html>", HTML)
SERVER_ERROR = error_reply(500, "Internal Server Error")
CREDENTIALS = "; see README, Credentials"
BLOCKED = f"Reddit blocks this address, or the app (403){CREDENTIALS}"
NO_LISTING = "status 200, no listing: no reason given"
TEXT = "text/html; charset=UTF-8"
RENEWED = Outcome(("token", "oauth"))
PAGES = ("feed", "feed", "feed")
"""A feed does not say that it ends: two more requests show it."""


T5 = page_of({"kind": "t5", "data": {"id": "2zzzz", "name": "t5_2zzzz"}})


def elsewhere(location):
    return reply(302, "<html>302 Found</html>", {**HTML, "location": location})


# who is asked, what comes, what follows
CASES = {
    # with a token
    "a listing": ("oauth", page_of(*map(json.loads, map(thing, POSTS))), Outcome()),
    "401 JSON": ("oauth", error_reply(401, "Unauthorized"), RENEWED),
    "401 HTML": ("oauth", HTML_401, RENEWED),
    "403 JSON with a reason": (
        "oauth",
        error_reply(403, "Forbidden", reason="private"),
        final(69, "r/python cannot be read: private (403)"),
    ),
    "403 JSON without a reason": (
        "oauth",
        error_reply(403, "Forbidden"),
        final(69, "r/python cannot be read: Forbidden (403)"),
    ),
    "403 JSON without a word": (
        "oauth",
        json_reply(403, {}),
        final(69, "r/python cannot be read: no reason given (403)"),
    ),
    "404 JSON with a reason": (
        "oauth",
        error_reply(404, "Not Found", reason="banned"),
        final(69, "r/python cannot be read: banned (404)"),
    ),
    "404 JSON without a reason": (
        "oauth",
        error_reply(404, "Not Found"),
        final(69, "r/python cannot be read: Not Found (404)"),
    ),
    "404 HTML": (
        "oauth",
        reply(404, "<html>", HTML),
        retried(f"status 404, no listing: {TEXT}", "oauth"),
    ),
    "the block page": ("oauth", block_page(), final(77, BLOCKED)),
    "403 with a JSON list": ("oauth", json_reply(403, []), final(77, BLOCKED)),
    "403 with a listing": (
        "oauth",
        (403, *page_of()[1:]),
        retried("status 403, no listing: application/json; charset=UTF-8", "oauth"),
    ),
    "302 to the search": (
        "oauth",
        elsewhere("https://www.reddit.com/subreddits/search?q=pyhton"),
        final(69, "r/python does not exist"),
    ),
    "302 to the search, relative": (
        "oauth",
        elsewhere("/subreddits/search.json?q=pyhton"),
        final(69, "r/python does not exist"),
    ),
    "302 elsewhere": (
        "oauth",
        elsewhere("https://www.reddit.com/"),
        retried(f"status 302, no listing: {TEXT}", "oauth"),
    ),
    "302 to a login that mentions the search": (
        "oauth",
        elsewhere("https://www.reddit.com/login/?dest=/subreddits/search"),
        retried(f"status 302, no listing: {TEXT}", "oauth"),
    ),
    "302 to nowhere": (
        "oauth",
        elsewhere("http://[broken"),
        retried(f"status 302, no listing: {TEXT}", "oauth"),
    ),
    "400 JSON": (
        "oauth",
        error_reply(400, "Bad Request"),
        retried("status 400, no listing: Bad Request", "oauth"),
    ),
    "408": ("oauth", reply(408), retried("status 408, no listing: nothing", "oauth")),
    "414": (
        "oauth",
        reply(414, "<html>", HTML),
        final(64, "too many names for one listing (414)"),
    ),
    "429 with Retry-After in seconds": ("oauth", too_many(retry_after="4"), again("oauth", 4.0)),
    "429 with Retry-After 0": ("oauth", too_many(retry_after="0"), again("oauth", 2.0)),
    "429 with Retry-After as a date": (
        "oauth",
        too_many(
            date=formatdate(NOW + 3600, usegmt=True),  # their clock is an hour ahead
            retry_after=formatdate(NOW + 3607, usegmt=True),
        ),
        again("oauth", 7.0),
    ),
    "429 with Retry-After as a date that is over": (
        "oauth",
        too_many(date=formatdate(NOW, usegmt=True), retry_after=formatdate(NOW - 60, usegmt=True)),
        again("oauth", 2.0),
    ),
    "429 without advice": ("oauth", too_many(), again("oauth", 2.0)),
    "429 with advice that makes no sense": (
        "oauth",
        too_many(retry_after="soon"),
        again("oauth", 2.0),
    ),
    "429 with zero bytes": ("oauth", reply(429), again("oauth", 2.0)),
    "429 HTML": ("oauth", reply(429, "<html>Too Many Requests", HTML), again("oauth", 2.0)),
    "429 with the window's rest": (
        "oauth",
        too_many(x_ratelimit_used="600", **limits("0.0", "77")),
        again("oauth", 78.0),
    ),
    "429 with remaining 0 and reset 0": (
        "oauth",
        too_many(x_ratelimit_used="600", **limits("0", "0")),
        again("oauth", 2.0),
    ),
    "451": ("oauth", reply(451), retried("status 451, no listing: nothing", "oauth")),
    **{
        str(status): (
            "oauth",
            reply(status, "<html>", HTML),
            retried(f"status {status}, no listing: {TEXT}", "oauth"),
        )
        for status in (500, 501, 502, 503, 504, 520, 522)
    },
    "500 JSON": (
        "oauth",
        SERVER_ERROR,
        retried("status 500, no listing: Internal Server Error", "oauth"),
    ),
    "503 with Retry-After": (
        "oauth",
        reply(503, headers={"retry-after": "20"}),
        retried("status 503, no listing: nothing", "oauth")._replace(waited=20.0),
    ),
    "200 with HTML": ("oauth", login_page(), retried(f"status 200, no listing: {TEXT}", "oauth")),
    "200 with nothing": ("oauth", reply(200), retried("status 200, no listing: nothing", "oauth")),
    "200 with an error's name": (
        "oauth",
        json_reply(200, {"error": "invalid_grant"}),
        retried("status 200, no listing: invalid_grant", "oauth"),
    ),
    "200 with an error's number": (
        "oauth",
        json_reply(200, {"error": 503}),
        retried("status 200, no listing: 503", "oauth"),
    ),
    "200 with a token": (
        "oauth",
        json_reply(200, {"access_token": "x"}),
        retried(NO_LISTING, "oauth"),
    ),
    "200 with a JSON list": (
        "oauth",
        json_reply(200, [{"kind": "Listing"}]),
        retried("status 200, no listing: application/json; charset=UTF-8", "oauth"),
    ),
    "a listing of t5": (
        "oauth",
        T5,
        retried(f"status 200, no listing: {JSON['content-type']}", "oauth"),
    ),
    "children that are null": ("oauth", page_of(children=None), retried(NO_LISTING, "oauth")),
    "no children": (
        "oauth",
        json_reply(200, {"kind": "Listing", "data": {}}),
        retried(NO_LISTING, "oauth"),
    ),
    "data that is null": (
        "oauth",
        json_reply(200, {"kind": "Listing", "data": None}),
        retried(NO_LISTING, "oauth"),
    ),
    "a child that is null": (
        "oauth",
        page_of(None, json.loads(thing(POSTS[0]))),
        Outcome(posts=(IDS[0],)),
    ),
    "a child without data": (
        "oauth",
        page_of({"kind": "t3", "data": None}),
        retried(f"status 200, no listing: {JSON['content-type']}", "oauth"),
    ),
    "half a listing": (
        "oauth",
        reply(200, page_of(*map(json.loads, map(thing, POSTS)))[2][:999]),
        retried("status 200, no listing: application/json; charset=UTF-8", "oauth"),
    ),
    "JSON that nests without end": (
        "oauth",
        reply(200, '{"kind": "Listing", "data": ' + "[" * 100_000),
        retried("status 200, no listing: application/json; charset=UTF-8", "oauth"),
    ),
    "bytes that are no UTF-8": (
        "oauth",
        reply(200, b'{"kind": "\xff\xfe"}'),
        retried("status 200, no listing: application/json; charset=UTF-8", "oauth"),
    ),
    # for a token
    "no token: 401": (
        "token",
        error_reply(401, "Unauthorized"),
        final(77, f"Reddit refuses the credentials (401){CREDENTIALS}"),
    ),
    "no token: 400": (
        "token",
        error_reply(400, "Bad Request"),
        final(77, f"Reddit refuses the credentials (400){CREDENTIALS}"),
    ),
    "no token: 403": (
        "token",
        block_page(),
        final(77, f"Reddit refuses or blocks the app (403){CREDENTIALS}"),
    ),
    "no token: 200 with an error": (
        "token",
        json_reply(200, {"error": "unauthorized_client"}),
        final(77, f"Reddit refuses the credentials (unauthorized_client){CREDENTIALS}"),
    ),
    "no token: 429 with Retry-After": (
        "token",
        too_many(retry_after="4"),
        Outcome(("token", "oauth"), 4.0),
    ),
    "no token: 404": (
        "token",
        error_reply(404, "Not Found"),
        retried("status 404, no token: Not Found", "token", "oauth"),
    ),
    "no token: 500": (
        "token",
        SERVER_ERROR,
        retried("status 500, no token: Internal Server Error", "token", "oauth"),
    ),
    "no token: 503 with Retry-After": (
        "token",
        reply(503, headers={"retry-after": "20"}),
        retried("status 503, no token: no reason given", "token", "oauth")._replace(waited=20.0),
    ),
    "no token: 200 with HTML": (
        "token",
        login_page(),
        retried("status 200, no token: no reason given", "token", "oauth"),
    ),
    "no token: an empty one": (
        "token",
        json_reply(200, {"access_token": "", "expires_in": 3600}),
        retried("status 200, no token: no reason given", "token", "oauth"),
    ),
    "no token: one that is two lines": (
        "token",
        json_reply(200, {"access_token": "a\r\nHost: b", "expires_in": 3600}),
        retried("status 200, no token: no reason given", "token", "oauth"),
    ),
    "a token that does not say how long it lasts": (
        "token",
        json_reply(200, {"access_token": "of-another"}),
        Outcome(("oauth", "token", "oauth")),  # the server does not know it
    ),
    # without credentials
    "anonymous: the block page": ("json", block_page(), Outcome(PAGES)),
    "anonymous: an empty 403": ("json", reply(403), Outcome(PAGES)),
    "anonymous: 403 JSON": (
        "json",
        error_reply(403, "Forbidden", reason="quarantined"),
        final(69, "r/python cannot be read: quarantined (403)"),
    ),
    "anonymous: 404 JSON": (
        "json",
        error_reply(404, "Not Found", reason="banned"),
        final(69, "r/python cannot be read: banned (404)"),
    ),
    "anonymous: 401 JSON": (
        "json",
        error_reply(401, "Unauthorized"),
        final(77, f"Reddit wants credentials (401){CREDENTIALS}"),
    ),
    "anonymous: 401 HTML": (
        "json",
        HTML_401,
        final(77, f"Reddit wants credentials (401){CREDENTIALS}"),
    ),
    "anonymous: 429 without advice": ("json", reply(429), again("json", 12.0)),
    "anonymous: 200 with HTML": (
        "json",
        login_page(),
        retried(f"status 200, no listing: {TEXT}", "json"),
    ),
    "anonymous: a feed": (
        "json",
        reply(200, atom_feed(POSTS, "python", NOW), ATOM),
        retried("status 200, no listing: application/atom+xml; charset=UTF-8", "json"),
    ),
    # the feed
    "the feed": (
        "feed",
        reply(200, atom_feed(POSTS[::-1], "python", NOW), ATOM),
        Outcome(PAGES[1:]),
    ),
    "the feed: the block page": ("feed", block_page(), final(77, BLOCKED)),
    "the feed: 302 to the search": (
        "feed",
        elsewhere("https://www.reddit.com/subreddits/search.rss?q=pyhton"),
        final(69, "r/python does not exist"),
    ),
    "the feed: 404 JSON": (
        "feed",
        error_reply(404, "Not Found", reason="banned"),
        final(69, "r/python cannot be read: banned (404)"),
    ),
    "the feed: 429 with Retry-After": ("feed", too_many(retry_after="60"), Outcome(PAGES, 60.0)),
    "the feed: 429 without advice": ("feed", reply(429), Outcome(PAGES, 12.0)),
    "the feed: with a DOCTYPE": (
        "feed",
        reply(200, DOCTYPE + atom_feed(POSTS, "python", NOW).decode().partition("?>")[2], ATOM),
        retried("status 200, no listing: application/atom+xml; charset=UTF-8", *PAGES),
    ),
    "the feed: half of it": (
        "feed",
        reply(200, atom_feed(POSTS, "python", NOW)[:999], ATOM),
        retried("status 200, no listing: application/atom+xml; charset=UTF-8", *PAGES),
    ),
    "the feed: another XML": (
        "feed",
        reply(200, "<rss><channel/></rss>", {"content-type": "text/xml"}),
        retried("status 200, no listing: text/xml", *PAGES),
    ),
    "the feed: a listing": ("feed", page_of(), retried(NO_LISTING, *PAGES)),
    "the feed: 200 with nothing": (
        "feed",
        reply(200),
        retried("status 200, no listing: nothing", *PAGES),
    ),
}
# what the connection does, and what is said of it
FAULTS = {
    "closed without a word": (REFUSE, "connection error"),
    "reset": (RESET, "Connection reset by peer"),
    "cut short": (TRUNCATE, "protocol error"),
    "wrongly gzipped": (wrong_gzip(), "a wrongly compressed answer"),
    "a body of 1 GB": (GIANT, "an answer of more than 16 MiB"),
    "a small body that unpacks to 64 MiB": (gzip_bomb(64), "an answer of more than 16 MiB"),
}
ON = {"token": "access_token", "oauth": "/new", "json": ".json", "feed": ".rss"}


def source_of(path):
    """Give the source that a request went to."""
    return next((name for name in ("token", "json", "feed") if ON[name] in path), "oauth")


@pytest.fixture
def world():
    """Serve three posts in r/python; it is always the same second."""
    with FakeReddit(VirtualClock(NOW)) as reddit:
        for post in POSTS:
            reddit.add(post)
        yield reddit


def access_to(world, source):
    """Give the access with which a source is the first to be asked."""
    world.anonymous_json_blocked = source == "feed"
    with_token = source in {"token", "oauth"}
    return Access(world.url, *("app-id", "app-secret") if with_token else ())


def first_batch(world, access, **options):
    """Follow r/python until the first posts come."""
    reddit = Reddit(access, http_fetch(), world.clock)
    return next(stream(reddit, ["python"], Nothing(), chance=lambda: 0.0, **options))


def outcome(world, source, caplog, **options):
    """Follow r/python until posts or the end come; tell all that was seen of it."""
    access = access_to(world, source)
    posts, end, said = [], 0, []
    began = world.clock.time()
    with caplog.at_level(logging.WARNING, "redpipe"):
        try:
            posts = first_batch(world, access, **options).posts
        except RedpipeError as exc:
            end, said = exc.exit_status, [str(exc)]
    said = [record.getMessage() for record in caplog.records] + said
    asked = [source_of(seen.path) for seen in world.log]
    after = tuple(asked[asked.index(source) + 1 :])
    waited = round(world.clock.time() - began, 3)
    return Outcome(after, waited, end, tuple(said), tuple(post["id"] for post in posts))


@pytest.mark.parametrize(("source", "answer", "expected"), CASES.values(), ids=CASES)
def test_every_answer_has_its_consequence(source, answer, expected, world, caplog):
    world.script(answer, on=ON[source])
    assert outcome(world, source, caplog) == expected


@pytest.mark.parametrize(("fault", "sentence"), FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("source", ["token", "oauth", "json", "feed"])
def test_a_connection_that_fails_is_tried_again(source, fault, sentence, world, caplog):
    world.script(fault, on=ON[source])
    asked = {"token": ("token", "oauth"), "feed": PAGES}.get(source, (source,))
    assert outcome(world, source, caplog) == retried(sentence, *asked)


def test_a_refused_connection_is_tried_again(world, caplog):
    access = access_to(world, "json")
    world.stop()
    reddit = Reddit(access, http_fetch(), world.clock)
    with pytest.raises(Failed, match=r"^Connection refused$"):
        reddit.page(["python"])
    world.start()
    assert [post["id"] for post in reddit.page(["python"]).posts] == IDS[::-1]


# Answers that are given too slowly, or are too long


@contextmanager
def raw_server(talk, stop):
    """Serve one request by `talk(connection, stop)`; give the address."""

    def serve():
        connection = listener.accept()[0]
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            talk(connection, stop)

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        pool.submit(serve)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"


def dripping(head, body):
    """Send a body one byte a second, until the client has gone or a minute is over."""

    def talk(connection, stop):
        connection.sendall(head + b"\r\n\r\n")
        for byte in body[:60]:
            connection.sendall(bytes([byte]))
            if stop.wait(1):
                return

    return talk


def failure(url):
    """Ask for an address; give what failed and after how many seconds."""
    began = time.monotonic()
    try:
        answer = http_fetch()(Request("GET", url, {}, {}))
    except Failed as exc:
        return str(exc), time.monotonic() - began
    return f"no failure: {answer.status}", time.monotonic() - began


def failure_of(talk, stop):
    with raw_server(talk, stop) as url:
        return failure(url)


PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 1000"
REDIRECT = b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 1000"
PACKED = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 1000"
TOO_LONG = "an answer that took more than 30 s"
SLOW = {
    "nothing at all": (lambda connection, stop: stop.wait(15), "timeout", 10),
    "a byte a second": (dripping(PLAIN, b" " * 60), TOO_LONG, 30),
    "a redirect, a byte a second": (dripping(REDIRECT, b" " * 60), TOO_LONG, 30),
    "a gzip, a byte a second": (
        dripping(PACKED, gzip.compress(secrets.token_bytes(999))),
        TOO_LONG,
        30,
    ),
}


@pytest.fixture(scope="module", autouse=True)
def slow_failures():
    """Ask for the slow answers while the other tests run."""
    stop = threading.Event()
    with ThreadPoolExecutor(len(SLOW)) as pool:
        yield {name: pool.submit(failure_of, talk, stop) for name, (talk, _, _) in SLOW.items()}
        stop.set()


def test_a_redirect_with_a_body_of_1_gb_is_not_read_to_its_end():
    sent = 0

    def talk(connection, stop):
        nonlocal sent
        connection.sendall(REDIRECT.replace(b"1000", b"1000000000") + b"\r\n\r\n")
        while sent < 1_000_000_000:
            sent += connection.send(b" " * 1_000_000)

    assert failure_of(talk, threading.Event())[0] == "an answer of more than 16 MiB"
    assert sent < 50_000_000


# The table


SOURCES = {"token": "grant"}
ANSWERS = {name: (source, Answer(*answer)) for name, (source, answer, _) in CASES.items()}
KINDS = {
    name: (answer.status, read_answer(answer, SOURCES.get(source, source), NOW)[0], source)
    for name, (source, answer) in ANSWERS.items()
}


def first_fit(rules, status, body, source):
    """Give what the first row that fits says; None matches everything."""
    answer = (status, body, SOURCES.get(source, source))
    for rule in rules:
        if all(want in (None, got) for want, got in zip(rule, answer, strict=False)):
            return rule.consequence, rule.sentence
    return None


@pytest.mark.parametrize(
    "row", range(len(RULES)), ids=lambda row: "-".join(map(str, RULES[row][:4]))
)
def test_without_any_row_of_the_table_some_answer_has_another_consequence(row):
    shorter = RULES[:row] + RULES[row + 1 :]
    assert [
        name for name in KINDS if first_fit(shorter, *KINDS[name]) != first_fit(RULES, *KINDS[name])
    ]


def test_the_first_row_that_fits_an_answer_counts():
    for status, body, source in KINDS.values():
        rule = rule_for(status, body, SOURCES.get(source, source))
        assert (rule.consequence, rule.sentence) == first_fit(RULES, status, body, source)


# Final answers


FINAL = {name: case for name, case in CASES.items() if case[2].end in {69, 77}}


@pytest.mark.parametrize(("source", "answer", "expected"), FINAL.values(), ids=FINAL)
def test_what_is_final_at_first_is_retried_after_a_good_answer(
    source, answer, expected, world, caplog
):
    reddit = Reddit(access_to(world, source), http_fetch(), world.clock)
    batches = stream(reddit, ["python"], Nothing(), chance=lambda: 0.0)
    assert len(next(batches).posts) == 3
    if source == "token":
        world.revoke_tokens()
    world.script(answer, answer, answer, on=ON[source])
    world.add(make_post(3, NOW + 9))
    with caplog.at_level(logging.WARNING, "redpipe"):
        assert len(next(batches).posts) == 4
    said = [record.getMessage() for record in caplog.records]
    if expected.end == 69:
        trouble = f"{expected.said[0]}; asking again from time to time"
        assert said == [trouble, "r/python can be read again"]
    else:
        assert said == [f"{expected.said[0]}; trying again", "Reddit answers again"]


def test_a_second_401_in_a_row_is_final(world, caplog):
    world.script(error_reply(401, "Unauthorized"), HTML_401)
    sentence = f"Reddit refuses the token (401){CREDENTIALS}"
    expected = final(77, sentence)._replace(asked=("token", "oauth"))
    assert outcome(world, "oauth", caplog) == expected


def test_two_401s_that_are_not_in_a_row_are_two_renewals(world):
    world.script(error_reply(401, "Unauthorized"), None, HTML_401)
    reddit = Reddit(access_to(world, "oauth"), http_fetch(), world.clock)
    batches = stream(reddit, ["python"], Nothing())
    assert [len(next(batches).posts), len(next(batches).posts)] == [3, 3]
    asked = [source_of(seen.path) for seen in world.log]
    assert asked == ["token", "oauth", "token", "oauth", "oauth", "token", "oauth"]


# --once


def follow_once(reddit, clock, source="oauth"):
    """Run one poll of r/python without a socket."""
    access = Access("", "app-id", "app-secret") if source == "oauth" else Access()
    source = Reddit(access, fetch_from(reddit, clock, latency=0), clock)
    return list(stream(source, ["python"], Nothing(), once=True))


@pytest.fixture
def clock():
    return VirtualClock(NOW)


@pytest.fixture
def offline(clock):
    """Give a FakeReddit without a socket that lists three posts in r/python."""
    reddit = FakeReddit(clock)
    for post in POSTS:
        reddit.add(post)
    return reddit


@pytest.mark.parametrize("answer", [SERVER_ERROR, RESET, login_page(), error_reply(408, "")])
def test_once_gives_up_after_two_minutes_of_failures_with_a_last_try(
    answer, offline, clock, caplog
):
    offline.faults = lambda method, path, query: answer
    with caplog.at_level(logging.WARNING, "redpipe"), pytest.raises(Failed) as caught:
        follow_once(offline, clock)
    assert caught.value.exit_status == 75
    assert offline.log[-1].time - NOW == pytest.approx(120)
    assert clock.now - NOW == pytest.approx(120)
    assert caplog.records == []


def test_once_gives_up_after_two_minutes_of_silence(offline, clock):
    offline.faults = lambda method, path, query: HANG
    with pytest.raises(Failed, match="hang"):
        follow_once(offline, clock)
    assert 105 < offline.log[-1].time - NOW <= 120
    assert clock.now == offline.log[-1].time + 10


def test_once_survives_failures_that_end_within_two_minutes(offline, clock):
    offline.faults = lambda *request: SERVER_ERROR if clock.now < NOW + 119 else None
    assert [len(batch.posts) for batch in follow_once(offline, clock)] == [3]
    assert clock.now - NOW < 120.01


def test_once_waits_8_minutes_for_the_budget(offline, clock):
    offline.script(too_many(retry_after="300"), too_many(retry_after="170"))
    assert [len(batch.posts) for batch in follow_once(offline, clock)] == [3]
    assert clock.now - NOW == 470


def test_once_does_not_wait_longer_than_8_minutes_for_the_budget(offline, clock):
    offline.script(too_many(retry_after="300"), too_many(retry_after="181"))
    with pytest.raises(Failed, match="budget") as caught:
        follow_once(offline, clock)
    assert caught.value.exit_status == 75
    assert clock.now - NOW == 300


def test_waiting_for_the_budget_takes_nothing_from_the_two_minutes(offline, clock):
    offline.script(SERVER_ERROR, SERVER_ERROR, too_many(retry_after="400"))
    offline.faults = lambda method, path, query: (
        SERVER_ERROR if clock.now < NOW + 515 and "/new" in path else None
    )
    assert [len(batch.posts) for batch in follow_once(offline, clock)] == [3]


@pytest.mark.parametrize("answer", [T5, page_of(), login_page(), page_of(None)])
def test_a_page_without_posts_ends_no_walk(answer, offline, clock):
    for n in range(3, 303):
        offline.add(make_post(n, NOW - 1000 + n))
    offline.script(None, answer)
    assert [len(batch.posts) for batch in follow_once(offline, clock)] == [303]


# The feed


def feed_rows(world, tmp_path, **access):
    """Store r/python once; give the rows without stored_utc."""
    world.anonymous_json_blocked = True
    reddit = Reddit(Access(world.url, **access), http_fetch(), world.clock)
    with Database(str(tmp_path / "posts.db"), clock=world.clock) as database:
        for batch in stream(reddit, ["python"], database, once=True):
            load(database, map(transform, batch.posts), batch.cursors, batch.gaps)
        return list(database.execute("SELECT * FROM posts ORDER BY created_utc"))


def test_the_feed_gives_every_column_but_the_account_id(world, tmp_path):
    world.add(make_post(3, NOW - 10, author="[deleted]", title='<b> & "it" &amp; \u202e\U0001f600'))
    rows = feed_rows(world, tmp_path)
    link = "/r/python/comments/1tq0003/invented_post_number_3/"
    title = '<b> & "it" &amp; \u202e\U0001f600'
    assert rows[3] == ("1tq0003", NOW - 10, "python", title, None, None, link, NOW)
    link = "/r/python/comments/1tq0002/invented_post_number_2/"
    title = "Invented post number 2"
    assert rows[2] == ("1tq0002", NOW - 98, "python", title, None, "invented_2", link, NOW)


def test_the_feed_is_paged_to_its_end(world, tmp_path):
    ids = IDS + [world.add(make_post(n, NOW - 1000 + n))["id"] for n in range(3, 253)]
    rows = feed_rows(world, tmp_path)
    assert {row[0] for row in rows} == set(ids)
    assert [(source_of(seen.path), seen.query.get("after")) for seen in world.log][:4] == [
        ("json", None),
        ("feed", None),
        ("feed", f"t3_{rows[-100][0]}"),
        ("feed", f"t3_{rows[-200][0]}"),
    ]
    assert len(world.log) <= 6


def test_an_entry_without_an_id_ends_no_page(world, tmp_path):
    posts = [make_post(n, NOW - n) for n in range(100)]
    first = atom_feed(posts, "python", NOW).replace(b"</feed>", b"<entry/></feed>")
    world.script(None, (200, ATOM, first), on="/new")
    feed_rows(world, tmp_path)
    anchors = [seen.query.get("after") for seen in world.log]
    assert anchors[:3] == [None, None, f"t3_{posts[-1]['id']}"]
    assert len(anchors) <= 6


def test_a_page_that_repeats_itself_is_the_end(world, tmp_path):
    page = atom_feed([make_post(n, NOW - n) for n in range(100)], "python", NOW)
    world.faults = lambda method, path, query: (200, ATOM, page) if ".rss" in path else None
    assert len(feed_rows(world, tmp_path)) == 100
    assert [source_of(seen.path) for seen in world.log] == ["json", "feed", "feed"]


def test_the_block_page_is_a_notice_given_once(world, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "redpipe"):
        feed_rows(world, tmp_path)
    said = [record.getMessage() for record in caplog.records]
    assert said == ["Reddit blocks anonymous JSON (403); taking the feed, which has no account ids"]


def test_the_feed_token_and_its_user_go_to_the_feed_alone(world, tmp_path):
    world.feed_tokens["feed-secret"] = "somebody"
    assert len(feed_rows(world, tmp_path, feed_token="feed-secret", username="somebody")) == 3
    assert [seen.query for seen in world.log[:2]] == [
        {"limit": "100", "raw_json": "1"},
        {"limit": "100", "feed": "feed-secret", "user": "somebody"},
    ]
    assert not any("feed-secret" in str(seen.headers) + str(seen.body) for seen in world.log)


def test_the_feed_token_is_not_sent_where_a_token_of_an_app_is_used(world):
    access = Access(world.url, "app-id", "app-secret", "somebody", "feed-secret")
    assert len(first_batch(world, access).posts) == 3
    assert not any("feed-secret" in str(seen) for seen in world.log)


def test_an_entry_without_any_field_but_its_id_is_stored(world, tmp_path):
    entry = "<entry><id>t3_abc</id></entry><entry><id>t1_abd</id></entry><entry/>"
    feed = f'<feed xmlns="http://www.w3.org/2005/Atom">{entry}</feed>'
    world.script(reply(200, feed, ATOM), on=".rss")
    rows = feed_rows(world, tmp_path)
    assert rows[0] == ("abc", None, None, None, None, None, None, NOW)
    assert [row[0] for row in rows[1:]] == IDS  # what later pages hold


# The built file


def too_long_a_name(fake):
    fake.longest_target = 10


ENDS = {
    "private": (
        lambda fake: fake.refuse("python"),
        (69, "", "redpipe: r/python cannot be read: private (403)\n"),
    ),
    "banned": (
        lambda fake: fake.refuse("python", "banned"),
        (69, "", "redpipe: r/python cannot be read: banned (404)\n"),
    ),
    "mistyped": (lambda fake: None, (69, "", "redpipe: r/python does not exist\n")),
    "blocked": (
        lambda fake: fake.script(block_page(), block_page()),
        (77, "", f"redpipe: {BLOCKED}\n"),
    ),
    "414": (too_long_a_name, (64, "", "redpipe: too many names for one listing (414)\n")),
    "no budget": (
        lambda fake: fake.script(too_many(retry_after="900")),
        (75, "", "redpipe: Reddit's budget is used up for 900 s more\n"),
    ),
}


@pytest.mark.parametrize(("arrange", "expected"), ENDS.values(), ids=ENDS)
def test_the_built_file_ends_with_one_line_and_the_exit_status(
    arrange, expected, redpipe, fake_reddit, tmp_path
):
    arrange(fake_reddit)
    assert redpipe("--once", tmp_path / "posts.db", "python") == expected


def test_the_built_file_ends_with_77_when_the_credentials_are_refused(redpipe, tmp_path):
    done = redpipe(
        tmp_path / "posts.db", REDDIT_CLIENT_ID="app-id", REDDIT_CLIENT_SECRET="a-wrong-one"
    )
    sentence = f"redpipe: Reddit refuses the credentials (401){CREDENTIALS}\n"
    assert done == (77, "", sentence)


# Recorded answers


def joined(value):
    """Write a header that came several times as clients see it."""
    return ", ".join(value) if isinstance(value, list) else value


@pytest.fixture(scope="module")
def recorded(samples):
    """Give the recorded errors as (address, Answer)."""
    found = [json.loads(path.read_bytes()) for path in sorted(samples.glob("errors/*.json"))]
    return [
        (
            error["request"]["url"],
            Answer(
                error["status"],
                {name.lower(): joined(value) for name, value in error["headers"].items()},
                error["body"].encode(),
            ),
        )
        for error in found
    ]


def verdict(answer, source, clock):
    """Let a source answer with nothing else; tell what becomes of the second request."""
    usual = {
        "token": Answer(200, {}, b'{"access_token": "x", "expires_in": 3600}'),
        "oauth": Answer(*page_of()),
        "json": Answer(*block_page()),
        source: answer,
    }
    access = Access("", "id", "secret") if source in {"token", "oauth"} else Access()
    reddit = Reddit(access, lambda request: usual[source_of(request.url)], clock)
    with contextlib.suppress(RedpipeError):  # the block page, the first 401
        reddit.page(["python"])
    try:
        reddit.page(["python"])
    except RedpipeError as exc:
        return type(exc).__name__
    return "good"


@pytest.mark.parametrize("source", ["oauth", "json", "feed"])
def test_every_recorded_error_has_a_sensible_consequence(source, recorded, clock):
    counted = Counter((verdict(answer, source, clock), answer.status) for _, answer in recorded)
    assert counted == {
        ("AskAgain", 429): 2,
        ("BadUsage", 414): 1,
        ("Failed", 200): 62,  # what other requests were answered with, and tokens
        ("Failed", 301): 4,
        ("Failed", 302): 20,
        ("Failed", 400): 33,
        ("Failed", 409): 3,
        ("Failed", 413): 2,
        ("Failed", 415): 1,
        ("Failed", 451): 1,
        ("Failed", 500): 2,
        ("Failed", 502): 1,
        ("Failed", 503): 2,
        ("Failed", 504): 1,
        ("Failed", 520): 1,
        ("Failed", 522): 1,
        ("Gone", 302): 2,  # to the search
        ("Gone", 403): 20,
        ("Gone", 404): 11,
        ("Refused", 401): 7,
    }


def test_every_recorded_answer_to_a_request_for_a_token_is_understood(recorded, clock):
    counted = Counter(
        (verdict(answer, "token", clock), answer.status)
        for url, answer in recorded
        if "access_token" in url
    )
    assert counted == {
        ("AskAgain", 429): 1,
        ("Refused", 200): 5,
        ("Refused", 400): 2,
        ("Refused", 401): 1,
        ("good", 200): 17,
    }


# The slow answers again


@pytest.mark.parametrize("name", SLOW)
def test_an_answer_that_is_too_slow_is_given_up_in_time(name, slow_failures):
    _, sentence, seconds = SLOW[name]
    said, took = slow_failures[name].result(100)
    assert said.endswith(sentence)
    assert seconds <= took < seconds + 5
