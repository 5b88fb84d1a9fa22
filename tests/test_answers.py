"""What each answer of Reddit leads to: waiting, a new token, the feed, an end, or posts.

CASES is the table: each of its rows is asked for through a real server, while the waiting is
done by a virtual clock. With REDPIPE_SAMPLES the recorded answers go through it as well.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import re
import secrets
import socket
import threading
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from email.utils import formatdate
from typing import NamedTuple

import pytest

from conftest import kept_waiting
from fake_reddit import (
    ATOM,
    GIANT,
    HANG,
    HTML,
    REFUSE,
    RESET,
    TRUNCATE,
    FakeReddit,
    atom_feed,
    block_page,
    encoded,
    error_reply,
    gzip_bomb,
    gzipped,
    json_reply,
    login_page,
    make_post,
    moved,
    reply,
    thing,
)
from pipeline import (
    COLUMNS,
    RULES,
    Access,
    Answer,
    AskAgain,
    Database,
    Failed,
    Gone,
    Reddit,
    RedpipeError,
    Refused,
    Request,
    decoded,
    http_fetch,
    kind_of,
    load,
    read_value,
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

    def cursor(self, name):
        return None

    def rates(self):
        return {}

    def unstored(self, posts):
        return list(posts)


class Outcome(NamedTuple):
    """Hold what an answer leads to.

    asked: who was asked after it, until posts came; waited: seconds for the budget;
    end: the exit status, when it was final; said: what the errors say that are failures.
    """

    asked: tuple[str, ...] = ()
    waited: float = 0.0
    end: int = 0
    said: tuple[str, ...] = ()
    posts: tuple[str, ...] = tuple(IDS[::-1])


def retried(sentence, *asked):
    return Outcome(asked, said=(sentence,))


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
FEED_BLOCKED = (
    "Reddit blocks this address, or the subreddit is private or quarantined (403)" + CREDENTIALS
)
NOT_THERE = "does not exist, or is banned (404)"
LEGAL = "cannot be read for legal reasons (451)"
NO_POSTS = "a listing without posts"
NO_LISTING = "HTTP 200 (no reason given) instead of a listing"
TEXT = "text/html"
RENEWED = Outcome(("token", "oauth"))
TAKEN = Outcome(("feed",))


T5 = page_of({"kind": "t5", "data": {"id": "2zzzz", "name": "t5_2zzzz"}})


WHOLE = page_of(*map(json.loads, map(thing, POSTS[::-1])))
"""The three posts as a listing."""


# who is asked, what comes, what follows
CASES = {
    # with a token
    "a listing": ("oauth", WHOLE, Outcome()),
    "401 JSON": ("oauth", error_reply(401, "Unauthorized"), RENEWED),
    "401 HTML": ("oauth", HTML_401, RENEWED),
    "403 JSON with a reason": (
        "oauth",
        error_reply(403, "Forbidden", reason="private"),
        final(69, "cannot be read: private (403)"),
    ),
    "403 JSON without a reason": (
        "oauth",
        error_reply(403, "Forbidden"),
        final(69, "cannot be read: Forbidden (403)"),
    ),
    "403 JSON without a word": (
        "oauth",
        json_reply(403, {}),
        final(69, "cannot be read: no reason given (403)"),
    ),
    "404 JSON with a reason": (
        "oauth",
        error_reply(404, "Not Found", reason="banned"),
        final(69, "cannot be read: banned (404)"),
    ),
    "404 JSON without a reason": (
        "oauth",
        error_reply(404, "Not Found"),
        final(69, "cannot be read: Not Found (404)"),
    ),
    "404 HTML": (
        "oauth",
        reply(404, "<html>", HTML),
        retried(f"HTTP 404 ({TEXT}) instead of a listing", "oauth"),
    ),
    "the block page": ("oauth", block_page(), final(77, BLOCKED)),
    "403 with a JSON list": ("oauth", json_reply(403, []), final(77, BLOCKED)),
    "403 with a listing": (
        "oauth",
        (403, *page_of()[1:]),
        retried("HTTP 403 (application/json) instead of a listing", "oauth"),
    ),
    "302 to the search": (
        "oauth",
        moved("https://www.reddit.com/subreddits/search?q=pyhton"),
        final(69, "does not exist"),
    ),
    "302 to the search, relative": (
        "oauth",
        moved("/subreddits/search.json?q=pyhton"),
        final(69, "does not exist"),
    ),
    "302 elsewhere": (
        "oauth",
        moved("https://www.reddit.com/"),
        retried("HTTP 302 (redirect to /) instead of a listing", "oauth"),
    ),
    "302 to a login that mentions the search": (
        "oauth",
        moved("https://www.reddit.com/login/?dest=/subreddits/search"),
        retried("HTTP 302 (redirect to /login/) instead of a listing", "oauth"),
    ),
    "302 to nowhere": (
        "oauth",
        moved("http://[broken"),
        retried("HTTP 302 (redirect to another page) instead of a listing", "oauth"),
    ),
    "400 JSON": (
        "oauth",
        error_reply(400, "Bad Request"),
        retried("HTTP 400 (Bad Request) instead of a listing", "oauth"),
    ),
    "408": ("oauth", reply(408), retried("HTTP 408 (empty) instead of a listing", "oauth")),
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
    "451": ("oauth", reply(451), final(69, LEGAL)),
    "451 HTML": ("json", reply(451, "<html>", HTML), final(69, LEGAL)),
    "451 JSON": ("feed", error_reply(451, "x"), final(69, LEGAL)),
    **{
        str(status): (
            "oauth",
            reply(status, "<html>", HTML),
            retried(f"HTTP {status} ({TEXT}) instead of a listing", "oauth"),
        )
        for status in (500, 501, 502, 503, 504, 520, 522)
    },
    "500 JSON": (
        "oauth",
        SERVER_ERROR,
        retried("HTTP 500 (Internal Server Error) instead of a listing", "oauth"),
    ),
    "503 with Retry-After": (
        "oauth",
        reply(503, headers={"retry-after": "20"}),
        retried("HTTP 503 (empty) instead of a listing", "oauth")._replace(waited=20.0),
    ),
    "200 with HTML": (
        "oauth",
        login_page(),
        retried(f"HTTP 200 ({TEXT}) instead of a listing", "oauth"),
    ),
    "200 with nothing": (
        "oauth",
        reply(200),
        retried("HTTP 200 (empty) instead of a listing", "oauth"),
    ),
    "200 with an error's name": (
        "oauth",
        json_reply(200, {"error": "invalid_grant"}),
        retried("HTTP 200 (invalid_grant) instead of a listing", "oauth"),
    ),
    "200 with an error's number": (
        "oauth",
        json_reply(200, {"error": 503}),
        retried("HTTP 200 (Service Unavailable) instead of a listing", "oauth"),
    ),
    "200 with a token": (
        "oauth",
        json_reply(200, {"access_token": "x"}),
        retried(NO_LISTING, "oauth"),
    ),
    "200 with a JSON list": (
        "oauth",
        json_reply(200, [{"kind": "Listing"}]),
        retried("HTTP 200 (application/json) instead of a listing", "oauth"),
    ),
    "a listing of t5": (
        "oauth",
        T5,
        retried(NO_POSTS, "oauth"),
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
        retried(NO_POSTS, "oauth"),
    ),
    "half a listing": (
        "oauth",
        reply(200, page_of(*map(json.loads, map(thing, POSTS)))[2][:999]),
        retried("HTTP 200 (application/json) instead of a listing", "oauth"),
    ),
    "JSON that nests without end": (
        "oauth",
        reply(200, '{"kind": "Listing", "data": ' + "[" * 100_000),
        retried("HTTP 200 (application/json) instead of a listing", "oauth"),
    ),
    "bytes that are no UTF-8": (
        "oauth",
        reply(200, b'{"kind": "\xff\xfe"}'),
        retried("HTTP 200 (application/json) instead of a listing", "oauth"),
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
        retried("HTTP 404 (Not Found) instead of a token", "token", "oauth"),
    ),
    "no token: 500": (
        "token",
        SERVER_ERROR,
        retried("HTTP 500 (Internal Server Error) instead of a token", "token", "oauth"),
    ),
    "no token: 503 with Retry-After": (
        "token",
        reply(503, headers={"retry-after": "20"}),
        retried("HTTP 503 (empty) instead of a token", "token", "oauth")._replace(waited=20.0),
    ),
    "no token: 200 with HTML": (
        "token",
        login_page(),
        retried("HTTP 200 (text/html) instead of a token", "token", "oauth"),
    ),
    "no token: an empty one": (
        "token",
        json_reply(200, {"access_token": "", "expires_in": 3600}),
        retried("HTTP 200 (no reason given) instead of a token", "token", "oauth"),
    ),
    "no token: one that is two lines": (
        "token",
        json_reply(200, {"access_token": "a\r\nHost: b", "expires_in": 3600}),
        retried("HTTP 200 (no reason given) instead of a token", "token", "oauth"),
    ),
    "a token that does not say how long it lasts": (
        "token",
        json_reply(200, {"access_token": "of-another"}),
        Outcome(("oauth", "token", "oauth")),  # the server does not know it
    ),
    # without credentials
    "anonymous: the block page": ("json", block_page(), TAKEN),
    "anonymous: an empty 403": ("json", reply(403), TAKEN),
    "anonymous: 403 JSON": (
        "json",
        error_reply(403, "Forbidden", reason="quarantined"),
        final(69, "cannot be read: quarantined (403)"),
    ),
    "anonymous: 404 JSON": (
        "json",
        error_reply(404, "Not Found", reason="banned"),
        final(69, "cannot be read: banned (404)"),
    ),
    "anonymous: 401 JSON": (
        "json",
        error_reply(401, "Unauthorized"),
        final(77, f"Reddit wants credentials (401){CREDENTIALS}"),
    ),
    "anonymous: 429 without advice": ("json", reply(429), again("json", 12.0)),
    **{
        f"anonymous: {name}": ("json", answer, TAKEN)
        for name, answer in {
            "200 with HTML": login_page(),
            "200 with text": reply(200, "OK", {"content-type": "text/plain"}),
            "200 with a JSON list": json_reply(200, []),
            "a feed": reply(200, atom_feed(POSTS, "python", NOW), ATOM),
            "302 to a login": moved("https://www.reddit.com/login/?dest=%2Fr%2Fpython"),
            "307 to elsewhere": moved("https://www.reddit.com/", 307),
            "302 with an empty object": (302, {"location": "/login.json"}, b"{}"),
            "301 without a body": reply(301, "", {"location": "/account/login"}),
            "401 HTML": HTML_401,
            "404 HTML": reply(404, "<html>", HTML),
            "404 with nothing": reply(404),
            "410 HTML": reply(410, "<html>", HTML),
            "200 in br": encoded(page_of(), "br", b"\x8b\x05\x80rubbish"),
            "the block page in br": encoded(block_page(), "br"),
            "the block page in zstd": encoded(block_page(), "zstd"),
            "the block page in rubbish": encoded(block_page(), "gzip"),
            "an empty 403 in gzip": encoded(reply(403), "gzip"),
            "an empty 404 in br": encoded(reply(404), "br"),
        }.items()
    },
    **{
        f"anonymous: {name}": ("json", answer, retried(f"HTTP {came} instead of a listing", "json"))
        for name, (answer, came) in {
            "200 with nothing": (reply(200), "200 (empty)"),
            "200 with nothing in gzip": (encoded(reply(200), "gzip"), "200 (empty)"),
            "200 with an object": (json_reply(200, {"error": 403}), "200 (Forbidden)"),
            "half a listing": (reply(200, page_of()[2][:30]), "200 (application/json)"),
            "408 HTML": (reply(408, "<html>", HTML), "408 (text/html)"),
            "500 HTML": (reply(500, "<html>", HTML), "500 (text/html)"),
            "503 in br": (encoded(reply(503, "?", HTML), "br"), "503 (text/html)"),
            "410 JSON": (error_reply(410, "Gone"), "410 (Gone)"),
        }.items()
    },
    "anonymous: 200 that cannot be decoded": (
        "json",
        encoded(page_of(), "gzip"),
        retried("decode error", "json"),
    ),
    # bodies in other forms
    **{
        f"a listing {name}": ("oauth", answer, Outcome())
        for name, answer in {
            "in gzip": gzipped(WHOLE),
            "in three members": gzipped(WHOLE, 3),
            "with bytes behind it": gzipped(WHOLE, 1, b"\0" * 9 + b"rubbish"),
            "with a newline behind it": gzipped(WHOLE, 2, b"\r\n"),
            "in identity": encoded(WHOLE, "identity"),
            "in no encoding": encoded(WHOLE, ""),
            "in capitals": encoded(WHOLE, "GZIP", gzip.compress(WHOLE[2])),
            "in deflate": encoded(WHOLE, "deflate", zlib.compress(WHOLE[2])),
            "behind a byte-order mark": reply(200, b"\xef\xbb\xbf" + WHOLE[2]),
            "of another type": reply(200, WHOLE[2], {"content-type": "text/plain"}),
        }.items()
    },
    **{
        f"429, {name}": ("oauth", encoded(answer, encoding), again("oauth", 6.0))
        for encoding in ("gzip", "br", "zstd", "identity", "deflate", "compress")
        for name, answer in {
            f"nothing in {encoding}": reply(429, "", {"retry-after": "6"}),
            f"rubbish in {encoding}": reply(429, b"\x1f\x8b\0rubbish", {"retry-after": "6"}),
        }.items()
    },
    "403 JSON in gzip": (
        "oauth",
        gzipped(error_reply(403, "Forbidden", reason="private")),
        final(69, "cannot be read: private (403)"),
    ),
    "403 in zstd": ("oauth", encoded(reply(403, "?"), "zstd"), final(77, BLOCKED)),
    "no token: 429 in gzip": (
        "token",
        encoded(reply(429, "", {"retry-after": "6"}), "gzip"),
        Outcome(("token", "oauth"), 6.0),
    ),
    "no token: 401 in br": (
        "token",
        encoded(reply(401), "br"),
        final(77, f"Reddit refuses the credentials (401){CREDENTIALS}"),
    ),
    # what answers say of themselves
    "403 with the error's number alone": (
        "oauth",
        json_reply(403, {"error": 403}),
        final(69, "cannot be read: Forbidden (403)"),
    ),
    "200 with an error that has no name": (
        "oauth",
        json_reply(200, {"error": 520}),
        retried("HTTP 200 (error 520) instead of a listing", "oauth"),
    ),
    "403 with what is no word": (
        "oauth",
        json_reply(403, {"reason": "x" * 21, "message": ["a"], "error": "a1b2c3"}),
        final(69, "cannot be read: no reason given (403)"),
    ),
    "302 to a path that is no name": (
        "oauth",
        moved("/" + "x" * 22),
        retried("HTTP 302 (redirect to another page) instead of a listing", "oauth"),
    ),
    "a type that is none": (
        "oauth",
        reply(200, "?", {"content-type": "a-s3cret"}),
        retried("HTTP 200 (of unknown type) instead of a listing", "oauth"),
    ),
    "no token: a description": (
        "token",
        json_reply(400, {"error": "invalid_grant", "error_description": "The app is unknown."}),
        final(
            77, f"Reddit refuses the credentials (invalid_grant: The app is unknown.){CREDENTIALS}"
        ),
    ),
    "no token: 503 with a description": (
        "token",
        json_reply(503, {"error": "server_error", "error_description": "Try later (busy)."}),
        retried("HTTP 503 (server_error: Try later (busy).) instead of a token", "token", "oauth"),
    ),
    "no token: 302 to a login": (
        "token",
        moved("/login/"),
        retried("HTTP 302 (redirect to /login/) instead of a token", "token", "oauth"),
    ),
    "no token: an empty 200": (
        "token",
        encoded(reply(200), "gzip"),
        retried("HTTP 200 (empty) instead of a token", "token", "oauth"),
    ),
    # the feed
    "the feed": (
        "feed",
        reply(200, atom_feed(POSTS[::-1], "python", NOW), ATOM),
        Outcome(),
    ),
    "the feed: the block page": ("feed", block_page(), final(77, FEED_BLOCKED)),
    "the feed: 302 to the search": (
        "feed",
        moved("https://www.reddit.com/subreddits/search.rss?q=pyhton"),
        final(69, "does not exist"),
    ),
    "the feed: 404 HTML": ("feed", reply(404, "<html>", HTML), final(69, NOT_THERE)),
    "the feed: 404 with nothing": ("feed", reply(404), final(69, NOT_THERE)),
    "the feed: 403 with nothing": ("feed", reply(403), final(77, FEED_BLOCKED)),
    "the feed: 401 HTML": (
        "feed",
        HTML_401,
        final(77, f"Reddit wants credentials (401){CREDENTIALS}"),
    ),
    "the feed: a login page": (
        "feed",
        login_page(),
        retried("HTTP 200 (text/html) instead of a listing", "feed"),
    ),
    "the feed: 404 JSON": (
        "feed",
        error_reply(404, "Not Found", reason="banned"),
        final(69, "cannot be read: banned (404)"),
    ),
    "the feed: 429 with Retry-After": (
        "feed",
        too_many(retry_after="60"),
        Outcome(("feed",), 60.0),
    ),
    "the feed: 429 without advice": ("feed", reply(429), Outcome(("feed",), 12.0)),
    "the feed: with a DOCTYPE": (
        "feed",
        reply(200, DOCTYPE + atom_feed(POSTS, "python", NOW).decode().partition("?>")[2], ATOM),
        retried("HTTP 200 (application/atom+xml) instead of a listing", "feed"),
    ),
    "the feed: half of it": (
        "feed",
        reply(200, atom_feed(POSTS, "python", NOW)[:999], ATOM),
        retried("HTTP 200 (application/atom+xml) instead of a listing", "feed"),
    ),
    "the feed: another XML": (
        "feed",
        reply(200, "<rss><channel/></rss>", {"content-type": "text/xml"}),
        retried("HTTP 200 (text/xml) instead of a listing", "feed"),
    ),
    "the feed: a listing": ("feed", page_of(), retried(NO_LISTING, "feed")),
    "the feed: 200 with nothing": (
        "feed",
        reply(200),
        retried("HTTP 200 (empty) instead of a listing", "feed"),
    ),
}
# what the connection does, and what is said of it
FAULTS = {
    "closed without a word": (REFUSE, "connection error"),
    "reset": (RESET, "Connection reset by peer"),
    "cut short": (TRUNCATE, "protocol error"),
    "a body of 1 GB": (GIANT, "response larger than 16 MiB"),
    "a small body that unpacks to 64 MiB": (gzip_bomb(64), "response larger than 16 MiB"),
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


def outcome(world, source):
    """Ask for r/python until posts or the end come; tell all that was seen of it."""
    reddit = Reddit(access_to(world, source), http_fetch(), world.clock)
    posts, end, said = [], 0, []
    began = world.clock.time()
    while not (posts or end):
        world.clock.sleep(reddit.budget.wait(1, world.clock.monotonic()))
        try:
            posts = reddit.page("python").posts
        except AskAgain:
            pass
        except RedpipeError as exc:
            said.append(str(exc))
            end = exc.exit_status if isinstance(exc, (Gone, Refused)) else 0
    asked = [source_of(seen.path) for seen in world.log]
    after = tuple(asked[asked.index(source) + 1 :])
    waited = round(world.clock.time() - began, 3)
    return Outcome(after, waited, end, tuple(said), tuple(post["id"] for post in posts))


@pytest.mark.parametrize(("source", "answer", "expected"), CASES.values(), ids=CASES)
def test_every_answer_has_its_consequence(source, answer, expected, world):
    world.script(answer, on=ON[source])
    assert outcome(world, source) == expected


@pytest.mark.parametrize(("fault", "sentence"), FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("source", ["token", "oauth", "json", "feed"])
def test_a_connection_that_fails_is_tried_again(source, fault, sentence, world):
    # A used connection that was dropped is tried once more at once, in silence.
    again = source in {"oauth", "feed"} and fault in (REFUSE, RESET)
    world.script(*[fault] * (2 if again else 1), on=ON[source])
    asked = ("token", "oauth") if source == "token" else (source,) * (2 if again else 1)
    assert outcome(world, source) == retried(sentence, *asked)


def test_a_refused_connection_is_tried_again(world, caplog):
    access = access_to(world, "json")
    world.stop()
    reddit = Reddit(access, http_fetch(), world.clock)
    with pytest.raises(Failed, match=r"^Connection refused$"):
        reddit.page("python")
    world.start()
    assert [post["id"] for post in reddit.page("python").posts] == IDS[::-1]


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
    began = time.monotonic() + kept_waiting("thread-self")
    try:
        said = f"no failure: {http_fetch()(Request('GET', url, {}, {})).status}"
    except Failed as exc:
        said = str(exc)
    return said, time.monotonic() - kept_waiting("thread-self") - began


def failure_of(talk, stop):
    with raw_server(talk, stop) as url:
        return failure(url)


PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 1000"
REDIRECT = b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 1000"
PACKED = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 1000"
ENDLESS = b"\x1f\x8b\x08\x08" + bytes(6) + b"a name without end"
"""A gzip that unpacks to nothing, however much of it has come."""
TOO_LONG = "response took longer than 30 s"
SLOW = {
    "nothing at all": (lambda connection, stop: stop.wait(15), "timeout", 10),
    "a byte a second": (dripping(PLAIN, b" " * 60), TOO_LONG, 30),
    "a redirect, a byte a second": (dripping(REDIRECT, b" " * 60), "no failure: 302", 30),
    "a gzip, a byte a second": (
        dripping(PACKED, gzip.compress(secrets.token_bytes(999))),
        TOO_LONG,
        30,
    ),
    "a gzip of nothing, a byte a second": (dripping(PACKED, ENDLESS + b"a" * 60), TOO_LONG, 30),
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

    assert failure_of(talk, threading.Event())[0] == "no failure: 302"
    assert sent < 50_000_000


def test_a_gzip_of_nothing_without_end_is_not_read_to_its_end():
    def talk(connection, stop):
        connection.sendall(PACKED.replace(b"1000", b"1000000000") + b"\r\n\r\n" + ENDLESS)
        while True:
            connection.send(b"a" * 1_000_000)

    assert failure_of(talk, threading.Event())[0] == "response larger than 16 MiB"


@pytest.mark.timeout(60)
def test_very_many_gzip_members_of_nothing_take_a_second():
    assert decoded(gzip.compress(b"") * 150_000, "gzip") == b""


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (b"Content-Length: 100", b"abc"),
        (b"Transfer-Encoding: chunked", b"64\r\nabc"),
        (b"Transfer-Encoding: chunked", b"no length\r\n"),
        (b"Content-Encoding: gzip\r\nContent-Length: 100", b"\x1f\x8b"),
        (b"Content-Length: 20000000", b" " * 20_000_000),
        (b"Content-Encoding: gzip\r\nConnection: close", gzip.compress(b" " * 20_000_000)),
    ],
)
def test_status_and_headers_count_if_the_body_beside_an_error_is_no_good(head, body):
    def talk(connection, stop):
        connection.sendall(b"HTTP/1.1 429 No\r\nRetry-After: 6\r\n" + head + b"\r\n\r\n" + body)

    with raw_server(talk, threading.Event()) as url:
        status, headers, body = http_fetch()(Request("GET", url, {}, {}))
    assert (status, headers["retry-after"], body) == (429, "6", b"")


# Connections that were used before


def ports(world):
    """Give a fetch on the world's clock, and the ports that it asked from."""
    seen = []
    handle = world.handle

    def noted(*request):
        seen.append(next(iter(world._server.connections)).getpeername()[1])
        return handle(*request)

    world.handle = noted
    return http_fetch(world.clock), seen


