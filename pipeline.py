"""Keep a SQLite database of Reddit's new posts.

    Reddit --> stream() --> transform() --> load() --> SQLite
    a file --> read_file() --^ posts         ^ rows     ^ transactions

A walk reads a listing from its newest page back past the cursor, the time up
to which everything listed is stored. Its posts, oldest first, and the cursors
it moves make one Batch, and `load` commits a Batch in one transaction. So there
is never a hole behind a cursor, whenever the process dies: a walk that did not
finish moved nothing, and what a finished one could not reach is a row in `gaps`.

Deciding is done by pure functions of values; sessions, clocks and random numbers
are arguments. Nothing here prints, reads the environment or knows of signals.
"""

from __future__ import annotations

import base64
import itertools
import json
import logging
import math
import os
import random
import re
import sqlite3
import stat
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import datetime
from email.utils import parsedate_to_datetime
from operator import itemgetter
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple, Protocol, cast
from urllib.parse import quote_plus, urlsplit

Post = dict[str, Any]
"""One post with Reddit's own keys; `id` is always there and usable."""

WWW_URL = "https://www.reddit.com"
OAUTH_URL = "https://oauth.reddit.com"

PAGE = 100  # posts a page: `limit` is clamped to 1..100 (reddit-archive, validator.py)
HORIZON = 1000  # items a listing holds (reddit-archive, lib/db/queries.py)
# Removed items leave a listing, 900-odd is common (BDFR issues 57 and 195): one
# that ends below this many was short by itself, one above may have been cut.
FULL = 750
STEADY = 1.0  # seconds in which few posts are listed, of all of Reddit too
RUNAWAY = 5 * HORIZON // PAGE  # pages after which even an endless listing ends a walk

CONNECT_TIMEOUT = 5.0  # seconds
READ_TIMEOUT = 10.0
BODY_TIMEOUT = 30.0
BODY_LIMIT = 16 * 2**20  # bytes; of an answer and of a line

PATIENCE = 120.0  # seconds --once goes on without one good answer
BUDGET_PATIENCE = 480.0  # seconds --once waits for the budget in all
LOCK_PATIENCE = 120.0  # seconds to wait for somebody else's lock

log = logging.getLogger("redpipe")


# --- Errors -----------------------------------------------------------------


class RedpipeError(Exception):
    """What a user can be told in one line, with the exit status it ends in."""

    exit_status = 1


class BadUsage(RedpipeError):
    exit_status = 64


class BadLines(RedpipeError):
    exit_status = 65


class FileUnreadable(RedpipeError):
    exit_status = 66


class Gone(RedpipeError):
    """The subreddit does not exist, or is private, banned or quarantined."""

    exit_status = 69


class NotOurs(RedpipeError):
    """The database cannot be created or opened, or is somebody else's."""

    exit_status = 73


class StorageFailed(RedpipeError):
    exit_status = 74


class Failed(RedpipeError):
    """A request failed in a way that may pass."""

    exit_status = 75


class AskAgain(Failed):
    """Ask again as soon as the budget allows: this was no failure."""


class Refused(RedpipeError):
    """Reddit refuses the credentials, or blocks this address."""

    exit_status = 77


class BadEnvironment(RedpipeError):
    exit_status = 78


# --- Shapes -----------------------------------------------------------------


class Clock(Protocol):
    """The part of the `time` module that is used here; all in seconds."""

    def time(self) -> float: ...
    def monotonic(self) -> float: ...
    def sleep(self, seconds: float, /) -> None: ...


class Request(NamedTuple):
    method: str
    url: str
    params: dict[str, str]
    headers: dict[str, str]
    data: dict[str, str] | None = None
    auth: tuple[str, str] | None = None


class Answer(NamedTuple):
    """What came back; the names of `headers` are lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


Fetch = Callable[[Request], Answer]


class Access(NamedTuple):
    """Where to ask and with which credentials; an empty string is none."""

    url: str = ""
    client_id: str = ""
    client_secret: str = ""
    username: str = ""
    feed_token: str = ""
    user_agent: str = "redpipe"


class Page(NamedTuple):
    """One answer of a listing: posts as listed, anchor of the next page, server time.

    `tells_end`: on the last page `after` is None. A feed does not tell.
    """

    posts: list[Post]
    after: str | None = None
    things: int = 0
    utc: float = 0.0
    tells_end: bool = True


class Walk(NamedTuple):
    """What one walk back read: posts as listed, and how it ended.

    `complete`: it passed its target, or the listing held nothing more.
    `edge`: what was listed at `utc` was read back to this created_utc (inf: no post).
    """

    posts: list[Post]
    complete: bool
    edge: float
    pages: int
    utc: float


class Cursor(NamedTuple):
    """How far a subreddit is stored without a hole; UTC seconds."""

    since_utc: int
    newest_utc: int
    polled_utc: int


class Gap(NamedTuple):
    """What a listing no longer held; both bounds inclusive, UTC seconds.

    `after_utc` counts from `cursor_utc`: when another process has moved the cursor on
    meanwhile, the gap begins as much later, or is none.
    """

    subreddit: str
    after_utc: int
    before_utc: int
    noticed_utc: int
    cursor_utc: int


class Batch(NamedTuple):
    """What one transaction stores: new posts, oldest first, and what they prove."""

    posts: Iterable[Post]
    cursors: Mapping[str, Cursor] = MappingProxyType({})
    gaps: Sequence[Gap] = ()


class Field(NamedTuple):
    """One --field: where it is in a post, and its column."""

    path: tuple[str, ...]
    column: str


# --- Posts in listings and files ----------------------------------------------

_ID = re.compile(r"[0-9a-z]+")  # base 36; its length grows (libreddit issue 675)


def post_id(post: Mapping[str, Any]) -> str | None:
    """Give the post's id (base 36, without t3_), or None when it has none."""
    known = post.get("id")
    if isinstance(known, str) and _ID.fullmatch(known):
        return known
    name = post.get("name")
    if isinstance(name, str) and name.startswith("t3_") and _ID.fullmatch(name, 3):
        return name[3:]
    return None


def integer(value: Any) -> int | None:
    """Give a number, or a number in a string, as a 64-bit integer, else None."""
    if type(value) is int:
        return value if -(2**63) <= value < 2**63 else None
    if isinstance(value, (float, str)):
        try:
            number = float(value)
        except ValueError:
            return None
        return int(number) if abs(number) < 2**63 else None
    return None


def created(post: Mapping[str, Any]) -> int | None:
    return integer(post.get("created_utc"))


def times_of(posts: Iterable[Post]) -> list[int]:
    """Give the created_utc of those posts that have one."""
    return [at for at in map(created, posts) if at is not None]


def _long_integer(digits: str) -> int | str:
    # int() refuses more than 4300 digits (CVE-2020-10735); as text they survive.
    return int(digits) if len(digits) < 4300 else digits


_decode = json.JSONDecoder(parse_constant=lambda name: None).decode
_decode_long = json.JSONDecoder(parse_constant=lambda name: None, parse_int=_long_integer).decode


def parse_json(text: bytes) -> Any:
    """Read JSON from UTF-8; NaN is None. Raises ValueError, whatever is wrong."""
    decoded = text.decode("utf-8", "surrogatepass")
    try:
        try:
            return _decode(decoded)
        except json.JSONDecodeError:
            raise
        except ValueError:  # an integer of more digits than int() takes
            return _decode_long(decoded)
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc


def is_listing(value: Any) -> bool:
    if not (isinstance(value, dict) and value.get("kind") == "Listing"):
        return False
    data = value.get("data")
    return isinstance(data, dict) and isinstance(data.get("children"), list)


def t3_data(children: Iterable[Any]) -> list[Any]:
    """Give what is inside a listing's posts; other kinds of things are skipped."""
    things = (thing for thing in children if isinstance(thing, dict))
    return [thing.get("data") for thing in things if thing.get("kind") == "t3"]


def usable(post: Any) -> Post | None:
    """Give a post with its `id` in place, or None when it has no usable one."""
    known = post_id(post) if isinstance(post, dict) else None
    if known is None:
        return None
    post["id"] = known
    return cast("Post", post)


def listed_posts(children: Iterable[Any]) -> list[Post]:
    return [post for post in map(usable, t3_data(children)) if post]


# --- Answers ------------------------------------------------------------------

# Who is asked: the API with a token, the anonymous JSON, the feed; and for a token.
OAUTH, JSON, FEED, GRANT = "oauth", "json", "feed", "grant"
# What came: a page, a token, JSON with an error in words, other JSON objects, the
# search for subreddits, anything else.
LISTING, TOKEN, DENIAL, OBJECT, SEARCH, OTHER = range(6)
ANY = None
# What to do about it.
GOOD, RENEW, TAKE_FEED, WAIT, RETRY = "good", "renew", "take feed", "wait", "retry"
REFUSED, GONE, BAD_USAGE = "final 77", "final 69", "final 64"


class Rule(NamedTuple):
    status: int | None
    body: int | None
    source: str | None
    consequence: str
    sentence: str = ""