def listing_of(world):
    return Request("GET", f"{world.url}/r/python/new/.json", {"raw_json": "1"}, {})


@pytest.mark.parametrize(("idle", "connections"), [(0, 1), (49, 1), (50, 2), (3600, 2)])
def test_a_connection_that_was_idle_for_50_seconds_is_not_used_again(idle, connections, world):
    fetch, asked_from = ports(world)
    fetch(listing_of(world))
    world.clock.sleep(idle)
    assert fetch(listing_of(world)).status == 200
    assert len(asked_from) == 2
    assert len(set(asked_from)) == connections


def test_a_connection_that_was_dropped_meanwhile_costs_no_failure(world):
    world.idle_limit = 30
    fetch = http_fetch(world.clock)
    for _ in range(3):
        assert fetch(listing_of(world)).status == 200
        world.clock.sleep(40)
    assert len(world.log) == 3


@pytest.mark.parametrize("fault", [RESET, REFUSE])
def test_a_used_connection_that_fails_is_tried_once_more_and_no_oftener(fault, world, caplog):
    fetch = http_fetch(world.clock)
    fetch(listing_of(world))
    world.script(fault)
    with caplog.at_level(logging.DEBUG, "redpipe"):
        assert fetch(listing_of(world)).status == 200
    assert caplog.records == []
    world.script(fault, fault)
    with pytest.raises(Failed):
        fetch(listing_of(world))
    assert [seen.status for seen in world.log] == [200, 0, 200, 0, 0]