# What an answer means: the first row that fits. A final one is final only before the
# first good answer for a name; afterwards it is a failure that may pass. A token is
# renewed once; the second refusal in a row is final.
# fmt: off
RULES = (
    Rule(200, LISTING, ANY,   GOOD),
    Rule(200, TOKEN,   GRANT, GOOD),
    Rule(429, ANY,     ANY,   WAIT,      "Reddit asks for fewer requests (429)"),
    Rule(ANY, DENIAL,  GRANT, REFUSED,   "Reddit refuses the credentials ({reason})"),
    Rule(400, ANY,     GRANT, REFUSED,   "Reddit refuses the credentials (400)"),
    Rule(401, ANY,     GRANT, REFUSED,   "Reddit refuses the credentials (401)"),
    Rule(403, ANY,     GRANT, REFUSED,   "Reddit refuses or blocks the app (403)"),
    Rule(ANY, ANY,     GRANT, RETRY,     "status {status}, no token: {reason}"),
    Rule(401, ANY,     OAUTH, RENEW,     "Reddit refuses the token (401)"),
    Rule(401, ANY,     ANY,   REFUSED,   "Reddit wants credentials (401)"),
    Rule(ANY, SEARCH,  ANY,   GONE,      "does not exist"),
    Rule(403, OBJECT,  ANY,   GONE,      "cannot be read: {reason} (403)"),
    Rule(404, OBJECT,  ANY,   GONE,      "cannot be read: {reason} (404)"),
    Rule(403, OTHER,   JSON,  TAKE_FEED, "Reddit blocks anonymous JSON (403); taking the feed"),
    Rule(403, OTHER,   ANY,   REFUSED,   "Reddit blocks this address, or the app (403)"),
    Rule(414, ANY,     ANY,   BAD_USAGE, "too many names for one listing (414)"),
    Rule(ANY, OBJECT,  ANY,   RETRY,     "status {status}, no listing: {reason}"),
    Rule(ANY, ANY,     ANY,   RETRY,     "status {status}, no listing: {kind}"),
)
# fmt: on


def rule_for(status: int, body: int, source: str) -> Rule:
    """Give the first row of RULES that fits an answer."""
    answer = (status, body, source)
    return next(
        rule
        for rule in RULES
        if all(want in (ANY, got) for want, got in zip(rule[:3], answer, strict=True))
    )


def server_time(answer: Answer, otherwise: float) -> float:
    """Give the answer's own time (`Date`), in UTC seconds."""
    return http_date(answer.headers.get("date", "")) or otherwise


def http_date(text: str) -> float | None:
    try:
        return parsedate_to_datetime(text).timestamp()
    except (TypeError, ValueError, IndexError, OverflowError):
        return None


def read_answer(answer: Answer, source: str, utc: float) -> tuple[int, Any]:
    """Tell what a body is, and give it: a Page, a token's object, any object or None."""
    location = url_path(answer.headers.get("location", ""))
    if 300 <= answer.status < 400 and location.startswith("/subreddits/search"):
        return SEARCH, None
    if source == FEED and (page := read_feed(answer.body, utc)):
        return LISTING, page
    try:
        value = parse_json(answer.body)
    except ValueError:
        return OTHER, None
    if source in (OAUTH, JSON) and is_listing(value):
        page = listing_page(value["data"], utc)
        return (LISTING if page.posts or not page.things else OTHER), page
    if source == GRANT and is_token(value):
        return TOKEN, value
    if not isinstance(value, dict):
        return OTHER, None
    denied = source == GRANT and isinstance(value.get("error"), str)
    return (DENIAL if denied else OBJECT), value


def is_token(value: Any) -> bool:
    token = value.get("access_token") if isinstance(value, dict) else None
    return isinstance(token, str) and token.isascii() and token.isprintable() and token != ""


def explained(rule: Rule, answer: Answer, value: Any) -> str:
    """Fill in a rule's sentence with what the answer says of itself."""
    said = value if isinstance(value, dict) else {}
    words = [said.get(key) for key in ("reason", "message", "error") if said.get(key)]
    return rule.sentence.format(
        status=answer.status,
        reason=words[0] if words else "no reason given",
        kind=answer.headers.get("content-type", "no type") if answer.body else "nothing",
    )


def secrets_of(request: Request) -> Iterator[str]:
    """Yield the secrets that a request holds, in all the forms it sends them in."""
    parts = [*(request.auth or ()), request.params.get("feed", "")]
    basic = base64.b64encode(":".join(request.auth or ()).encode()).decode()
    bearer = request.headers.get("Authorization", "").rpartition(" ")[2]
    for secret in (basic, bearer, *parts, *map(quote_plus, parts)):
        if len(secret) > 1:
            yield secret


def listing_page(data: dict[str, Any], utc: float) -> Page:
    """Turn a Listing's data into a Page; `after` null is the listing's end."""
    posts = listed_posts(data["children"])
    after = data.get("after", "")
    if after is not None and not (isinstance(after, str) and after):
        after = fullname(posts[-1]) if posts else None
    return Page(posts, after, len(data["children"]), utc)


def fullname(post: Post) -> str:
    return f"t3_{post['id']}"


_ATOM = {"": "http://www.w3.org/2005/Atom"}


def read_feed(body: bytes, utc: float) -> Page | None:
    """Turn an Atom feed into a Page, or give None: this is no feed.

    A DOCTYPE could declare entities that grow without bound; Reddit sends none.
    """
    if b"<!DOCTYPE" in body:
        return None
    from xml.etree import ElementTree  # here, because only the feed needs it

    try:
        root = ElementTree.fromstring(body.decode("utf-8"))
    except (ElementTree.ParseError, ValueError, RecursionError):
        return None
    if root.tag != f"{{{_ATOM['']}}}feed":
        return None
    entries = [feed_post(entry) for entry in root.findall("entry", _ATOM)]
    posts = listed_posts({"kind": post["name"][:2], "data": post} for post in entries)
    names = [post["name"] for post in entries if post["name"]]
    return Page(posts, names[-1] if names else None, len(entries), utc, tells_end=False)


def feed_post(entry: Any) -> Post:
    """Give a feed's entry Reddit's keys; what it does not say is left out.

    The forms are `id` t3_x, `category/@term` python, `author/name` /u/x,
    `published` 2026-11-23T08:00:00+00:00, `link/@href` an absolute address.
    """
    texts = {
        path: entry.findtext(path, "", _ATOM)
        for path in ("id", "title", "author/name", "published", "updated")
    }
    attributes = {
        key: element.get(key, "")
        for tag, key in (("category", "term"), ("link", "href"))
        if (element := entry.find(tag, _ATOM)) is not None
    }
    post = {
        "title": texts["title"],
        "subreddit": attributes.get("term"),
        "author": texts["author/name"].rpartition("/")[2],
        "created_utc": iso_seconds(texts["published"] or texts["updated"]),
        "permalink": url_path(attributes.get("href", "")),
    }
    return {"name": texts["id"]} | {key: value for key, value in post.items() if value}


def iso_seconds(text: str) -> int | None:
    """Give an ISO 8601 time in UTC seconds."""
    try:
        moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return None
    return int(moment.timestamp()) if moment.tzinfo else None


def url_path(url: str) -> str:
    try:
        return urlsplit(url).path
    except ValueError:
        return ""


# --- Pacing -------------------------------------------------------------------


class Budget(NamedTuple):
    """What may be asked; all times are one monotonic clock's seconds.

    `sent`: when the last requests went out. `total`, `remaining`, `resets_at`: the
    window as x-ratelimit-* told it; `total` 0: never told. `refusals`: the 429s in
    a row. `doublings`: how often a 429 without advice, or while no window is known, has
    doubled the spacing, the last time at `doubled_at`.
    """

    per_minute: int
    sent: tuple[float, ...] = ()
    total: float = 0.0
    remaining: float = 0.0
    resets_at: float = 0.0
    not_before: float = 0.0
    refusals: int = 0
    doublings: int = 0
    doubled_at: float = 0.0


WINDOW = 600.0  # seconds of Reddit's windows, fixed to the wall clock (r2/lib/ratelimit.py)
LONGEST_ADVICE = 86400.0  # seconds; a Retry-After beyond it is a mistake


UNLIMITED = (10**6, 1.0)


def caution(budget: Budget) -> tuple[int, float]:
    """Give the most doublings of the spacing, and the seconds after which one is taken back.

    A window that is known tells what is left: a 429 that says nothing is not about it.
    Where nothing is known, one request in about 100 s is the slowest.
    """
    return (3, WINDOW) if budget.total else (int(math.log2(budget.per_minute)) + 1, 3600.0)