@pytest.mark.parametrize("fault", [RESET, REFUSE])
def test_a_new_connection_that_fails_is_a_failure(fault, world):
    world.script(fault)
    with pytest.raises(Failed):
        http_fetch(world.clock)(listing_of(world))
    assert len(world.log) == 1


@pytest.mark.parametrize("fault", [TRUNCATE, GIANT])
def test_a_used_connection_that_fails_otherwise_is_a_failure(fault, world):
    fetch = http_fetch(world.clock)
    fetch(listing_of(world))
    world.script(fault)
    with pytest.raises(Failed):
        fetch(listing_of(world))
    assert len(world.log) == 2


# The table


SOURCES = {"token": "grant"}


def kind(source, answer):
    """Give what RULES are asked with."""
    answer, source = Answer(*answer), SOURCES.get(source, source)
    value = read_value(answer.body, source, NOW)
    return f"{answer.status} {kind_of(answer, source, value)} {source}"


KINDS = {name: kind(source, answer) for name, (source, answer, _) in CASES.items()}
KINDS["a login page instead of a feed that has a token"] = kind("own feed", login_page())


def first_fit(rules, answer):
    """Give what the first row that fits says."""
    return next((rule[1:] for rule in rules if re.fullmatch(rule.answers, answer)), None)


@pytest.mark.parametrize("row", range(len(RULES)), ids=lambda row: RULES[row].answers)
def test_without_any_row_of_the_table_some_answer_has_another_consequence(row):
    shorter = RULES[:row] + RULES[row + 1 :]
    assert [
        name for name in KINDS if first_fit(shorter, KINDS[name]) != first_fit(RULES, KINDS[name])
    ]


# Final answers


FINAL = {name: case for name, case in CASES.items() if case[2].end in {69, 77}}


@pytest.mark.parametrize(("source", "answer", "expected"), FINAL.values(), ids=FINAL)
def test_what_is_final_at_first_is_retried_after_a_good_answer(source, answer, expected, world):
    reddit = Reddit(access_to(world, source), http_fetch(), world.clock)
    batches = stream(reddit, ["python"], Nothing(), chance=lambda: 0.0)
    assert len(next(batches).posts) == 3
    if source == "token":
        world.revoke_tokens()
    world.script(answer, answer, answer, on=ON[source])
    world.add(make_post(3, NOW + 9))
    assert len(next(batches).posts) == 4


def test_a_second_401_in_a_row_is_final(world):
    world.script(error_reply(401, "Unauthorized"), HTML_401)
    sentence = f"Reddit refuses the token (401){CREDENTIALS}"
    expected = final(77, sentence)._replace(asked=("token", "oauth"))
    assert outcome(world, "oauth") == expected


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
    assert 105 < round(offline.log[-1].time - NOW, 3) <= 120
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
    with pytest.raises(Failed, match="allows no request") as caught:
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
    """Store r/python once; give the columns that redpipe fills."""
    world.anonymous_json_blocked = True
    reddit = Reddit(Access(world.url, **access), http_fetch(), world.clock)
    with Database(str(tmp_path / "posts.db"), clock=world.clock) as database:
        for batch in stream(reddit, ["python"], database, once=True):
            load(database, map(transform, batch.posts), batch.cursors, batch.gaps)
        columns = ", ".join((*COLUMNS, "stored_utc"))
        return database.execute(f"SELECT {columns} FROM posts ORDER BY created_utc")


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
        (77, "", f"redpipe: {FEED_BLOCKED}\n"),
    ),
    "no budget": (
        lambda fake: fake.script(too_many(retry_after="900")),
        (
            75,
            "",
            (
                "redpipe: r/python: Reddit allows no request for 900 s more; "
                "it answered nothing but 429 (too many requests)\n"
            ),
        ),
    ),
}