def slowed(budget: Budget, now: float) -> int:
    """Give the doublings of the spacing that are not forgiven yet."""
    _, forgive = caution(budget)
    return max(0, budget.doublings - int((now - budget.doubled_at) // forgive))


def spacing(budget: Budget, now: float) -> tuple[int, float]:
    """Give how many requests may go out within how many seconds, whatever headers say."""
    factor = 2 ** slowed(budget, now)
    if budget.total and factor == 1:
        return UNLIMITED
    burst = max(1, budget.per_minute // factor)
    return burst, burst * factor * 60.0 / budget.per_minute


def current(budget: Budget, now: float) -> Budget:
    """Begin a new window when the old one is over."""
    if budget.total and now >= budget.resets_at:
        return budget._replace(remaining=budget.total, resets_at=now + WINDOW)
    return budget


def spent(budget: Budget, now: float) -> Budget:
    """Count one request that goes out now."""
    budget = current(budget, now)
    sent = (*budget.sent, now)[-budget.per_minute :]
    return budget._replace(sent=sent, remaining=budget.remaining - 1)


def wait_for(budget: Budget, pages: int, now: float) -> float:
    """Give the seconds until `pages` requests may follow at once.

    More pages than a whole window holds are waited for as a whole window.
    """
    budget = current(budget, now)
    until = budget.not_before
    if budget.total and budget.remaining < max(1, min(pages, int(budget.total))):
        until = max(until, budget.resets_at)
    burst, seconds = spacing(budget, now)
    free = burst - min(pages, burst)
    if len(budget.sent) > free:
        until = max(until, budget.sent[-1 - free] + seconds)
    return max(0.0, until - now)


def seconds_for(budget: Budget, pages: int, now: float) -> float:
    """Give the seconds until so many requests have gone out, one by one."""
    burst, seconds = spacing(budget, now)
    bursts = math.ceil(pages / burst)
    return wait_for(budget, pages, now) + (bursts - 1) * seconds


def at_once(budget: Budget, now: float) -> int:
    """Give how many requests may follow without waiting."""
    budget = current(budget, now)
    burst, seconds = spacing(budget, now)
    pages = burst - sum(1 for at in budget.sent if at + seconds > now)
    if budget.total:
        pages = min(pages, int(budget.remaining))
    return max(0, pages) if now >= budget.not_before else 0


def carries(budget: Budget, now: float) -> float:
    """Give the requests a second that the rest of the window carries."""
    budget = current(budget, now)
    burst, seconds = spacing(budget, now)
    told = max(0.0, budget.remaining) / max(1.0, budget.resets_at - now)
    return min(told, burst / seconds) if budget.total else burst / seconds


def window_left(budget: Budget, now: float) -> float:
    """Give the seconds until the budget is new."""
    return current(budget, now).resets_at - now if budget.total else WINDOW


def learned(budget: Budget, answer: Answer, now: float, utc: float) -> Budget:
    """Take in what an answer says of the budget; `utc` is the server's time."""
    remaining, reset, used = (
        number(answer.headers.get(f"x-ratelimit-{key}")) for key in ("remaining", "reset", "used")
    )
    advice = retry_after(answer.headers.get("retry-after"), utc)
    if remaining is not None and reset is not None:
        if remaining >= 1:  # past the limit `used` goes on growing
            budget = budget._replace(total=remaining + (used or 0.0))
        else:
            advice = max(advice or 0.0, reset + 1)
        # `reset` is whole seconds, cut or rounded: one more is sure to be past it.
        budget = budget._replace(remaining=remaining, resets_at=now + reset + 1)
    refusals = budget.refusals + 1 if answer.status == 429 else 0
    if refusals > 1 and advice is not None:  # the advice was too short
        advice = max(advice, 2.0 ** min(refusals, 6))
    if advice is not None:
        budget = budget._replace(not_before=now + min(max(1.0, advice), LONGEST_ADVICE))
    if refusals and (advice is None or not budget.total):
        budget = doubled(budget, now)
    return budget._replace(refusals=refusals)


def doubled(budget: Budget, now: float) -> Budget:
    """Double the spacing, and wait at least that long."""
    most, _ = caution(budget)
    doublings = min(most, slowed(budget, now) + 1)
    budget = budget._replace(doublings=doublings, doubled_at=now)
    burst, seconds = spacing(budget, now)
    return budget._replace(not_before=max(budget.not_before, now + seconds / burst))


def number(text: str | None) -> float | None:
    """Give a header's finite number."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def retry_after(text: str | None, utc: float) -> float | None:
    """Give the seconds of a Retry-After, which may be a date (RFC 9110, 10.2.3)."""
    seconds = number(text)
    if seconds is None and text and (date := http_date(text)) is not None:
        seconds = date - utc
    return seconds


def listing_rate(posts: Sequence[Post]) -> float:
    """Give the posts a second that a page shows, by its newer half; 0 for one post.

    The half keeps out what was approved late; a second is the times' resolution.
    """
    times = sorted(times_of(posts), reverse=True)
    half = len(times) // 2
    return half / max(1, times[0] - times[half]) if half else 0.0


def covers(rate: float) -> float:
    """Give the seconds that a page of the listing covers."""
    return PAGE / rate if rate else math.inf


def poll_interval(
    rate: float, interval: float, pages: int, budget_rate: float, left: float
) -> float:
    """Give the seconds from the start of one poll to the start of the next.

    A page of new posts should have come; but `pages` a poll must be affordable, or
    the window be over, in `left` seconds.
    """
    spread = min(pages / max(budget_rate, 1e-9), left)
    return max(min(max(covers(rate), 1.0), interval), spread)


DEEPEST = 9  # pages of a walk when the budget is scarce


def is_scarce(rate: float, budget_rate: float, until_reset: float) -> bool:
    """Tell whether the rest of the window cannot pay for all that will be listed.

    `until_reset`: seconds from the last walk to the next window; a listing that holds
    what comes in that time can wait for it. Otherwise a walk stops before the last
    page, whose posts leave while it is on its way there, and makes do with the pages
    that the window has left: what it leaves out is a gap, but the smallest.
    """
    return rate > 0.9 * PAGE * budget_rate and rate * until_reset > HORIZON - PAGE


FEW_SAMPLES = 1000
FIRST_LOOK_BACK = 30.0  # seconds, until so many samples of lateness are known
LEAST_LOOK_BACK, MOST_LOOK_BACK = 5.0, 60.0


def look_back(lateness: Sequence[float], rate: float, budget_rate: float) -> float:
    """Give the seconds that a walk reads back behind the cursor.

    Twice the lateness that one post in a thousand exceeds, but no more than half
    of what the listing holds, nor, beyond a least one, than the budget can pay at four
    polls a listing.
    """
    wanted = FIRST_LOOK_BACK
    if len(lateness) >= FEW_SAMPLES:
        rare = sorted(lateness)[-max(1, len(lateness) // 1000)]
        wanted = min(max(2 * rare + 1, LEAST_LOOK_BACK), MOST_LOOK_BACK)
    if not rate:
        return wanted
    slowest_poll = HORIZON / 4 / rate
    affordable = (slowest_poll * (budget_rate - rate / PAGE) - 1) * PAGE / rate
    return min(wanted, HORIZON / 2 / rate, max(LEAST_LOOK_BACK, affordable))


def lateness_seen(lateness: Sequence[float]) -> int:
    """Give the seconds within which listed posts have appeared so far."""
    if len(lateness) < FEW_SAMPLES:
        return int(FIRST_LOOK_BACK)
    return math.ceil(max(2 * LEAST_LOOK_BACK, *lateness))


def full_walk_turn(
    polled_utc: Sequence[float], now: float, rate: float, budget_rate: float
) -> int | None:
    """Give the number of the name whose whole listing is due, for what was approved late.

    `polled_utc`: when each name was polled last. Names take turns of equal length, in an
    order that is drawn anew for each round: else a run once a day might meet the same one
    each day. A round takes as long as a page covers, at least 5 minutes, and a full walk
    is a tenth of a turn's budget. A turn is used at the name's first poll in it, so that
    nothing need be remembered, and a restart or another run does not repeat it.
    """
    names = len(polled_utc)
    shortest = max(300.0, covers(rate)) / names
    shortest = max(shortest, HORIZON / PAGE / max(0.1 * budget_rate, 1e-9))
    if not math.isfinite(shortest):
        return None
    length = 300 * 2.0 ** math.ceil(math.log2(shortest / 300))
    of_all, turn = divmod(int(now // length), names)
    name = random.Random(of_all).sample(range(names), names)[turn]
    return None if now // length == polled_utc[name] // length else name


LONGEST_FULL_WALK = 120.0  # seconds


def can_wait(rate: float, seconds: float) -> bool:
    """Tell whether what is listed may wait so long for the end of a full walk.

    On ten requests a minute it takes one. No more than a quarter of what the listing
    holds may come meanwhile, as the next walk waits for the budget, too.
    """
    return seconds <= LONGEST_FULL_WALK and rate * seconds <= HORIZON / 4


def backoff(failures: int, rate: float | None, chance: float) -> float:
    """Give the seconds to wait after so many failures; `chance` is in [0, 1).

    At most about the time a page covers, between 5 and 60 s, and 5 s while the rate
    is unknown: all of Reddit fills a whole listing in 58 s, a longer wait loses posts
    for good.
    """
    longest = 5.0 if rate is None else min(max(covers(rate), 5.0), 60.0)
    return min(longest, 2.0 ** min(failures - 1, 6)) * (0.5 + chance / 2)


# --- Asking -------------------------------------------------------------------


def is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or re.fullmatch(r"127(\.\d+){3}", host) is not None


def http_fetch() -> Fetch:
    """Give the function that sends requests, over one Session.

    It raises Failed for whatever the network does, in words without the address:
    a query may hold the feed token. Redirects are not followed, ~/.netrc is not
    read, and what goes to this machine does not pass a proxy.
    """
    import requests
    import urllib3

    session = requests.Session()
    session.auth = lambda prepared: prepared  # or requests looks into ~/.netrc
    # Or requests reads a redirect's body itself, without our limits, to follow it.
    session.get_redirect_target = lambda resp: None  # type: ignore[method-assign]

    def fetch(request: Request) -> Answer:
        past_proxies = {"http": "", "https": "", "all": ""} if is_loopback(request.url) else None
        auth = tuple(part.encode() for part in request.auth) if request.auth else None
        try:
            with session.request(
                request.method,
                request.url,
                params=request.params,
                headers={"Accept-Encoding": "gzip", **request.headers},
                data=request.data,
                auth=auth,  # type: ignore[arg-type]
                proxies=past_proxies,
                timeout=(CONNECT_TIMEOUT, READ_TIMEOUT),
                allow_redirects=False,
                stream=True,
            ) as response:
                headers = {name.lower(): value for name, value in response.headers.items()}
                return Answer(response.status_code, headers, read_body(response.raw))
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as exc:
            raise Failed(network_trouble(exc)) from exc
        except (ValueError, EOFError) as exc:
            raise Failed("a senseless answer") from exc

    return fetch


TOO_LARGE = f"an answer of more than {BODY_LIMIT >> 20} MiB"


def read_body(raw: Any, clock: Clock = time) -> bytes:
    """Read a whole body within BODY_TIMEOUT and BODY_LIMIT, else raise Failed."""
    ends = clock.monotonic() + BODY_TIMEOUT
    body = bytearray()
    # Not decoded here: that reads on until something comes out, without limits.
    while chunk := raw.read1(2**16, decode_content=False):
        body += chunk
        if len(body) > BODY_LIMIT:
            raise Failed(TOO_LARGE)
        if clock.monotonic() > ends:
            raise Failed(f"an answer that took more than {BODY_TIMEOUT:.0f} s")
    return unzipped(bytes(body)) if raw.headers.get("content-encoding") else bytes(body)


def unzipped(body: bytes) -> bytes:
    """Decompress what gzip made, up to BODY_LIMIT, else raise Failed."""
    gzip = zlib.decompressobj(16 + zlib.MAX_WBITS)
    try:
        plain = gzip.decompress(body, BODY_LIMIT)
    except zlib.error as exc:
        raise Failed("a wrongly compressed answer") from exc
    if gzip.unconsumed_tail:
        raise Failed(TOO_LARGE)
    if not gzip.eof:
        raise Failed("an answer cut short")
    return plain


def network_trouble(exc: BaseException) -> str:
    """Say what went wrong, by the first system error behind an exception."""
    name = type(exc).__name__
    cause: BaseException | None = exc
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return str(cause.strerror)
        if type(cause) is OSError and cause.args:  # http.client's, of a proxy that refuses
            return str(cause.args[0])
        inside = (arg for arg in cause.args if isinstance(arg, BaseException))
        cause = cause.__cause__ or cause.__context__ or next(inside, None)
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()


class Reddit:
    """One way into Reddit: which source answers, its token and its budget.

    It never waits: `wait_for` tells how long to, before `page` is called.
    """

    def __init__(self, access: Access, fetch: Fetch, clock: Clock = time) -> None:
        self.access = access
        self.fetch = fetch
        self.clock = clock
        self.source = OAUTH if access.client_id else JSON
        self.budget = Budget(per_minute=60 if access.client_id else 10)
        self._token = ""
        self._token_ends = 0.0
        self._renewed = False

    def wait_for(self, pages: int) -> float:
        """Give the seconds until so many pages may be asked for at once."""
        return wait_for(self.budget, pages, self.clock.monotonic())

    def at_once(self) -> int:
        """Give how many pages may be asked for without waiting."""
        return at_once(self.budget, self.clock.monotonic())

    def budget_rate(self) -> float:
        """Give the requests a second that whole windows carry, or none that is known of."""
        total = self.budget.total
        return total / WINDOW if total else self.carries()

    def seconds_for(self, pages: int) -> float:
        """Give the seconds until so many pages have been asked for."""
        return seconds_for(self.budget, pages, self.clock.monotonic())

    def carries(self) -> float:
        """Give the requests a second that the budget carries."""
        return carries(self.budget, self.clock.monotonic())

    def page(self, names: Sequence[str], after: str | None = None) -> Page:
        """Ask for one page of the names' joint listing.

        Raises what RULES say: Gone, Refused, BadUsage; AskAgain when it was no failure,
        and Failed for all that may pass.
        """
        if self.source == OAUTH and self.clock.monotonic() >= self._token_ends:
            self._renew_token()
        page: Page = self._ask(self._listing_request(names, after), self.source)
        self._renewed = False
        return page

    def _ask(self, request: Request, source: str) -> Any:
        log.debug("asking for %s", url_path(request.url))
        if source != GRANT:  # tokens have a window of their own
            self.budget = spent(self.budget, self.clock.monotonic())
        answer = self.fetch(request)
        utc = server_time(answer, self.clock.time())
        if source != GRANT or answer.status != 200:
            self.budget = learned(self.budget, answer, self.clock.monotonic(), utc)
        body, value = read_answer(answer, source, utc)
        rule = rule_for(answer.status, body, source)
        if rule.consequence == GOOD:
            return value
        sentence = explained(rule, answer, value)
        for secret in secrets_of(request):  # a proxy may send back what it got
            sentence = sentence.replace(secret, "***")
        raise self._consequence(rule.consequence, sentence[:200])

    def _consequence(self, consequence: str, sentence: str) -> RedpipeError:
        if consequence == TAKE_FEED:
            log.info("%s, which has no account ids", sentence)
            self.source = FEED
            per_minute = 60 if self.access.feed_token else 10
            sent, not_before = self.budget.sent, self.budget.not_before
            self.budget = Budget(per_minute, sent, not_before=not_before)
            return AskAgain(sentence)
        if consequence in (RENEW, REFUSED):
            again = consequence == RENEW and not self._renewed
            self._token_ends, self._renewed = 0.0, True
            return AskAgain(sentence) if again else Refused(f"{sentence}; see README, Credentials")
        final = {GONE: Gone, BAD_USAGE: BadUsage, WAIT: AskAgain, RETRY: Failed}
        return final[consequence](sentence)

    def _listing_request(self, names: Sequence[str], after: str | None) -> Request:
        base = self.access.url or (OAUTH_URL if self.source == OAUTH else WWW_URL)
        end = {OAUTH: "new", JSON: "new/.json", FEED: "new/.rss"}[self.source]
        params = {"limit": str(PAGE)}
        headers = {"User-Agent": self.access.user_agent}
        if self.source != FEED:
            params["raw_json"] = "1"  # or <, > and & come as entities
        elif self.access.feed_token:
            params |= {"feed": self.access.feed_token, "user": self.access.username}
        if self.source == OAUTH:
            headers["Authorization"] = f"bearer {self._token}"
        if after:
            params["after"] = after
        return Request("GET", f"{base}/r/{'+'.join(names)}/{end}", params, headers)

    def _renew_token(self) -> None:
        """Fetch an application-only token, good until shortly before it expires.

        https://github.com/reddit-archive/reddit/wiki/OAuth2#application-only-oauth
        """
        access = self.access
        grant = {"grant_type": "client_credentials"}
        if not access.client_secret:
            grant = {
                "grant_type": f"{OAUTH_URL}/grants/installed_client",
                "device_id": "DO_NOT_TRACK_THIS_DEVICE",
            }
        url = f"{access.url or WWW_URL}/api/v1/access_token"
        auth = (access.client_id, access.client_secret)
        headers = {"User-Agent": access.user_agent}
        told = self._ask(Request("POST", url, {}, headers, grant, auth), GRANT)
        lifetime = number(str(told.get("expires_in"))) or 3600.0
        self._token = told["access_token"]
        self._token_ends = self.clock.monotonic() + max(lifetime - 60, lifetime * 0.9)


# --- Walking back -------------------------------------------------------------


def edge_of(posts: Sequence[Post]) -> float:
    """Give the newest created_utc of a page's last ten posts: so far back was read.

    Listings are nearly, not strictly, ordered: one old post proves nothing.
    """
    return max(times_of(posts[-10:]), default=math.inf)


def earlier_anchors(posts: Sequence[Post]) -> Iterator[str]:
    """Yield anchors before the last post's, ever farther: 1, 8, 64, 512 … items up."""
    steps = itertools.takewhile(lambda step: step < len(posts), (8**n for n in itertools.count()))
    return (fullname(posts[-1 - step]) for step in steps)


def pages_back(first: Page, ask: Callable[[str | None], Page]) -> Iterator[Page]:
    """Yield a listing's pages, newest first; only one that shows its end has no `after`.

    An empty page is a lost anchor (that post was removed meanwhile, or new ones pushed it
    out), so the items before it are tried as anchors; if all are lost, the listing is read
    anew, once. A feed names no end: it is where one of the last posts works, so few that a
    page has room for more behind it, and shows no others. Ten pages in a row are all that
    was listed when the first came. A page that holds its own anchor comes from somebody
    who does not look at anchors.
    """
    page, read, tops, size = first, list[Post](), [None], 0
    in_a_row = 1
    while page.after is not None:
        yield page
        read += page.posts
        if in_a_row == HORIZON // PAGE and len(read) >= FULL:
            return
        size = max(size, len(page.posts))
        after, last = page.after, [fullname(post) for post in read[-max(2, 3 * size // 4) :]]
        for anchor in (after, *earlier_anchors(read), *tops):
            page = ask(anchor)
            if page.things:
                break
        shown = [fullname(post) for post in page.posts]
        if not page.things or anchor in shown:
            return
        in_a_row = in_a_row + 1 if anchor == after else -RUNAWAY
        if anchor is None and len(read) > 1:
            read, in_a_row = [], 1
            tops = [] if len(shown) > 1 else tops
        elif not page.tells_end and anchor in (last[:-1] or tops) and set(shown) <= set(last):
            page = page._replace(after=None)
    yield page


def walk_back(
    first: Page,
    ask: Callable[[str | None], Page],
    target: float,
    may_ask: Callable[[int], bool] = lambda pages: True,
    *,
    least: int = 1,
) -> Walk:
    """Read older pages, so many at least, until one has passed the target or there are no more.

    `may_ask` is given the number of pages so far, and cuts the walk short.
    """
    found: dict[str, Post] = {}
    edge = math.inf
    for pages, page in enumerate(itertools.islice(pages_back(first, ask), RUNAWAY), 1):
        for post in page.posts:
            found.setdefault(post["id"], post)
        edge = min(edge, edge_of(page.posts))
        if (edge < target and pages >= least) or not may_ask(pages):
            break
    complete = edge < target or (page.after is None and len(found) < FULL)
    if complete and edge >= target and page.utc - first.utc > STEADY:
        complete = may_ask(pages) and is_short(found, ask)
    return Walk(list(found.values()), complete, edge, pages, first.utc)


def is_short(found: dict[str, Post], ask: Callable[[str | None], Page]) -> bool:
    """Tell whether a listing that ended after a while was short by itself.

    Or new posts may have pushed the last ones out meanwhile. So those are read too,
    from the newest page to one that is known, and added to what was found.
    """
    walked = set(found)
    for page in itertools.islice(pages_back(ask(None), ask), RUNAWAY):
        # Known by its last post: those that Reddit keeps on top show nothing.
        known = any(post["id"] in walked for post in page.posts[-1:])
        found.update((post["id"], post) for post in page.posts)
        if known or len(found) >= FULL:
            break
    return known and len(found) < FULL


def newest_listed(walk: Walk) -> int:
    """Give the newest created_utc that is not in the future; 0 for none."""
    return max((at for at in times_of(walk.posts) if at <= walk.utc), default=0)


def next_cursor(cursor: Cursor | None, walk: Walk, polled_utc: int, joint_utc: int = 0) -> Cursor:
    """Give a name's cursor after a walk that reached it, or found it new.

    `joint_utc`: the newest created_utc of a joint listing that was read just before. How
    far a listing has come shows in all its names: a quiet one's cursor moves with them.
    """
    newest = max(newest_listed(walk), joint_utc)
    if cursor:
        return Cursor(cursor.since_utc, max(cursor.newest_utc, newest), polled_utc)
    newest = newest or int(walk.utc)
    oldest = min(times_of(walk.posts), default=newest) if walk.complete else walk.edge
    return Cursor(int(min(newest, oldest)), newest, polled_utc)


def gap_before(walk: Walk, name: str, cursor: Cursor | None, late: int, utc: int) -> list[Gap]:
    """Name what a walk did not reach: all since the cursor less the lateness seen."""
    after = cursor.newest_utc - late if cursor else math.inf
    if walk.complete or cursor is None or not after < walk.edge < math.inf:
        return []
    return [Gap(name, cursor.newest_utc - late, int(walk.edge), utc, cursor.newest_utc)]


def oldest_first(posts: Iterable[Post]) -> list[Post]:
    return sorted(posts, key=lambda post: (created(post) or 0, len(post["id"]), post["id"]))


class Memory(Protocol):
    """What a follower asks of the database."""

    def cursors(self, names: Sequence[str]) -> dict[str, Cursor]: ...
    def unstored(self, posts: Sequence[Post]) -> list[Post]: ...


class Pace:
    """What the last walks tell of the next one: how fast, how deep, how late."""

    def __init__(self, reddit: Reddit) -> None:
        self.reddit = reddit
        self.rate: float | None = None  # posts a second, by the last newest page of all
        self.pages = 1  # what the last walk to a cursor took
        self.begun = 0.0  # when the last walk did
        self.carried = 0.0  # requests a second that the budget carried then
        self.lateness: deque[float] = deque(maxlen=10_000)

    def now(self) -> float:
        return self.reddit.clock.monotonic()

    def carries(self) -> float:
        """Give what the budget carried when the last walk began, or what a new one does."""
        return max(self.carried, self.reddit.carries())

    def is_scarce(self) -> bool:
        now = self.now()
        until_reset = now + window_left(self.reddit.budget, now) - self.begun
        return is_scarce(self.rate or 0.0, self.carries(), until_reset)

    def pages_next(self) -> int:
        """Give the pages that the next walk should find paid for."""
        return min(self.pages, max(1, self.reddit.at_once())) if self.is_scarce() else self.pages

    def pause(self, started: float, interval: float) -> float:
        """Give the seconds until the poll after the one that started then."""
        now = self.now()
        left = window_left(self.reddit.budget, now)
        pages, carried = self.pages_next(), self.carries()
        wait = poll_interval(self.rate or 0.0, interval, pages, carried, left)
        return max(0.0, started + wait - now)


class Asker:
    """Asks for pages until they come: waits for the budget, and after failures."""

    def __init__(
        self, reddit: Reddit, pace: Pace, *, once: bool, chance: Callable[[], float]
    ) -> None:
        self.reddit = reddit
        self.pace = pace
        self.once = once
        self.chance = chance
        self.clock = reddit.clock
        self.answered: set[str] = set()  # names that have had a good answer
        self.failures = 0  # in a row
        self.gives_up = self.clock.monotonic() + PATIENCE
        self.waited = 0.0  # seconds, for the budget

    def newest_page(self, names: Sequence[str], *, expected: bool) -> Page:
        """Ask for the newest page; one that is unexpectedly empty, three times more."""
        page = self.page(names)
        for _ in range(3 if expected else 0):
            if page.things:
                break
            self.clock.sleep(1.0)
            page = self.page(names)
        return page

    def page(self, names: Sequence[str], after: str | None = None) -> Page:
        """Ask for a page until it comes; Gone is for the caller to handle."""
        while True:
            self.await_budget(1)
            try:
                page = self.reddit.page(names, after)
            except AskAgain as exc:
                log.debug("%s", exc)
            except (Failed, Refused) as exc:
                if isinstance(exc, Refused) and not self.answered:
                    raise
                self._failed(exc)
            else:
                self._well(names)
                return page

    def await_budget(self, pages: int) -> None:
        """Wait until so many pages may follow at once."""
        while (seconds := self.reddit.wait_for(pages)) > 0:
            if self.once and self.waited + seconds > BUDGET_PATIENCE:
                raise Failed(f"Reddit's budget is used up for {seconds:.0f} s more")
            level = logging.INFO if seconds >= 60 else logging.DEBUG
            log.log(level, "waiting %.0f s for the budget", math.ceil(seconds))
            self.waited += seconds
            self.gives_up += seconds
            self.clock.sleep(max(seconds, 0.001))  # less than that may not move the clock

    def tell(self, message: str) -> None:
        """Warn of what changed; a single run ends with one line that says it all."""
        log.log(logging.INFO if self.once else logging.WARNING, "%s", message)

    def _failed(self, exc: RedpipeError) -> None:
        """Wait after a failure; with --once, raise it when the patience is over."""
        left = self.gives_up - self.clock.monotonic() if self.once else math.inf
        if left <= 0:
            raise Failed(str(exc)) from exc
        self.failures += 1
        if self.failures == 1:
            self.tell(f"{exc}; trying again")
        else:
            log.debug("%s (failure %d)", exc, self.failures)
        self.clock.sleep(min(left, backoff(self.failures, self.pace.rate, self.chance())))

    def _well(self, names: Sequence[str]) -> None:
        if self.failures:
            self.tell("Reddit answers again")
        self.failures = 0
        self.gives_up = self.clock.monotonic() + PATIENCE
        self.answered.update(names)


class Follower:
    """Polls some names, each back to its cursor, and names the gaps."""

    def __init__(self, asker: Asker, names: Sequence[str], memory: Memory) -> None:
        self.asker = asker
        self.names = list(names)
        self.memory = memory
        self.pace = asker.pace
        self.clock = asker.clock
        self.begun = 0.0  # when the last poll did
        self.due: list[str] = []
        self.behind: set[str] = set()  # names that wait to be walked alone
        self.empty: set[str] = set()  # names that showed nothing when they last were
        self.lost: list[str] = []  # what is wrong with names that never had a good answer
        self.gone: dict[str, tuple[int, float]] = {}  # tries, and when the next is due
        self.gaps = 0  # not told yet
        self.gaps_told = -math.inf

    def poll(self) -> Iterator[Batch]:
        """Walk back once for every name that is due."""
        self.begun = now = self.clock.monotonic()
        self.due = [name for name in self.names if self.gone.get(name, (0, now))[1] <= now]
        cursors = self.memory.cursors(self.due)
        together = [name for name in self.due if name in cursors and name not in self.gone]
        if len(together) == 1:
            together = []
        alone = [name for name in self.due if name not in together]
        for done, name in enumerate(alone):
            yield from self._walk_alone(name, cursors.get(name), sharers=len(alone) - done)
            if self._must_go_on():
                break
        if together:
            yield from self._walk_together(together, cursors)
        self._tell_gaps()

    def finish(self) -> None:
        """Raise Gone if some of the names could not be read."""
        if self.lost:
            raise Gone("; ".join(self.lost))

    def _walk_together(self, names: list[str], cursors: dict[str, Cursor]) -> Iterator[Batch]:
        """Walk names as one listing; then those alone that it did not reach, or whose turn it is.

        A joint listing ends where that of its busiest name does: only alone a quiet one
        shows what was approved late. Names that wait for that do not make the walk longer.
        """
        alone, newest_utc, turn = names, 0, ""
        listed = Counter[str]()
        with suppress(Gone):  # one of them: which, shows when each is walked alone
            near = [name for name in names if name not in self.behind] or names
            walk = self._walk(names, [cursors[name] for name in near])
            newest_utc = newest_listed(walk)
            listed.update(str(post.get("subreddit") or "").lower() for post in walk.posts)
            cursors |= self.memory.cursors(names)  # another process may have moved them
            late = lateness_seen(self.pace.lateness)
            turn = self._full_walk_turn(cursors, self.pace.rate or 0.0)
            alone = [
                name
                for name in names
                if name == turn
                or name not in near
                or gap_before(walk, name, cursors[name], late, 0)
            ]
            yield self._batch(walk, {n: cursors[n] for n in names if n not in alone})
        self.behind = set(alone)
        self.empty.difference_update(set(names) - self.behind)
        # The busiest can wait least; but a single run may not come to the last ones.
        by_age = self.asker.once or not listed
        urgency = {n: cursors[n].polled_utc if by_age else -listed[n] for n in alone}
        for name in sorted(alone, key=urgency.__getitem__):
            yield from self._walk_alone(name, cursors[name], newest_utc, whole=name == turn)
            self.behind.discard(name)
            if self._must_go_on():
                break

    def _must_go_on(self) -> bool:
        """Tell whether the other names' new posts can wait no longer for the next poll."""
        seconds = self.clock.monotonic() - self.begun
        return not (self.asker.once or can_wait(self.pace.rate or 0.0, seconds))

    def _walk_alone(
        self,
        name: str,
        cursor: Cursor | None,
        joint_utc: int = 0,
        *,
        sharers: int = 1,
        whole: bool = False,
    ) -> Iterator[Batch]:
        try:
            walk = self._walk([name], [cursor] if cursor else [], sharers=sharers, whole=whole)
        except Gone as exc:
            self._set_aside(name, f"r/{name} {exc}")
            return
        if self.gone.pop(name, None):
            self.asker.tell(f"r/{name} can be read again")
        cursor = self.memory.cursors([name]).get(name)  # another process may have moved it
        late = lateness_seen(self.pace.lateness)
        gaps = gap_before(walk, name, cursor, late, int(self.clock.time()))
        if walk.posts or name in self.empty:
            self.empty.discard(name)
        else:  # Reddit may only have been silent: its cursor stays until it shows nothing twice
            self.empty.add(name)
            if joint_utc and self.asker.once:
                yield from self._walk_alone(name, cursor, joint_utc)
                return
            joint_utc = 0
        yield self._batch(walk, {name: cursor}, gaps, joint_utc)
        self.gaps += len(gaps)

    def _batch(
        self,
        walk: Walk,
        cursors: Mapping[str, Cursor | None],
        gaps: Sequence[Gap] = (),
        joint_utc: int = 0,
    ) -> Batch:
        polled = int(self.clock.time())
        posts = oldest_first(self.memory.unstored(walk.posts))
        known = [cursor.newest_utc for cursor in cursors.values() if cursor]
        if known:
            self.pace.lateness.extend(lateness_of(posts, min(known)))
        moved = {
            name: next_cursor(cursor, walk, polled, joint_utc) for name, cursor in cursors.items()
        }
        return Batch(posts, moved, gaps)

    def _walk(
        self, names: list[str], cursors: list[Cursor], *, sharers: int = 1, whole: bool = False
    ) -> Walk:
        """Walk back to the oldest of the cursors.

        Without one, as deep as what is free, and shared by so many names, allows; half of
        a window is left for the polls of several names.
        """
        asker, pace = self.asker, self.pace
        asker.await_budget(pace.pages_next())
        scarce = pace.is_scarce()
        pace.begun = pace.now()
        first = asker.newest_page(names, expected=bool(cursors))
        pace.carried = asker.reddit.carries()
        no_polls = asker.once or len(self.names) == 1
        polls = 0 if no_polls else asker.reddit.budget.total // 2
        deepest = (1 + asker.reddit.at_once() - polls) // sharers
        rate = max(listing_rate(first.posts), pace.rate or 0.0)
        oldest = min((cursor.newest_utc for cursor in cursors), default=-math.inf)
        target = oldest - look_back(pace.lateness, rate, pace.carried)
        if len(names) == len(cursors) == 1 and not whole:
            whole = bool(self._full_walk_turn({names[0]: cursors[0]}, rate))

        def may_ask(pages: int) -> bool:
            if cursors and not scarce:
                return True
            return pages < (DEEPEST if cursors else deepest) and asker.reddit.at_once() > 0

        def ask(after: str | None) -> Page:
            return asker.page(names, after) if after else asker.newest_page(names, expected=True)

        least = HORIZON // PAGE if whole else 1
        walk = walk_back(first, ask, target, may_ask, least=least)
        log.debug("r/%s: %d posts on %d pages", "+".join(names), len(walk.posts), walk.pages)
        if len(names) == len(self.due):
            pace.rate = listing_rate(walk.posts)
        if cursors and not whole:
            pace.pages = walk.pages
        return walk

    def _full_walk_turn(self, cursors: Mapping[str, Cursor], rate: float) -> str:
        """Give which of some names is to be read whole now, or an empty string."""
        reddit = self.asker.reddit
        lasts = self.clock.monotonic() - self.begun + reddit.seconds_for(HORIZON // PAGE)
        if self.pace.is_scarce() or not can_wait(rate, lasts):
            return ""
        now = self.clock.time()
        polled = [cursors[name].polled_utc if name in cursors else now for name in self.names]
        turn = full_walk_turn(polled, now, rate, reddit.budget_rate())
        return "" if turn is None else self.names[turn]

    def _set_aside(self, name: str, what: str) -> None:
        """Drop a name that never could be read; ask again later for one that could."""
        if name not in self.asker.answered:
            self.names.remove(name)
            self.lost.append(what)
            if not self.names:
                self.finish()
            self.asker.tell(f"{what}; the others go on")
            return
        tries = self.gone.get(name, (0, 0.0))[0] + 1
        if tries == 1:
            self.asker.tell(f"{what}; asking again from time to time")
            if self.asker.once:
                self.lost.append(what)
        wait = backoff(tries, 0.0, self.asker.chance())
        self.gone[name] = (tries, self.clock.monotonic() + wait)

    def _tell_gaps(self) -> None:
        """Warn of gaps at the first, and then at most once an hour."""
        now = self.clock.monotonic()
        if self.gaps and now - self.gaps_told >= 3600:
            log.warning(
                "%d more gap(s): Reddit no longer lists what was posted there; see the table gaps",
                self.gaps,
            )
            self.gaps, self.gaps_told = 0, now


def lateness_of(posts: Sequence[Post], cursor_utc: int) -> Iterator[float]:
    """Yield how late new posts appeared, by the cursor they came behind; 0 for most.

    Beyond MOST_LOOK_BACK it is approval by a moderator, which no look-back covers.
    """
    for at in times_of(posts):
        late = max(0.0, cursor_utc - at)
        if late <= MOST_LOOK_BACK:
            yield late


def stream(
    reddit: Reddit,
    names: Sequence[str],
    memory: Memory,
    *,
    interval: float = 25.0,
    once: bool = False,
    chance: Callable[[], float] = random.random,
) -> Iterator[Batch]:
    """Yield the new posts of some subreddits, one Batch for each finished walk.

    `names` are lower case; `memory` is what is stored already, and each Batch must be
    there before the next is asked for. `interval`: the longest wait between two polls,
    in seconds. With `once` it ends after one poll, raising Gone if a name could not be
    read, and Failed after PATIENCE seconds without one good answer. Otherwise it never
    ends, and raises only what its first answers say (Gone, Refused, BadUsage).
    """
    pace = Pace(reddit)
    asker = Asker(reddit, pace, once=once, chance=chance)
    follower = Follower(asker, names, memory)
    while True:
        started = pace.now()
        yield from follower.poll()
        if once:
            return follower.finish()
        reddit.clock.sleep(pace.pause(started, interval))


# --- Files --------------------------------------------------------------------

FILE_BATCH = 500  # posts a transaction
LINES_TOLD = 10

_MAGIC = {  # Pushshift's .zst have a window of 2 GiB
    b"\x28\xb5\x2f\xfd": "zstdcat --long=31",
    b"\x1f\x8b": "zcat",
    b"\xfd7zXZ": "xzcat",
    b"BZh": "bzcat",
}


def open_file(path: str) -> BinaryIO:
    """Open FILE for reading; `-` is standard input. Raises FileUnreadable."""
    try:
        return open(0 if path == "-" else path, "rb", buffering=2**18, closefd=path != "-")
    except OSError as exc:
        raise FileUnreadable(f"{path}: {exc.strerror}") from exc


def read_file(file: BinaryIO, names: Sequence[str] = ()) -> Iterator[Batch]:
    """Yield the posts of a file that has one JSON value a line, in its order.

    A value is a post, a t3 thing, or a Listing. `names` (lower case) select
    subreddits; none, or all, selects every post. The posts of a Batch are read from
    the file as they are asked for, all before the next Batch. Bad lines are logged,
    the first ten of them, and raise BadLines when all the others have been given.
    """
    bad = BadLineCount()
    posts = file_posts(file, bad)
    if names and "all" not in names:
        posts = (post for post in posts if str(post.get("subreddit") or "").lower() in names)
    for first in posts:
        yield Batch(itertools.chain([first], itertools.islice(posts, FILE_BATCH - 1)))
    if bad.count:
        raise BadLines(f"{bad.count} line(s) were no posts; the others are stored")


class BadLineCount:
    """Counts lines that were no posts, and reports the first of them."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, line_number: int, reason: str) -> None:
        self.count += 1
        if self.count <= LINES_TOLD:
            log.warning("line %d: %s", line_number, reason)


def file_posts(file: BinaryIO, bad: BadLineCount) -> Iterator[Post]:
    """Yield the posts of a file, and count what is none."""
    for line_number, line in enumerate(lines(file), 1):
        try:
            found = [] if line.isspace() or not line else posts_of(json_of_line(line))
        except ValueError as exc:
            bad.add(line_number, str(exc))
            continue
        for post in map(usable, found):
            if post:
                yield unescaped(post)
            else:
                bad.add(line_number, "no usable id")


_BOM = b"\xef\xbb\xbf"


def lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield a file's lines; of one beyond BODY_LIMIT only that much and a byte."""
    try:
        line = file.readline(BODY_LIMIT + 1)
        for magic, command in _MAGIC.items():
            if line.startswith(magic):
                raise FileUnreadable(f"FILE is compressed: {command} FILE | ... --from=-")
        if line:
            yield line.removeprefix(_BOM)
        while line:
            while len(line) > BODY_LIMIT and not line.endswith(b"\n"):
                line = file.readline(BODY_LIMIT + 1)
            line = file.readline(BODY_LIMIT + 1)
            if line:
                yield line
    except OSError as exc:
        raise FileUnreadable(f"FILE cannot be read: {exc.strerror}") from exc


def json_of_line(line: bytes) -> Any:
    if len(line) > BODY_LIMIT:
        raise ValueError(f"longer than {BODY_LIMIT >> 20} MiB")
    try:
        return parse_json(line)
    except UnicodeDecodeError:
        raise ValueError("no UTF-8") from None
    except json.JSONDecodeError as exc:
        raise ValueError(f"no JSON ({exc.msg}); for files over several lines: jq -c .") from None


_OTHER_KIND = re.compile("t[^3]_")  # t1_ a comment, t2_ an account, t5_ a subreddit


def posts_of(value: Any) -> list[Any]:
    """Give the posts that a file's value holds; raise ValueError if it is none."""
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    if "kind" in value:
        if is_listing(value):
            return t3_data(value["data"]["children"])
        found = t3_data([value])
    else:
        found = [value]
    if not found or any(map(is_other_kind, found)):
        raise ValueError("another kind of thing")
    return found


def is_other_kind(value: Any) -> bool:
    """Tell whether a bare object is a comment (link_id), an account or such."""
    return isinstance(value, dict) and (
        "link_id" in value or _OTHER_KIND.match(str(value.get("name"))) is not None
    )


_ESCAPES = (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&"))  # reddit_base.py, without raw_json


def unescaped(post: Post) -> Post:
    """Decode the three entities that Reddit escapes in titles, once."""
    title = post.get("title")
    if isinstance(title, str) and "&" in title:
        for entity, character in _ESCAPES:
            title = title.replace(entity, character)
        post["title"] = title
    return post


# --- Transform ----------------------------------------------------------------

Row = dict[str, Any]

COLUMNS = ("id", "created_utc", "subreddit", "title", "author", "author_name", "permalink")
BUILT_IN = (*COLUMNS, "stored_utc")


def parse_field(spec: str) -> Field:
    """Read KEY or KEY:COLUMN. Raises BadUsage for what can be no column."""
    key, _, column = spec.partition(":")
    column = column or key.replace(".", "_")
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", column, re.ASCII) or not all(key.split(".")):
        raise BadUsage(f"--field={spec}: no usable column name; give one as KEY:COLUMN")
    if column.lower() in BUILT_IN:
        raise BadUsage(f"--field={spec}: the column {column} is built in; choose another")
    return Field(tuple(key.split(".")), column)


def parse_fields(specs: Iterable[str]) -> list[Field]:
    """Read all --field options; a column asked for twice is BadUsage."""
    fields: dict[str, Field] = {}
    for spec in specs:
        field = parse_field(spec)
        if field.column.lower() in fields:
            raise BadUsage(f"--field={spec}: the column {field.column} is asked for twice")
        fields[field.column.lower()] = field
    return list(fields.values())


_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


def text(value: Any) -> str | None:
    """Give a string that SQLite can hold; NULs and lone surrogates become U+FFFD."""
    if not isinstance(value, str):
        return None
    if value.isascii() and "\0" not in value:
        return value
    return _UNSTORABLE.sub("\ufffd", value)


def scalar(value: Any) -> Any:
    """Give any JSON value as SQLite can hold it; objects and lists as JSON text."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, float) or (isinstance(value, int) and -(2**63) <= value < 2**63):
        return value
    try:
        return text(value if isinstance(value, str) else json_text(value))
    except (RecursionError, ValueError, TypeError):
        return None


def json_text(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:  # 1e999 became infinite, which is no JSON: null
        return json.dumps(_decode(json.dumps(value)), ensure_ascii=False)


def value_at(post: Post, path: Sequence[str]) -> Any:
    value: Any = post
    for key in path:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def transform(post: Post, fields: Sequence[Field] = ()) -> Row:
    """Trim and rename a post to the columns of `posts`, and those of `fields`.

    Whatever is missing, null or of the wrong type is None; only `id` must be right.
    """
    author_name = text(post.get("author"))
    permalink = text(post.get("permalink"))
    row = {
        "id": post["id"],
        "created_utc": created(post),
        "subreddit": text(post.get("subreddit")),
        "title": text(post.get("title")),
        "author": text(post.get("author_fullname")),
        "author_name": None if author_name == "[deleted]" else author_name,
        "permalink": permalink.partition("?")[0] if permalink else permalink,
    }
    for field in fields:
        row[field.column] = scalar(value_at(post, field.path))
    return row


# --- Load ---------------------------------------------------------------------

APPLICATION_ID = 0x72647069  # "rdpi", so that `file` and we know our databases
USER_VERSION = 1

SCHEMA = """
CREATE TABLE posts (
    id TEXT PRIMARY KEY NOT NULL, created_utc INTEGER, subreddit TEXT, title TEXT,
    author TEXT, author_name TEXT, permalink TEXT, stored_utc INTEGER
);
CREATE INDEX posts_created_utc ON posts (created_utc);
CREATE TABLE cursors (
    subreddit TEXT PRIMARY KEY NOT NULL, since_utc INTEGER, newest_utc INTEGER, polled_utc INTEGER
);
CREATE TABLE gaps (
    subreddit TEXT, after_utc INTEGER, before_utc INTEGER, noticed_utc INTEGER
);
CREATE VIEW recent_posts AS
    SELECT strftime('%Y-%m-%dT%H:%M:%SZ', created_utc, 'unixepoch') AS created, subreddit,
        title, author_name, 'https://www.reddit.com' || permalink AS link
    FROM posts ORDER BY created_utc DESC;
CREATE VIEW posts_per_hour AS
    SELECT strftime('%Y-%m-%dT%H:00:00Z', created_utc, 'unixepoch') AS hour, count(*) AS posts
    FROM posts GROUP BY 1 ORDER BY 1 DESC;
CREATE VIEW coverage AS
    SELECT subreddit, strftime('%Y-%m-%dT%H:%M:%SZ', since_utc, 'unixepoch') AS since,
        strftime('%Y-%m-%dT%H:%M:%SZ', newest_utc, 'unixepoch') AS until,
        strftime('%Y-%m-%dT%H:%M:%SZ', polled_utc, 'unixepoch') AS last_poll,
        (SELECT count(*) FROM gaps WHERE gaps.subreddit = cursors.subreddit) AS gaps
    FROM cursors;
"""

# Two first runs at once cover what lies between them only if they meet.
MOVE_CURSOR = """
INSERT INTO cursors (subreddit, since_utc, newest_utc, polled_utc) VALUES (?, ?, ?, ?)
ON CONFLICT (subreddit) DO UPDATE SET
    since_utc = CASE WHEN since_utc <= excluded.newest_utc AND excluded.since_utc <= newest_utc
        THEN min(since_utc, excluded.since_utc) ELSE max(since_utc, excluded.since_utc) END,
    newest_utc = max(newest_utc, excluded.newest_utc), polled_utc = excluded.polled_utc
"""

NAME_GAP = """
INSERT INTO gaps (subreddit, after_utc, before_utc, noticed_utc)
SELECT ?1, ?2 + newest_utc - ?5 AS after, ?3, ?4 FROM cursors
WHERE subreddit = ?1 AND after < ?3 AND NOT EXISTS (
    SELECT 1 FROM gaps WHERE subreddit = ?1 AND after_utc <= after AND before_utc >= ?3)
"""


def check_header(path: str) -> None:
    """Raise NotOurs unless PATH is new, empty, or a database that we may write.

    https://www.sqlite.org/fileformat.html#the_database_header
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise NotOurs(f"{path}: no regular file")
        with open(path, "rb") as file:
            header = file.read(100)
    except FileNotFoundError:
        return
    except OSError as exc:
        raise NotOurs(f"{path}: {exc.strerror}") from exc
    if not header:
        return
    if header[:16] != b"SQLite format 3\0":
        raise NotOurs(f"{path}: no SQLite database; give another path")
    if int.from_bytes(header[68:72], "big") != APPLICATION_ID:
        raise NotOurs(f"{path}: a database of another program; give another path")
    if int.from_bytes(header[60:64], "big") > USER_VERSION:
        raise NotOurs(f"{path}: a database of a newer redpipe; upgrade this one")


def is_locked(exc: sqlite3.Error) -> bool:
    return isinstance(exc, sqlite3.OperationalError) and "locked" in str(exc)


class Database:
    """An open database of ours, the only place where SQLite is spoken to.

    Every sqlite3 error is raised as StorageFailed that names the file. `shield` is
    entered once a transaction has its lock, and left when it is committed.
    """

    def __init__(
        self,
        path: str,
        fields: Sequence[Field] = (),
        clock: Clock = time,
        shield: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.path = os.path.abspath(path)
        self.clock = clock
        self.shield = shield
        check_header(self.path)
        self.columns = (*COLUMNS, *(field.column for field in fields))
        self._connection = self._connect()
        try:
            self._prepare()
        except BaseException:
            self._connection.close()
            raise
        self._identity = self._file_identity()

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *error: object) -> None:
        with self.shield():
            self._connection.close()

    def _connect(self) -> sqlite3.Connection:
        try:
            # One second of waiting inside SQLite at most: it hears no signals there.
            connection = sqlite3.connect(self.path, timeout=1.0, isolation_level=None)
        except sqlite3.Error as exc:
            raise NotOurs(f"{self.path}: {exc}; check the folder and its permissions") from exc
        return connection

    def _prepare(self) -> None:
        """Make the schema, in a new file, and the columns of the fields."""
        with self.transaction():
            if self.execute("PRAGMA user_version") == [(0,)]:
                for statement in SCHEMA.split(";\n"):
                    self.execute(statement)
                self.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                self.execute(f"PRAGMA user_version = {USER_VERSION}")
            present = {row[1].lower() for row in self.execute("PRAGMA table_info(posts)")}
            for column in self.columns:
                if column.lower() not in present:
                    self.execute(f'ALTER TABLE posts ADD COLUMN "{column}"')
        # After the schema: so the file's own header tells whose it is, at any instant.
        self.execute("PRAGMA journal_mode = WAL")
        self.execute("PRAGMA synchronous = NORMAL")

    def _file_identity(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def check(self) -> None:
        """Raise StorageFailed when the file has been deleted or replaced under us."""
        if self._file_identity() != self._identity:
            raise StorageFailed(f"{self.path}: deleted or replaced while in use; start again")

    def execute(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run one statement and give its rows; wait for locks up to LOCK_PATIENCE."""
        ends = self.clock.monotonic() + LOCK_PATIENCE
        while True:
            try:
                return self._connection.execute(sql, values).fetchall()
            except sqlite3.Error as exc:
                if not is_locked(exc) or self.clock.monotonic() >= ends:
                    raise self._failure(exc) from exc
            self.clock.sleep(0.05)

    def execute_many(self, sql: str, rows: Iterable[Sequence[Any]]) -> int:
        """Run a statement for each row, inside a transaction; give the rows changed."""
        try:
            return max(0, self._connection.executemany(sql, rows).rowcount)
        except sqlite3.Error as exc:
            raise self._failure(exc) from exc

    def _failure(self, exc: sqlite3.Error) -> StorageFailed:
        advice = "locked by another program" if is_locked(exc) else str(exc)
        return StorageFailed(f"{self.path}: {advice}")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Hold the write lock; commit at the end, roll back after an exception."""
        self.execute("BEGIN IMMEDIATE")
        try:
            with self.shield():
                yield
                self.execute("COMMIT")
        finally:
            if self._connection.in_transaction:
                with suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")

    def cursors(self, names: Sequence[str]) -> dict[str, Cursor]:
        """Give the cursors of those names that have one."""
        self.check()
        rows = self.execute("SELECT subreddit, since_utc, newest_utc, polled_utc FROM cursors")
        return {name: Cursor(*values) for name, *values in rows if name in names}

    def unstored(self, posts: Sequence[Post]) -> list[Post]:
        """Give the posts that are not stored, or stored without the author they have."""
        authors: dict[str, str | None] = {}
        for start in range(0, len(posts), 500):  # SQLite took 999 variables until 3.32
            ids = [post["id"] for post in posts[start : start + 500]]
            marks = ", ".join("?" * len(ids))
            authors.update(self.execute(f"SELECT id, author FROM posts WHERE id IN ({marks})", ids))
        return [
            post
            for post in posts
            if post["id"] not in authors
            or (authors[post["id"]] is None and text(post.get("author_fullname")))
        ]


def insert_statement(columns: Sequence[str]) -> str:
    """Write the statement that stores a row, or fills what is NULL in one stored."""
    names = ", ".join(f'"{column}"' for column in (*columns, "stored_utc"))
    marks = ", ".join("?" * (len(columns) + 1))
    others = [column for column in columns if column != "id"]
    filled = ", ".join(f'"{c}" = coalesce(posts."{c}", excluded."{c}")' for c in others)
    gains = " OR ".join(f'(posts."{c}" IS NULL AND excluded."{c}" IS NOT NULL)' for c in others)
    return (
        f"INSERT INTO posts ({names}) VALUES ({marks})"
        f" ON CONFLICT (id) DO UPDATE SET {filled} WHERE {gains}"
    )


def load(
    database: Database,
    rows: Iterable[Row],
    cursors: Mapping[str, Cursor] = MappingProxyType({}),
    gaps: Sequence[Gap] = (),
) -> int:
    """Store rows, cursors and gaps in one transaction; give the posts stored or filled.

    The rows are those that `transform` makes with the database's fields. A post that
    is stored already gains what was NULL, and loses nothing. Raises StorageFailed.
    """
    database.check()
    now = int(database.clock.time())
    pick = itemgetter(*database.columns)
    values = [(*pick(row), now) for row in rows]
    moves = [(name, *cursor) for name, cursor in cursors.items()]
    if not (values or moves or gaps):
        return 0
    with database.transaction():
        stored = database.execute_many(insert_statement(database.columns), values)
        database.execute_many(NAME_GAP, gaps)  # before the cursor moves: it looks at it
        database.execute_many(MOVE_CURSOR, moves)
    log.debug("%d posts stored, %d gaps named", stored, len(gaps))
    return stored