@pytest.mark.parametrize(("arrange", "expected"), ENDS.values(), ids=ENDS)
def test_the_built_file_ends_with_one_line_and_the_exit_status(
    arrange, expected, redpipe, fake_reddit, tmp_path
):
    arrange(fake_reddit)
    assert redpipe("--once", tmp_path / "posts.db", "python") == expected


@pytest.mark.parametrize("wrong", ["a-wrong-one", "no-utf-8-\udcff"])
def test_the_built_file_ends_with_77_when_the_credentials_are_refused(wrong, redpipe, tmp_path):
    done = redpipe(tmp_path / "posts.db", REDDIT_CLIENT_ID="app-id", REDDIT_CLIENT_SECRET=wrong)
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
    for _ in range(1 if source == "json" else 2):  # the block page or the first 401 comes first
        try:
            reddit.page("python")
        except RedpipeError as exc:
            said = next(k for k in (Gone, Refused, AskAgain, Failed) if isinstance(exc, k)).__name__
        else:
            said = "good"
    return said


COMMON = {
    ("AskAgain", 429): 2,
    ("Failed", 200): 62,  # what other requests were answered with, and tokens
    ("Failed", 400): 33,
    ("Failed", 409): 3,
    ("Failed", 500): 2,
    ("Failed", 502): 1,
    ("Failed", 503): 2,
    ("Failed", 504): 1,
    ("Failed", 520): 1,
    ("Failed", 522): 1,
    ("Gone", 302): 2,  # to the search
    ("Gone", 403): 20,
    ("Gone", 404): 11,
    ("Gone", 451): 1,
    ("Refused", 401): 7,
}
OF_SOURCE = {
    source: {(what, 301): 4, (what, 302): 20, (what, 413): 2, (what, 414): 1, ("Failed", 415): 1}
    for source, what in {"oauth": "Failed", "json": "AskAgain", "feed": "Failed"}.items()
}
OF_SOURCE["json"] |= {("Failed", 400): 31, ("AskAgain", 400): 2}  # those two are no JSON


@pytest.mark.parametrize("source", OF_SOURCE)
def test_every_recorded_error_has_a_sensible_consequence(source, recorded, clock):
    counted = Counter((verdict(answer, source, clock), answer.status) for _, answer in recorded)
    assert counted == {**COMMON, **OF_SOURCE[source]}


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
    assert seconds <= round(took, 2) < seconds + 5
