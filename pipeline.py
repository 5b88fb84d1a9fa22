"""Keep a SQLite database of Reddit's new posts.

    Reddit --> stream() --> transform() --> load() --> SQLite
    a file --> read_file() --^ posts         ^ rows     ^ transactions

Each name is a listing of its own. A walk reads it from its newest page back past
its cursor, the time up to which everything listed is stored. Its posts, oldest
first, and the cursor it moves make one Batch, and `load` commits a Batch in one
transaction. So there is never a hole behind a cursor, whenever the process dies: a
walk that did not finish moved nothing, and what a finished one could not reach is a
row in `gaps`.

Deciding is done by pure functions of values; sessions, clocks and random numbers
are arguments. Nothing here prints, reads the environment or knows of signals.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import logging
import math
import os
import random
import re
import select
import sqlite3
import time
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeVar, cast
from urllib.parse import quote, urlsplit

Post = dict[str, Any]  # with Reddit's own keys; `id` is always there and usable
Names = Sequence[str]  # of subreddits, in lower case

WWW_URL = "https://www.reddit.com"
OAUTH_URL = "https://oauth.reddit.com"

PAGE = 100  # posts a page: `limit` is clamped to 1..100 (reddit-archive, validator.py)
HORIZON = 1000  # items a listing holds (reddit-archive, lib/db/queries.py)
# Removed items leave a listing, 900-odd is common (BDFR issues 57 and 195): one
# that ends below this many was short by itself, one above may have been cut.
SHORT = 750
STEADY = 1.0  # seconds in which few posts are listed, of all of Reddit too

TIMEOUTS = 5.0, 10.0  # seconds; to connect, and between two parts of an answer
BODY_TIMEOUT = 30.0
IDLE_TIMEOUT = 50.0  # NATs drop what was silent for a minute, without a word
BODY_LIMIT = 16 * 2**20  # bytes; of an answer and of a line

PATIENCE = 120.0  # seconds --once goes on without one good answer
BUDGET_PATIENCE = 480.0  # seconds --once waits for the budget in all
MODEST_PATIENCE = 3600.0  # seconds --recheck waits for it between two answers
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


class Unanswered(RedpipeError):
    """A page did not come, for now; those of other listings may."""


class Refused(RedpipeError):
    """Reddit refuses the credentials, or blocks this address."""

    exit_status = 77

    def __str__(self) -> str:
        return f"{super().__str__()}; see README, Credentials"


class BadEnvironment(RedpipeError):
    exit_status = 78


def several(names: Names) -> str:
    """Name some subreddits, and count the others."""
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return ", ".join(f"r/{name}" for name in names[:5]) + more


# --- Shapes -----------------------------------------------------------------


class Clock(Protocol):
    """The part of the `time` module that is used here; all in seconds."""

    def time(self) -> float: ...
    def monotonic(self) -> float: ...
    def sleep(self, seconds: float, /) -> None: ...


class Request(NamedTuple):
    """What is asked, named as `requests.request` has it."""

    method: str
    url: str
    params: dict[str, str]
    headers: dict[str, str]
    data: dict[str, str] | None = None


class Answer(NamedTuple):
    """What came back; `headers` are asked for by names in lower case."""

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

    `complete`: it passed its target, or the listing held nothing more. `reached`: all that
    was listed at `utc` and created after this was read (inf: no post).
    """

    posts: list[Post]
    complete: bool
    reached: float
    utc: float


class Cursor(NamedTuple):
    """How far a subreddit is stored without a hole; a row of `cursors`, UTC seconds."""

    subreddit: str
    since_utc: int
    newest_utc: int
    polled_utc: int


class Gap(NamedTuple):
    """What a listing no longer held: from `lag` seconds before the cursor up to `before_utc`.

    The cursor counts as it stands when the gap is stored: when another process has moved it
    on meanwhile, the gap begins as much later, or is none.
    """

    subreddit: str
    lag: int
    before_utc: int
    noticed_utc: int


class Batch(NamedTuple):
    """What one transaction stores: new posts, oldest first, and what they prove."""

    posts: Iterable[Post]
    cursors: Sequence[Cursor] = ()
    gaps: Sequence[Gap] = ()


class Field(NamedTuple):
    """One --field: where it is in a post, and its column."""

    path: tuple[str, ...]
    column: str


# --- Posts in listings and files ----------------------------------------------

# Where a post's id is, base 36; its length grows (libreddit issue 675).
_IDS = (("id", re.compile("([0-9a-z]+)")), ("name", re.compile("t3_([0-9a-z]+)")))


def usable(post: Any) -> Post | None:
    """Return a post with its `id` in place, or None when it has no usable one."""
    for key, form in _IDS if isinstance(post, dict) else ():
        if isinstance(post.get(key), str) and (found := form.fullmatch(post[key])):
            post["id"] = found[1]
            return cast("Post", post)
    return None


def integer(value: Any) -> int | None:
    """Return a number, or a number in a string, as a 64-bit integer, else None."""
    try:
        number = value if isinstance(value, int) else int(float(value))
    except (TypeError, ValueError, OverflowError):
        return None
    return number if -(2**63) <= number < 2**63 and not isinstance(value, bool) else None


def created(post: Mapping[str, Any]) -> int | None:
    return integer(post.get("created_utc"))


def times_of(posts: Iterable[Post]) -> list[int]:
    """Return the created_utc of those posts that have one."""
    return [at for at in map(created, posts) if at is not None]


_decode = json.JSONDecoder(parse_constant=lambda name: None).decode


def parse_json(text: bytes) -> Any:
    """Read JSON from UTF-8; NaN is None. Raises ValueError, whatever is wrong."""
    if len(text) > BODY_LIMIT:
        raise ValueError(f"longer than {BODY_LIMIT >> 20} MiB")
    try:
        return _decode(text.decode("utf-8", "surrogatepass"))
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc


def is_listing(value: Any) -> bool:
    data = value.get("data") if isinstance(value, dict) else None
    children = data.get("children") if isinstance(data, dict) else None
    return isinstance(children, list) and bool(value.get("kind") == "Listing")


def t3_data(children: Iterable[Any]) -> list[Any]:
    """Return what is inside a listing's posts; other kinds of things are skipped."""
    things = (thing for thing in children if isinstance(thing, dict))
    return [thing.get("data") for thing in things if thing.get("kind") == "t3"]


def oldest_first(posts: Iterable[Post]) -> list[Post]:
    return sorted(posts, key=lambda post: (created(post) or 0, len(post["id"]), post["id"]))


def listing_rate(posts: Sequence[Post]) -> float:
    """Return the posts a second that a listing shows, by its newer half; 0 for one post.

    The half keeps out what was approved late; a second is the times' resolution.
    """
    times = sorted(times_of(posts), reverse=True)
    half = len(times) // 2
    return half / max(1, times[0] - times[half]) if half else 0.0


# --- Answers ------------------------------------------------------------------

# Who is asked: the API with a token, the anonymous JSON, the feed, the feed with its own
# token; and for the API's token.
OAUTH, JSON, FEED, OWN_FEED, GRANT = "oauth", "json", "feed", "own feed", "grant"


class NoJson(AskAgain):
    """Reddit gives this client no JSON without a token; it may give the feed."""


class BadToken(Refused):
    """The token may just have ended early."""


class NoFeed(Refused):
    """The feed is closed to this address; or only one name's is, when others come."""


class Rule(NamedTuple):
    """What an answer means: an error to raise, None when it is good.

    `answers`: a pattern of its status, its kind and its source, as in "404 object own feed".
    """

    answers: str
    error: type[RedpipeError] | None
    sentence: str = ""


NO_FEED = "Reddit blocks this address, or the subreddit is private or quarantined (403)"
# The first row that fits counts. A final error is final only before the first good
# answer for a name; afterwards it is a failure that may pass.
# fmt: off
RULES = (
    Rule("200 listing .*",             None),
    Rule("200 token grant",            None),
    Rule("429 .*",                     AskAgain, "rate limited (429)"),
    Rule(".* denial grant",            Refused,  "Reddit refuses the credentials ({came})"),
    Rule("40[01] .* grant",            Refused,  "Reddit refuses the credentials ({status})"),
    Rule("403 .* grant",               Refused,  "Reddit refuses or blocks the app (403)"),
    Rule(".* grant",                   Failed,   "HTTP {status} ({came}) instead of a token"),
    Rule("401 .* oauth",               BadToken, "Reddit refuses the token (401)"),
    Rule("401 (object .*|.*feed)",     Refused,  "Reddit wants credentials (401)"),
    Rule("451 .*",                     Gone,     "cannot be read for legal reasons (451)"),
    Rule(".* search .*",               Gone,     "does not exist"),
    Rule("40[34] object .*",           Gone,     "cannot be read: {came} ({status})"),
    Rule("404 .*feed",                 Gone,     "does not exist, or is banned (404)"),
    Rule(".* (object|fault) .*",       Failed,   "HTTP {status} ({came}) instead of a listing"),
    Rule(".* json", NoJson, "Reddit blocks anonymous JSON ({status}); taking the feed"),
    Rule("403 .*feed",                 NoFeed,   NO_FEED),
    Rule("403 other .*",               Refused,  "Reddit blocks this address, or the app (403)"),
    Rule(".* login own feed",          Refused,  "Reddit answers the feed token with a login page"),
    Rule(".*",                         Failed,   "HTTP {status} ({came}) instead of a listing"),
)
# fmt: on


def judged(answer: Answer, source: str, value: Any) -> Any:
    """Return what a good answer holds; raise what RULES say of another one."""
    answered = f"{answer.status} {kind_of(answer, source, value)} {source}"
    rule = next(rule for rule in RULES if re.fullmatch(rule.answers, answered))
    if rule.error:
        raise rule.error(rule.sentence.format(status=answer.status, came=came(answer, value)))
    return value


def http_date(text: str | None) -> float | None:
    with suppress(TypeError, ValueError, IndexError, OverflowError):
        return parsedate_to_datetime(text or "").timestamp()
    return None


def read_value(body: bytes, source: str, utc: float) -> Page | dict[str, Any] | None:
    """Return what a body holds: a page, another JSON object, or None for anything else."""
    if source in (FEED, OWN_FEED) and (page := read_feed(body, utc)):
        return page
    try:
        value = parse_json(body.removeprefix("\ufeff".encode()))
    except ValueError:
        return None
    if source in (OAUTH, JSON) and is_listing(value):
        return listing_page(value["data"], utc)
    return value if isinstance(value, dict) else None


def kind_of(answer: Answer, source: str, value: Page | dict[str, Any] | None) -> str:
    """Return what came, as RULES have it.

    A listing, a token, a denial (an error in words instead of a token), another JSON object,
    a fault (it passes, whatever was asked), a login page, the search for subreddits, or other.
    """
    status, where = answer.status, url_path(answer.headers.get("location", ""))
    broken = status == 200 and value is None and answer.body.lstrip()[:1] in (b"", b"{")
    if broken or status == 408 or status >= 500:
        return "fault"
    if isinstance(value, Page):
        return "listing"
    if where.startswith("/subreddits/search"):
        return "search"
    if value is None or 300 <= status < 400:
        html = status == 200 and media_type(answer) == "text/html"
        return "login" if html or "/login" in where else "other"
    if source == GRANT and re.fullmatch("[!-~]+", str(value.get("access_token") or "")):
        return "token"
    return "denial" if source == GRANT and isinstance(value.get("error"), str) else "object"


def media_type(answer: Answer) -> str:
    return answer.headers.get("content-type", "").partition(";")[0].strip().lower()


# A server may show what it was sent. Only this is repeated: short words of letters and
# short numbers, a media type, a path of short names. Secrets are longer, or hold more.
_PLAIN = re.compile(
    r"(?:[A-Za-z_]{1,20}|[0-9]{1,3})(?:[ .,;:'()/]{1,2}(?:[A-Za-z_]{1,20}|[0-9]{1,3}))*[.)]{0,2}"
    r"|[a-z]{1,11}/[a-z.+]{1,24}|(?:/[A-Za-z0-9_.]{0,21})+"
)


def plain(said: Any) -> str:
    """Return words that may be repeated, those of a status for its number, or nothing."""
    from http.client import responses  # requests has imported it

    if type(said) is int:
        return responses.get(said, f"error {said}" if 0 < said < 1000 else "")
    return said if isinstance(said, str) and len(said) < 200 and _PLAIN.fullmatch(said) else ""


def came(answer: Answer, value: Any) -> str:
    """Say what came: what an object says of itself, else where it leads or of what type it is."""
    if 300 <= answer.status < 400:
        path = url_path(answer.headers.get("location", ""))
        return f"redirect to {plain(path) or 'another page'}"
    if isinstance(value, dict):
        words = [plain(value.get(key)) for key in ("reason", "message", "error")]
        reason = next(filter(None, words), "no reason given")
        described = plain(value.get("error_description"))
        return f"{reason}: {described}" if described else reason
    return plain(media_type(answer)) or "of unknown type" if answer.body else "empty"


def listing_page(data: dict[str, Any], utc: float) -> Page:
    """Turn a Listing's data into a Page; `after` null is the listing's end, none tells nothing."""
    posts = list(filter(None, map(usable, t3_data(data["children"]))))
    last = fullname(posts[-1]) if posts else None
    return Page(posts, data.get("after", last), len(data["children"]), utc, "after" in data)


def fullname(post: Post) -> str:
    return f"t3_{post['id']}"


# What may stand before the root: no DOCTYPE, whose entities could grow without bound.
_FEED = re.compile(r"(?:\s|<\?[^>]*>|<!--[^>]*>)*(<feed\b[^>]*>)")
_CDATA = re.compile(r"<!\[CDATA\[((?:(?!<!\[CDATA\[).)*?)\]\]>", re.DOTALL)
_FORBIDDEN = re.compile("[\0-\x08\v\f\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
_REFERENCE = re.compile(r"&(?:#[0-9]{1,9};|#[xX][0-9a-fA-F]{1,8};|[A-Za-z]\w{1,31};)?")


def read_feed(body: bytes, utc: float) -> Page | None:
    """Turn an Atom feed into a Page, or return None: this is no feed.

    It is cut into its entries first, so that what is wrong in one spoils no other; one
    that cannot be read counts as a thing. A feed cut short is none.
    """
    from html import escape  # here, because only the feed needs it

    text = _CDATA.sub(lambda section: escape(section[1]), body.decode("utf-8-sig", "replace"))
    head, *entries = re.split(r"<entry(?=[\s/>])", text)
    found = _FEED.match(head)
    if not (found and "http://www.w3.org/2005/Atom" in found[1] and "</feed>" in text):
        return None
    root = found[1].replace("xmlns=", "xmlns:none=")  # so that names have no prefix
    return listing_page({"children": [feed_thing(root, entry) for entry in entries]}, utc)


def feed_thing(root: str, entry: str) -> dict[str, Any]:
    """Return what follows `<entry` as a listing's child; of no kind if it cannot be read."""
    from xml.etree import ElementTree

    if "</content>" in entry:  # most of the text, and of no use
        before, _, content = entry.partition("<content")
        entry = before + content.partition("</content>")[2]
    entry = f"{root}<entry{entry.partition('</entry>')[0]}</entry></feed>"
    try:
        feed = ElementTree.fromstring(_FORBIDDEN.sub("\ufffd", _REFERENCE.sub(meant, entry)))
    except ElementTree.ParseError:
        return {}
    return {"kind": "t3", "data": feed_post(feed[0])}


def meant(reference: re.Match[str]) -> str:
    """Return what XML takes for a reference: HTML has more names, and people write &."""
    from html import escape, unescape

    text = unescape(reference[0]) or "\ufffd"
    return escape(text).replace("\r", "&#13;")  # as it is, XML would make it a newline


def feed_post(entry: Any) -> Post:
    """Return a feed's entry with Reddit's keys.

    The forms are `id` t3_x, `category/@term` python, `author/name` /u/x,
    `published` 2026-11-23T08:00:00+00:00, `link/@href` an absolute address.
    """
    attributes = {element.tag: element.attrib for element in reversed(entry)}
    return {
        "name": entry.findtext("id", "").strip(),
        "title": entry.findtext("title"),
        "subreddit": attributes.get("category", {}).get("term"),
        "author": entry.findtext("author/name", "").rpartition("/")[2] or None,
        "created_utc": iso_seconds(entry.findtext("published", "")),
        "permalink": url_path(attributes.get("link", {}).get("href", "")) or None,
    }


def iso_seconds(text: str) -> int | None:
    """Return an ISO 8601 time in UTC seconds."""
    with suppress(ValueError):
        moment = datetime.fromisoformat(text.strip().replace("Z", "+00:00"))
        return int(moment.timestamp()) if moment.tzinfo else None
    return None


def url_path(url: str) -> str:
    return re.sub(r"(?s)^(\w+:)?//[^/?#]*|[?#].*", "", url)


def retry_after(text: str | None, utc: float) -> float | None:
    """Return the seconds of a Retry-After, one at least; it may be a date (RFC 9110, 10.2.3)."""
    date = http_date(text)
    seconds = integer(text) if date is None else date - utc
    return None if seconds is None else max(1.0, seconds)


# --- Pacing -------------------------------------------------------------------

FORGIVEN = 3600.0  # seconds after which one halving is taken back
LONGEST_ADVICE = 86400.0  # seconds; a Retry-After beyond it is a mistake


class Window(NamedTuple):
    """A budget that x-ratelimit-* told: so many requests until a reset, then anew.

    Times are one monotonic clock's seconds. `length` is the longest reset that was told:
    windows of 600 s have been seen, a proxy may have others.
    """

    total: float = 0.0
    remaining: float = 0.0
    resets_at: float = 0.0
    length: float = 0.0

    def current(self, now: float) -> Window:
        """Return the window of this moment: a new one when the old one is over."""
        if now < self.resets_at:
            return self
        return self._replace(remaining=self.total, resets_at=now + self.length)

    def spend(self, now: float) -> Window:
        """Count one request that goes out now."""
        current = self.current(now)
        return current._replace(remaining=current.remaining - 1)

    def wait(self, requests: int, now: float) -> float:
        """Return the seconds until so many requests, or a whole window's, may follow at once."""
        current = self.current(now)
        enough = current.remaining >= max(1, min(requests, int(self.total)))
        return 0.0 if enough else current.resets_at - now

    def free(self, now: float) -> int:
        """Return how many requests may follow without waiting."""
        return max(0, int(self.current(now).remaining))

    def rate(self, now: float) -> float:
        """Return the requests a second that the rest of the window carries, one at least."""
        current = self.current(now)
        return max(1.0, current.remaining) / max(1.0, current.resets_at - now)


class Assumed(NamedTuple):
    """A budget while none is told: so many requests in any 60 s, halved by each 429.

    `sent`: when the last requests went out. The least is one request in about 100 s; one
    halving is taken back an hour after the last, and so on.
    """

    total: int
    sent: tuple[float, ...] = ()
    halvings: int = 0
    halved_at: float = 0.0

    def in_force(self, now: float) -> int:
        """Return the halvings that are not taken back yet."""
        return max(0, self.halvings - int((now - self.halved_at) // FORGIVEN))

    def quota(self, now: float) -> tuple[int, float]:
        """Return how many requests may go out within how many seconds."""
        factor = 2 ** self.in_force(now)
        burst = max(1, self.total // factor)
        return burst, burst * factor * 60.0 / self.total

    def spend(self, now: float) -> Assumed:
        return self._replace(sent=(*self.sent, now)[-self.total :])

    def wait(self, requests: int, now: float) -> float:
        """Return the seconds until so many requests, or a whole quota, may follow at once."""
        burst, seconds = self.quota(now)
        younger = burst - min(requests, burst)  # that many may be; the one before them may not
        if len(self.sent) <= younger:
            return 0.0
        return max(0.0, self.sent[-1 - younger] + seconds - now)

    def free(self, now: float) -> int:
        burst, seconds = self.quota(now)
        return max(0, burst - sum(at + seconds > now for at in self.sent))

    def rate(self, now: float) -> float:
        burst, seconds = self.quota(now)
        return burst / seconds

    def halve(self, now: float) -> Assumed:
        """Assume half as much from now on."""
        most = int(math.log2(self.total)) + 1
        return self._replace(halvings=min(most, self.in_force(now) + 1), halved_at=now)


class Budget(NamedTuple):
    """What may be asked: what is known, what was advised, and the 429s in a row."""

    known: Window | Assumed
    not_before: float = 0.0
    refusals: int = 0

    def spend(self, now: float) -> Budget:
        """Count one request that goes out now."""
        return self._replace(known=self.known.spend(now))

    def wait(self, requests: int, now: float) -> float:
        """Return the seconds until so many requests, or as many as ever, may follow at once."""
        return max(0.0, self.not_before - now, self.known.wait(requests, now))

    def free(self, now: float) -> int:
        """Return how many requests may follow without waiting."""
        return self.known.free(now) if now >= self.not_before else 0

    def learn(self, answer: Answer, now: float, utc: float) -> Budget:
        """Take in what an answer says of the budget; `utc` is the server's time."""
        known, wait = self.known, retry_after(answer.headers.get("retry-after"), utc) or 0.0
        remaining, reset, used = (
            integer(answer.headers.get(f"x-ratelimit-{key}"))
            for key in ("remaining", "reset", "used")
        )
        if remaining is not None and reset is not None:
            reset += 1  # whole seconds, cut or rounded: one more is sure to be past it
            wait = wait if remaining >= 1 else max(wait, reset)
            old = known if isinstance(known, Window) else Window()
            # Past the limit `used` goes on growing, and tells no total.
            total = remaining + (used or 0.0) if remaining >= 1 else old.total
            if total:
                known = Window(total, remaining, now + reset, max(reset, old.length))
        refusals = self.refusals + 1 if answer.status == 429 else 0
        if refusals:
            if isinstance(known, Assumed):  # a 429 in a window that is known is not about it
                known = known.halve(now)
            pause = 2.0 ** min(refusals, 6) if isinstance(known, Window) else 1.0 / known.rate(now)
            # Good advice is taken once; a second 429 shows that it was too short.
            wait = wait if refusals == 1 and wait > 1 else max(wait, pause)
        not_before = now + min(wait, LONGEST_ADVICE) if wait else self.not_before
        return Budget(known, not_before, refusals)


# --- Whose turn it is ---------------------------------------------------------


def seconds_per_page(rate: float) -> float:
    """Return the seconds in which a page of new posts comes."""
    return PAGE / rate if rate else math.inf


def interval_of(rate: float, interval: float) -> float:
    """Return the seconds from one walk to the next, if the budget allows: a page has come."""
    return min(max(seconds_per_page(rate), 1.0), interval)


def urgency(rate: float, elapsed: float) -> float:
    """Return what a walk is worth: how long all posts since the last have waited together.

    To walk where that is most makes the mean delay least. A listing that seems dead is
    expected to get a post a day.
    """
    return max(rate, 1 / 86400) * elapsed**2


def full_walk_is_due(cursor: Cursor, now: float, rate: float, share: float) -> bool:
    """Return whether the whole listing is to be read, for what was approved late.

    That is so at the first walk in each of the name's turns, which follow from the clock and
    the name alone: nothing need be remembered, and no restart repeats one. A turn takes 5
    minutes times a power of two: as long as a page covers, and as ten requests take at a
    tenth of the name's `share` of the budget, in requests a second.
    """
    shortest = max(300.0, seconds_per_page(rate), HORIZON / PAGE / (0.1 * share))
    shortest = min(shortest, 1e9)  # finite, where a page takes for ever
    length = 300 * 2.0 ** math.ceil(math.log2(shortest / 300))

    def turn(utc: float) -> float:
        return (utc + zlib.crc32(cursor.subreddit.encode())) // length

    return turn(now) != turn(cursor.polled_utc)


def spares_full_walk(rate: float, budget_rate: float) -> bool:
    """Return whether a listing of that rate keeps half of its posts while ten pages are read."""
    return rate * HORIZON / PAGE <= HORIZON / 2 * budget_rate


# --- Asking -------------------------------------------------------------------


def is_loopback(url: str) -> bool:
    return re.fullmatch(r"localhost|::1|127(\.\d+){3}", urlsplit(url).hostname or "") is not None


def http_fetch(clock: Clock = time) -> Fetch:
    """Return the function that sends requests, over one Session.

    A connection that was idle for long is not used again; if a used one turns out to be
    dropped, the request goes out once more. It raises Failed for what the network does.
    """
    import requests

    session = requests.Session()
    session.headers["Accept-Encoding"] = "gzip"
    session.stream = True
    session.auth = lambda prepared: prepared  # or requests looks into ~/.netrc
    # No redirect is followed, and its body is read within our limits.
    session.get_redirect_target = lambda resp: None  # type: ignore[method-assign]
    used: dict[str, float] = {}  # when each host last answered

    def fetch(request: Request) -> Answer:
        host = urlsplit(request.url).netloc
        reused = clock.monotonic() - used.pop(host, -math.inf) < IDLE_TIMEOUT
        if not reused:
            session.close()
        try:
            answer = send(session, request)
        except Failed as exc:
            if not (reused and any(isinstance(cause, ConnectionError) for cause in causes(exc))):
                raise
            answer = send(session, request)
        used[host] = clock.monotonic()
        return answer

    return fetch


def send(session: Any, request: Request) -> Answer:
    """Send a request; raise Failed in words without the address, which may hold a token.

    What goes to this machine does not pass a proxy.
    """
    from urllib3.exceptions import HTTPError

    past = {"http": "", "https": "", "all": ""} if is_loopback(request.url) else None
    try:
        with session.request(**request._asdict(), proxies=past, timeout=TIMEOUTS) as response:
            return Answer(response.status_code, response.headers, read_body(response))
    except (HTTPError, OSError, ValueError) as exc:  # those of requests are OSErrors
        raise Failed(network_trouble(exc)) from exc


def read_body(response: Any) -> bytes:
    """Return a body; of an error whose body is no good nothing: its status and headers count."""
    from urllib3.exceptions import HTTPError

    try:
        body = read_whole(response.raw, decode=False)
        return decoded(body, response.headers.get("content-encoding", ""))
    except (HTTPError, Failed):
        if response.status_code == 200:
            raise
        return b""


def decoded(body: bytes, encoding: str) -> bytes:
    """Decompress a body; gzip's several members and what follows are fine.

    From memory: from a connection urllib3 reads on until something comes out, without limits.
    """
    from urllib3 import HTTPResponse

    packed = HTTPResponse(io.BytesIO(body), {"content-encoding": encoding}, preload_content=False)
    return read_whole(packed, decode=True)


def read_whole(raw: Any, *, decode: bool) -> bytes:
    """Read to the end within BODY_TIMEOUT and BODY_LIMIT, else raise Failed."""
    ends = time.monotonic() + BODY_TIMEOUT
    body = bytearray()
    # At the end urllib3 flushes what has met bytes behind a gzip, and CPython 3.14.10 minds.
    with suppress(zlib.error):
        while chunk := raw.read1(2**16, decode_content=decode):
            body += chunk
            if len(body) > BODY_LIMIT:
                raise Failed(f"response larger than {BODY_LIMIT >> 20} MiB")
            if time.monotonic() > ends:
                raise Failed(f"response took longer than {BODY_TIMEOUT:.0f} s")
    return bytes(body)


def causes(exc: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and what is behind it."""
    while exc is not None:
        yield exc
        inside = (arg for arg in exc.args if isinstance(arg, BaseException))
        exc = exc.__cause__ or exc.__context__ or next(inside, None)


def network_trouble(exc: BaseException) -> str:
    """Say what went wrong, by the first system error behind an exception."""
    for cause in causes(exc):
        # The one without a number is http.client's, of a proxy that refuses.
        if isinstance(cause, OSError) and (cause.strerror or type(cause) is OSError):
            return str(cause.strerror or cause)
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(exc).__name__).lower()


class Reddit:
    """One way into Reddit: which source answers, its token and its budget.

    It never waits: its budget tells how long to, before it is asked.
    """

    def __init__(self, access: Access, fetch: Fetch, clock: Clock = time) -> None:
        self.access = access
        self.fetch = fetch
        self.clock = clock
        self.source = OAUTH if access.client_id else JSON
        self.budget = Budget(Assumed(60 if access.client_id else 10))
        # What is going on, in words, and until when by the monotonic clock, if that is known.
        self.doing: tuple[str, float | None] = "connecting", None
        self._token = ""
        self._token_ends = 0.0
        self._renewed = False
        self._answered = ""  # the name that was answered last

    def carries(self) -> float:
        """Return the requests a second that the budget carries."""
        return self.budget.known.rate(self.clock.monotonic())

    def page(self, name: str, after: str | None = None) -> Page:
        """Ask for one page of a name's listing.

        Raises what RULES say: Gone, Refused; AskAgain when it was no failure,
        and Failed for all that may pass.
        """
        page = self._get(name, {"limit": str(PAGE)} | ({"after": after} if after else {}))
        if page.things and not page.posts and not after:
            raise Failed("a listing without posts")
        return page if page.posts else page._replace(after=None, things=0)

    def info(self, ids: Sequence[str]) -> dict[str, Post]:
        """Ask about posts, PAGE at most, and return those that Reddit knows, by id.

        It needs an app. Raises Failed, too, for an answer that leaves out more than half, or
        holds anything else.
        """
        try:
            page = self._get("", {"id": ",".join(f"t3_{one}" for one in ids)})
        except Gone as exc:  # no word about a post
            raise Failed(str(exc)) from exc
        found = {post["id"]: post for post in page.posts}
        known = len(found.keys() & ids)
        if page.things > known or 2 * known < len(ids):
            raise Failed(f"an answer that tells of {known} of {len(ids)} posts")
        return found

    def _get(self, name: str, params: dict[str, str]) -> Page:
        """Ask; what some answers mean depends on those before, or on what was asked with."""
        if self.source == OAUTH and self.clock.monotonic() >= self._token_ends:
            self._renew_token()
        try:
            page: Page = self._ask(self._request(name, params), self.source)
        except NoJson as exc:
            log.info("%s, which has no account ids", exc)
            self.source = OWN_FEED if self.access.feed_token else FEED
            assumed = Assumed(60 if self.access.feed_token else 10)
            self.budget = self.budget._replace(known=assumed.spend(self.clock.monotonic()))
            raise
        except BadToken as exc:
            final, self._token_ends, self._renewed = self._renewed, 0.0, True
            raise (exc if final else AskAgain(exc.args[0])) from None
        except NoFeed as exc:
            other, self._answered = self._answered not in ("", name), ""
            gone = Gone("cannot be read: private or quarantined, it seems (403)")
            raise (gone if other else exc) from None
        self._renewed, self._answered = False, name
        return page

    def _ask(self, request: Request, source: str) -> Any:
        log.debug("asking for %s", url_path(request.url))
        if source != GRANT:  # tokens have a window of their own
            self.budget = self.budget.spend(self.clock.monotonic())
        answer = self.fetch(request)
        utc = http_date(answer.headers.get("date")) or self.clock.time()
        if source != GRANT or answer.status != 200:
            self.budget = self.budget.learn(answer, self.clock.monotonic(), utc)
        return judged(answer, source, read_value(answer.body, source, utc))

    def _request(self, name: str, params: dict[str, str]) -> Request:
        """Return the request for a name's listing; without a name, for posts by their ids."""
        base = self.access.url or (OAUTH_URL if self.source == OAUTH else WWW_URL)
        end = {OAUTH: "new", JSON: "new/.json"}.get(self.source, "new/.rss")
        headers = {"User-Agent": self.access.user_agent}
        if self.source in (OAUTH, JSON):
            params["raw_json"] = "1"  # or <, > and & come as entities
        elif self.access.feed_token:
            params |= {"feed": self.access.feed_token, "user": self.access.username}
        if self.source == OAUTH:
            headers["Authorization"] = f"bearer {self._token}"
        path = f"r/{name}/{end}" if name else "api/info"
        return Request("GET", f"{base}/{path}", params, headers)

    def _renew_token(self) -> None:
        """Fetch an application-only token, good until shortly before it expires.

        https://github.com/reddit-archive/reddit/wiki/OAuth2#application-only-oauth
        """
        access = self.access
        grant, device = "client_credentials", dict[str, str]()
        if not access.client_secret:
            grant = f"{OAUTH_URL}/grants/installed_client"
            device = {"device_id": "DO_NOT_TRACK_THIS_DEVICE"}
        url = f"{access.url or WWW_URL}/api/v1/access_token"
        secret = os.fsencode(f"{access.client_id}:{access.client_secret}")  # whatever was set
        basic = f"Basic {base64.b64encode(secret).decode()}"
        headers = {"User-Agent": access.user_agent, "Authorization": basic}
        data = {"grant_type": grant, **device}
        told = self._ask(Request("POST", url, {}, headers, data), GRANT)
        lifetime = integer(told.get("expires_in")) or 3600
        self._token = told["access_token"]
        self._token_ends = self.clock.monotonic() + max(lifetime - 60, lifetime * 0.9)


# --- Walking back -------------------------------------------------------------

Ask = Callable[[str | None], Page]  # for the page behind an anchor, or for the newest one

EARLIER = (1, 8, 64, 512)  # items above the last one read whose anchors are tried
FEW = 10  # posts; a page with fewer has room for more, and so many are never all misplaced

FEW_SAMPLES = 1000
FIRST_LAG = 30  # seconds, until so many samples are known
LEAST_LAG, MOST_LAG = 5, 60


def pages_back(first: Page, ask: Ask) -> Iterator[Page]:
    """Yield a listing's pages, newest first; only one that shows its end has no `after`.

    Ten pages of a feed, which does not tell its end, are all that is listed. A page that
    holds its own anchor comes from somebody who does not look at anchors.
    """
    page, read = first, list[str]()
    for pages in range(1, 4 * HORIZON // PAGE):  # even if it has no end
        yield page
        read += map(fullname, page.posts)
        exhausted = pages >= HORIZON // PAGE and len(set(read)) >= SHORT
        if not page.after or (exhausted and not page.tells_end):
            return
        anchor, page = page.after, ask(page.after)
        if anchor in map(fullname, page.posts):
            return
        page = page if page.things else page_below(read, ask)
        if not page.things:
            return


def page_below(read: Sequence[str], ask: Ask) -> Page:
    """Find what is listed below the last post read, when nothing came behind it.

    It is the listing's last, or was removed, or Reddit fell silent. The page behind an
    earlier post tells. When none of them is listed any more, the listing is read anew from
    its newest page; but one that was read as deep as listings are has pushed them out: then
    the page is empty. Raises Unanswered when the newest page is empty, too.
    """
    anchors: list[str | None] = [read[-1 - step] for step in EARLIER if step < len(read)]
    pushed_out = len(set(read)) >= SHORT
    for anchor in anchors if pushed_out else [*anchors, None]:
        page = ask(anchor)
        if page.things:
            return page._replace(after=None) if ends_there(page, read) else page
    if pushed_out:
        return Page([])
    raise Unanswered("the listing fell silent while it was read")


def ends_there(page: Page, read: Sequence[str]) -> bool:
    """Return whether a page ends in the last post read, though it has room for more.

    Then an earlier post leads to the same last one and to nothing else: that is the end.
    """
    return [fullname(post) for post in page.posts[-1:]] == [*read[-1:]] and len(page.posts) < FEW


def walk_back(first: Page, ask: Ask, target: float, least: int, go_on: Callable[[], bool]) -> Walk:
    """Read older pages, so many at least, until one has passed the target or there are no more.

    `go_on` may cut the walk short. A listing that ends after a while need not be short: new
    posts may have pushed its last ones out.
    """
    found: dict[str, Post] = {}
    reached = math.inf
    for pages, page in enumerate(pages_back(first, ask), 1):
        found = {post["id"]: post for post in page.posts} | found
        # Listings are nearly, not strictly, ordered: one old post proves nothing.
        reached = min(reached, max(times_of(page.posts[-FEW:]), default=math.inf))
        if (reached < target and pages >= least) or not go_on():
            break
    short = page.after is None and len(found) < SHORT
    if short and reached >= target and page.utc - first.utc > STEADY:
        short = is_short(found, ask)
    return Walk(list(found.values()), short or reached < target, reached, first.utc)


def is_short(found: dict[str, Post], ask: Ask) -> bool:
    """Return whether a listing holds little even with what came while it was walked.

    That is read and added, from the newest page to one that ends in a post of the walk:
    those that Reddit keeps on top show nothing.
    """
    walked = set(found)
    for page in pages_back(ask(None), ask):
        found.update((post["id"], post) for post in page.posts)
        if any(post["id"] in walked for post in page.posts[-1:]):
            return len(found) < SHORT
    return False


def expected_lag(lags: Sequence[float]) -> int:
    """Return the seconds within which posts are listed: twice what one in a thousand takes."""
    if len(lags) < FEW_SAMPLES:
        return FIRST_LAG
    rare = sorted(lags)[-(len(lags) // 1000)]
    return min(max(math.ceil(2 * rare + 1), LEAST_LAG), MOST_LAG)


def look_back(lag: int, rate: float) -> float:
    """Return the seconds that a walk reads back behind the cursor: half a listing at most."""
    return min(lag, HORIZON / 2 / rate) if rate else lag


def lags_of(posts: Iterable[Post], cursor_utc: int) -> list[float]:
    """Return new posts' lags: how far they came behind the cursor; 0 for most.

    Beyond MOST_LAG it is approval by a moderator, which no look-back covers.
    """
    lags = (max(0.0, cursor_utc - at) for at in times_of(posts))
    return [lag for lag in lags if lag <= MOST_LAG]


def next_cursor(name: str, cursor: Cursor | None, walk: Walk, polled_utc: int) -> Cursor:
    """Return a name's cursor after a walk; one in the future moves none."""
    newest = max((at for at in times_of(walk.posts) if at <= walk.utc), default=0)
    if cursor:
        return cursor._replace(newest_utc=max(cursor.newest_utc, newest), polled_utc=polled_utc)
    newest = newest or int(walk.utc)
    oldest = min(times_of(walk.posts), default=newest) if walk.complete else walk.reached
    return Cursor(name, int(min(newest, oldest)), newest, polled_utc)


def gaps_of(walk: Walk, cursor: Cursor | None, lag: int, noticed_utc: int) -> list[Gap]:
    """Name what a walk did not reach: all since the cursor less the lag expected."""
    if cursor is None or walk.complete or not cursor.newest_utc - lag < walk.reached < math.inf:
        return []
    return [Gap(cursor.subreddit, lag, int(walk.reached), noticed_utc)]


# --- Following ----------------------------------------------------------------

T = TypeVar("T")
Chance = Callable[[], float]  # in [0, 1), as random.random

TRIES = 3  # for a page, until it is another listing's turn


def backoff(failures: int, rate: float, chance: float) -> float:
    """Return the seconds to wait after so many failures; `chance` is in [0, 1).

    At most about the time a page covers, between 5 and 60 s: all of Reddit fills a
    whole listing in 58 s, a longer wait loses posts for good.
    """
    longest = min(max(seconds_per_page(rate), 5.0), 60.0)
    return min(longest, 2.0 ** min(failures - 1, 6)) * (0.5 + chance / 2)


class Asker:
    """Asks until there is an answer: waits for the budget, and after failures.

    With `once` its patience, which begins now, ends; then `exhausted` says why. `spare`: the
    part of every window that it leaves to others.
    """

    spare = 0.0
    budget_patience = BUDGET_PATIENCE

    def __init__(self, reddit: Reddit, *, once: bool, chance: Chance = random.random) -> None:
        self.reddit = reddit
        self.clock = reddit.clock
        self.once = once
        self.chance = chance
        self.answered = False  # ever
        self.outage_told = False  # since the last answer
        self.gives_up_at = self.clock.monotonic() + PATIENCE
        self.waited = 0.0  # seconds, for the budget
        self.exhausted = ""

    def answer(self, what: str, ask: Callable[[], T], tries: float, rate: float) -> T:
        """Ask until there is an answer; raise what is final, and Unanswered after so many failures.

        `what` is being done, in words. `rate`: posts a second of the busiest listing.
        """
        failures = 0
        while True:
            self.await_budget(1 + math.ceil(self.spare * self.reddit.budget.known.total))
            self.reddit.doing = what, None
            try:
                answer = ask()
            except (Failed, Refused) as exc:
                if isinstance(exc, Refused) and not self.answered:
                    raise
                log.debug("%s: %s", what, exc)
                if isinstance(exc, AskAgain):
                    continue
                failures += 1
                if self.once and self.clock.monotonic() >= self.gives_up_at:
                    self.exhausted = str(exc)
                if failures == tries or self.exhausted:
                    raise Unanswered(str(exc)) from exc
                self.sleep(backoff(failures, rate, self.chance()), f"{what} again")
            else:
                self.answered, self.outage_told = True, False
                return answer

    def be_patient(self) -> None:
        """Begin the patience anew: all is going well."""
        self.gives_up_at = self.clock.monotonic() + PATIENCE

    def await_budget(self, requests: int) -> None:
        """Wait until so many requests may follow at once."""
        while (seconds := self.reddit.budget.wait(requests, self.clock.monotonic())) > 0:
            if self.once and self.waited + seconds > self.budget_patience:
                self.exhausted = f"Reddit allows no request for {seconds:.0f} s more"
                if self.reddit.budget.refusals and not self.answered:
                    self.exhausted += "; it answered nothing but 429 (too many requests)"
                raise Unanswered(self.exhausted)
            log.debug("waiting %.0f s for Reddit's budget", math.ceil(seconds))
            self.waited += seconds
            self.gives_up_at += seconds
            self.sleep(seconds, "Reddit's budget")

    def sleep(self, seconds: float, what: str) -> None:
        """Wait for something; with `once` not beyond the end of the patience."""
        now = self.clock.monotonic()
        seconds = min(seconds, self.gives_up_at - now) if self.once else seconds
        self.reddit.doing = what, now + seconds
        self.clock.sleep(max(seconds, 0.001))  # less than that may not move the clock


class Listing:
    """One followed name, and what its last walks tell; times are the monotonic clock's.

    `begun_at`: when its last walk began. `ready_at`: when the next one may. `pages`: the
    requests that the last one to its cursor took. `asked`: those of the present one.
    """

    def __init__(self, name: str, cursor: Cursor | None, rate: float, clock: Clock) -> None:
        polled_utc = cursor.polled_utc if cursor else math.inf
        self.name = name
        self.rate = rate if cursor else 1.0  # posts a second; a new name may be that busy
        self.begun_at = self.ready_at = clock.monotonic() - max(0.0, clock.time() - polled_utc)
        self.pages, self.asked = 1, 0
        self.lags: deque[float] = deque(maxlen=10_000)
        self.is_new = cursor is None
        self.empty = cursor is None or cursor.since_utc == cursor.newest_utc  # never had a post
        self.answered = False
        self.failures = 0  # walks in a row
        self.told = False  # that it fails


class Follower:
    """Walks the listings of some names, one after the other, and names the gaps."""

    def __init__(self, asker: Asker, names: Names, database: Database, interval: float) -> None:
        self.asker = asker
        self.database = database
        self.interval = interval
        self.followed = len(names)
        # How loud a name's troubles are told: a single run says it all in its last line.
        self.level = logging.INFO if asker.once else logging.WARNING
        rates = database.rates()
        self.listings = [
            Listing(one, database.cursor(one), rates.get(one, 1 / 3600), asker.clock)
            for one in names
        ]
        self.paid_until = -math.inf  # the last walk uses up the budget's share until then
        self.lost: list[str] = []  # what is wrong with names that cannot be read
        self.gaps = Counter[str]()  # not told yet
        self.gaps_told_at = -math.inf

    def next(self) -> Listing | None:
        """Wait until a walk may begin; return the listing that needs it most, if one is left."""
        while self.listings and not self.asker.exhausted:
            now = self.asker.clock.monotonic()
            ready = [one for one in self.listings if self._due(one) <= now]
            if ready:
                return max(ready, key=lambda one: urgency(one.rate, now - one.begun_at))
            due = min(map(self._due, self.listings))
            what = "Reddit's budget" if due == self.paid_until else "next poll"
            self.asker.sleep(due - now, what)
        return None

    def _due(self, listing: Listing) -> float:
        """Return when a walk may begin: all but a first one wait until the last is paid for."""
        return listing.ready_at if listing.is_new else max(listing.ready_at, self.paid_until)

    def follow(self, listing: Listing) -> Iterator[Batch]:
        """Walk a listing back to its cursor, and yield what is new; or put it off."""
        cursor = self.database.cursor(listing.name)
        lag = expected_lag(listing.lags)
        try:
            self.asker.await_budget(listing.pages)
            utc = int(self.asker.clock.time())
            walk = self._walk(listing, cursor, lag, utc)
        except (Gone, Unanswered, Refused) as exc:
            alone = len(self.listings) == 1 or any(one.failures for one in self.listings)
            if isinstance(exc, Refused) and alone:  # nothing says that it is about this name only
                raise
            self._put_off(listing, exc)
            return
        self._well(listing)
        posts = oldest_first(self.database.unstored(walk.posts))
        if cursor:
            listing.lags.extend(lags_of(posts, cursor.newest_utc))
        gaps = gaps_of(walk, cursor, lag, utc)
        yield Batch(posts, [next_cursor(listing.name, cursor, walk, utc)], gaps)
        self.gaps.update(gap.subreddit for gap in gaps)
        self._tell_gaps(every=3600.0)

    def finish(self) -> None:
        """Raise what keeps a single run from being complete."""
        self._tell_gaps(every=0.0)
        if self.asker.exhausted:
            left = several([one.name for one in self.listings])
            raise Failed("; ".join([f"{left}: {self.asker.exhausted}", *self.lost]))
        if self.lost:
            raise Gone("; ".join(self.lost))

    def _walk(self, listing: Listing, cursor: Cursor | None, lag: int, utc: int) -> Walk:
        """Walk back to the cursor, or past it; without one, as deep as is free."""
        reddit = self.asker.reddit
        listing.begun_at, listing.asked = self.asker.clock.monotonic(), 0
        rate, ask = reddit.carries(), partial(self._page, listing)
        first = ask(None)
        listing.answered, listing.empty = True, not first.things
        listing.rate = max(listing.rate, listing_rate(first.posts))
        if cursor is None:
            walk = walk_back(first, ask, -math.inf, 1, self._is_free)
        else:
            target = cursor.newest_utc - look_back(lag, listing.rate)
            full = spares_full_walk(self._busiest(), rate) and full_walk_is_due(
                cursor, utc, listing.rate, rate / self.followed
            )
            walk = walk_back(first, ask, target, HORIZON // PAGE if full else 1, lambda: True)
            listing.pages = listing.pages if full else listing.asked
        log.debug("r/%s: %d posts on %d pages", listing.name, len(walk.posts), listing.asked)
        listing.rate = listing_rate(walk.posts)
        listing.ready_at = listing.begun_at + interval_of(listing.rate, self.interval)
        if not (listing.is_new or self.asker.once):
            self.paid_until = listing.begun_at + listing.asked / max(rate, reddit.carries())
        listing.is_new = False
        return walk

    def _page(self, listing: Listing, after: str | None) -> Page:
        """Ask for a page; for a newest page that is unexpectedly empty, three times more."""
        tries = 1 if (listing.failures or self.asker.once) and not after else TRIES
        ask = partial(self.asker.reddit.page, listing.name, after)
        for times in range(4):
            if times:
                self.asker.sleep(1.0, f"r/{listing.name}, which seems to be empty")
            listing.asked += 1
            what = f"reading r/{listing.name}, page {listing.asked}"
            page = self.asker.answer(what, ask, tries, self._busiest())
            if not (listing.failures and listing.answered):  # or it would never be given up
                self.asker.be_patient()
            if page.things or after or listing.empty:
                break
        return page

    def _busiest(self) -> float:
        """Return the posts a second of the busiest listing: no pause may overrun it."""
        return max(one.rate for one in self.listings)

    def _is_free(self) -> bool:
        """Return whether the budget has more than a page for each of the other listings."""
        return self.asker.reddit.budget.free(self.asker.clock.monotonic()) >= len(self.listings)

    def _well(self, listing: Listing) -> None:
        """Note that a listing could be read; a single run is done with it."""
        if listing.told:
            log.log(self.level, "r/%s can be read again", listing.name)
        listing.failures, listing.told = 0, False
        if self.asker.once:
            self.listings.remove(listing)

    def _put_off(self, listing: Listing, exc: RedpipeError) -> None:
        """Let the others go on, and ask again later; drop a name that never could be read."""
        gone = isinstance(exc, Gone)
        what = f"r/{listing.name}{'' if gone else ':'} {exc}"
        listing.failures += 1
        if gone and (self.asker.once or not listing.answered):
            self.listings.remove(listing)
            self.lost.append(what)
            if self.listings:
                log.log(self.level, "%s; continuing with the others", what)
            return
        if not listing.told and (gone or not self.asker.outage_told):
            log.log(self.level, "%s; will keep trying", what)
            listing.told = self.asker.outage_told = True
        pause = backoff(listing.failures, listing.rate, self.asker.chance())
        if listing.failures > TRIES and len(self.listings) > 1:  # a tenth of the budget at most
            pause = max(pause, min(60.0, 10 / self.asker.reddit.carries()))
        listing.ready_at = self.asker.clock.monotonic() + pause
        if self.asker.once:  # it comes after the others, and once more when the patience ends
            listing.rate = 0.0
            listing.ready_at = min(listing.ready_at, self.asker.gives_up_at)

    def _tell_gaps(self, every: float) -> None:
        """Warn of gaps at the first, and then once in so many seconds at most."""
        now = self.asker.clock.monotonic()
        if self.gaps and now - self.gaps_told_at >= every:
            what = "no longer listed, and not stored; see the table gaps"
            log.warning("%s: %d gap(s), %s", several(sorted(self.gaps)), self.gaps.total(), what)
            self.gaps.clear()
            self.gaps_told_at = now


def stream(asker: Asker, names: Names, database: Database, interval: float) -> Iterator[Batch]:
    """Yield the new posts of some subreddits, one Batch for each finished walk.

    `database` holds what is stored already, and each Batch must be there before the next is
    asked for. `interval`: the longest wait between two walks of a name, in seconds, if the
    budget allows. If the asker asks `once`, each name is walked once, and Gone is raised if
    one could not be read, Failed if one did not answer in PATIENCE seconds. Otherwise it
    never ends, and raises only what its first answers say.
    """
    follower = Follower(asker, names, database, interval)
    while listing := follower.next():
        yield from follower.follow(listing)
    follower.finish()


# --- Asking again -------------------------------------------------------------

# Whose wish it was that a post be gone: its author's, or the law's and Reddit's own. What a
# moderator or a filter removed is in neither. (The Arctic Shift schemas list all.)
DELETED = ("deleted", "author")
TAKEN_DOWN = ("content_takedown", "copyright_takedown", "anti_evil_ops", "community_ops")
HIDDEN = ("[removed]", "[deleted]")  # what Reddit shows in the place of a text


class ModestAsker(Asker):
    """Leaves half of every window to others, and waits for the next as long as one may be."""

    spare = 0.5
    budget_patience = MODEST_PATIENCE


def recheck(
    asker: Asker, database: Database, names: Names, fields: Sequence[Field], hours: float
) -> Iterator[Counter[str]]:
    """Ask again about stored posts, and keep faith: one answer, one transaction.

    They are those of some subreddits (none, or all: of every one) that were last asked about
    so many hours ago, oldest stored first. Yields how many are `due`, then, of each answer,
    how many were `asked` for, `refreshed` and `erased`. What fails is asked for again after
    the others, as long as the patience lasts. Raises Failed if it ends.
    """
    database.execute("PRAGMA secure_delete = ON")  # an erased row's place in the file is zeroed
    fields = [field for field in fields if field.column in database.columns]
    before = int(asker.clock.time() - hours * 3600)
    count = sum(1 for _ in database.due(before, names))
    yield Counter(due=count)
    for tries in (TRIES, math.inf) if count else ():
        complete, due = True, database.due(before, names)
        while ids := list(itertools.islice(due, PAGE)):
            try:
                yield ask_again(asker, database, ids, fields, tries)
            except Unanswered as exc:
                complete = False
                if asker.exhausted:
                    left = sum(1 for _ in database.due(before, names))
                    what = f"{left:,} post(s) could not be asked about, and are next time"
                    raise Failed(f"{what}: {exc}") from exc
        if complete:
            return


def ask_again(
    asker: Asker, database: Database, ids: Sequence[str], fields: Sequence[Field], tries: float
) -> Counter[str]:
    """Ask about posts, store what the answer says, and count; raise Unanswered.

    Those that Reddit leaves out are asked for twice: together with the others, so that an
    answer which knows nothing is recognised.
    """
    found: dict[str, Post] = {}
    for what in ("asking about stored posts", "asking about those that were left out"):
        if not found.keys() >= set(ids):
            found |= asker.answer(what, partial(asker.reddit.info, ids), tries, 0.0)
            asker.be_patient()
            asker.waited = 0.0
    changes = {one: change_of(found.get(one), fields) for one in ids}
    database.revise(changes)
    erased = sum(change is None for change in changes.values())
    log.debug("%d posts asked for, %d erased", len(ids), erased)
    refreshed = len(ids) - erased if fields else 0
    return Counter(asked=len(ids), refreshed=refreshed, erased=erased)


def change_of(post: Post | None, fields: Sequence[Field]) -> dict[str, Any] | None:
    """Return the columns of a stored post that change by what Reddit says of it now.

    None: it is to be erased. So is one of which Reddit knows nothing.
    """
    if post is None or post.get("removed_by_category") in DELETED + TAKEN_DOWN:
        return None
    changes: dict[str, Any] = {}
    for field in fields:
        holder, key = value_at(post, field.path[:-1]), field.path[-1]
        # What is left out or hidden is not today's value: the one that was known is kept.
        if isinstance(holder, dict) and key in holder and holder[key] not in HIDDEN:
            changes[field.column] = scalar(holder[key])
    if post.get("author") == "[deleted]":
        changes |= {"author": None, "author_name": None}
    return changes


# --- Files --------------------------------------------------------------------

FILE_BATCH = 500  # posts a transaction
LINES_TOLD = 10

# What a compressed file begins with; Pushshift's .zst have a window of 2 GiB.
MAGIC = {b"(\xb5/": "zstdcat --long=31", b"\x1f\x8b\b": "zcat", b"\xfd7z": "xzcat", b"BZh": "bzcat"}
_BOM = b"\xef\xbb\xbf"


class CountingFile(io.FileIO):
    """A file that tells, at any time, how many bytes were `taken` from it.

    `size` is that of a regular file, as it was opened, and otherwise 0.
    """

    size = taken = 0

    def readinto(self, buffer: Any) -> int:
        while (count := super().readinto(buffer)) is None:
            select.select([self], [], [])  # somebody made standard input non-blocking
        self.taken += count
        return count


def open_file(path: str) -> io.BufferedReader:
    """Open FILE for reading; `-` is standard input. Raises FileUnreadable."""
    try:
        raw = CountingFile(0 if path == "-" else path, closefd=path != "-")
        raw.size = os.fstat(raw.fileno()).st_size
    except OSError as exc:
        raise FileUnreadable(f"{path}: {exc.strerror}") from exc
    return io.BufferedReader(raw, 2**18)


def read_file(file: BinaryIO, names: Names = ()) -> Iterator[Batch]:
    """Yield the posts of a file that has one JSON value a line, in its order.

    `names` select subreddits; none, or all, selects every post, and when
    they select nothing, that is logged. The posts of a Batch are read from the file as
    they are asked for, all before the next Batch. Bad lines are logged, the first ten
    of them, and raise BadLines when all posts of the others have been given.
    """
    wanted = frozenset(name.encode() for name in names if "all" not in names)
    tally = Counter[str]()
    posts = file_posts(file, wanted, tally)
    first = None
    for first in posts:
        # Read only as they are stored: 500 parsed posts held at once cost 35 % of an
        # import's time, in the collector and in the processor's caches.
        yield Batch(itertools.chain([first], itertools.islice(posts, FILE_BATCH - 1)))
    if wanted and first is None:
        log.warning("nothing selected of %s posts read; check the names", f"{tally['others']:,}")
    if tally["bad"]:
        raise BadLines(f"skipped {tally['bad']} line(s) that are not posts; stored the rest")


def add_bad(tally: Counter[str], line_number: int, reason: str) -> None:
    """Count a line, and report it if it is one of the first."""
    tally["bad"] += 1
    if tally["bad"] <= LINES_TOLD:
        log.warning("line %d: %s", line_number, reason)


def file_posts(file: BinaryIO, wanted: frozenset[bytes], tally: Counter[str]) -> Iterator[Post]:
    """Yield the wanted posts of a file (none: all of them), and count the rest in `tally`.

    Its keys: `bad`, lines that are not posts, in whole or in part; `others`, posts of other
    subreddits, where a line that is passed over counts as one.
    """
    for line_number, line in enumerate(lines(file), 1):
        if wanted and is_elsewhere(line, wanted):
            tally["others"] += 1
            continue
        try:
            found = posts_of(parse_json(line)) if line and not line.isspace() else []
        except ValueError as exc:
            told = f"not JSON ({getattr(exc, 'msg', exc)})"
            add_bad(tally, line_number, told + (hint(line) if line_number == 1 else ""))
            continue
        posts = list(map(usable, found))
        if None in posts:
            add_bad(tally, line_number, "not a post, or one without a usable id")
        for post in filter(None, posts):
            if wanted and not is_selected(post, wanted):
                tally["others"] += 1
            else:
                yield unescaped(post)


def lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield a file's lines; of one beyond BODY_LIMIT only a little more than that."""
    size = BODY_LIMIT + 1 + len(_BOM)
    try:
        while line := file.readline(size):
            yield line.removeprefix(_BOM)
            while len(line) == size and not line.endswith(b"\n"):
                line = file.readline(size)
    except OSError as exc:
        raise FileUnreadable(f"FILE cannot be read: {exc.strerror}") from exc


_SUBREDDIT = re.compile(rb'"subreddit"\s*:\s*"([^"\\]*)"')
# Escapes of letters, digits, "_", "-" and ".", which could hide a key or a name. Not those of
# "&", "<" and ">": some programs escape each of them, in nearly every line.
_ESCAPED_NAME = re.compile(rb"\\u00(?:2[dDeE]|3\d|4[1-9a-fA-F]|5[0-9aAfF]|6[1-9a-fA-F]|7[0-9aA])")


def is_elsewhere(line: bytes, wanted: frozenset[bytes]) -> bool:
    """Return whether the bytes prove that each post of a line is of another subreddit.

    They do when they name subreddits, at any depth, none of them wanted, and no escape can
    hide another. Such a line need not be parsed, which takes ten times as long.
    """
    if len(line) > BODY_LIMIT:
        return False
    end = 0
    while (start := line.find(b'"subreddit"', end)) >= 0:
        named = _SUBREDDIT.match(line, start)
        if not named or named[1].lower() in wanted:
            return False
        end = named.end()
    return end > 0 and not _ESCAPED_NAME.search(line)


def is_selected(post: Post, wanted: frozenset[bytes]) -> bool:
    """Return whether a post's subreddit is wanted.

    As bytes, so that this and `is_elsewhere` agree: they lower ASCII letters only, where
    `str.lower` makes a k of a Kelvin sign.
    """
    name = post.get("subreddit")
    return isinstance(name, str) and name.encode("utf-8", "surrogatepass").lower() in wanted


def hint(line: bytes) -> str:
    """Return what to do about a first line that cannot be read, as the end of a message.

    Raises FileUnreadable when the file is compressed.
    """
    if command := MAGIC.get(line[:3]):
        raise FileUnreadable(f"FILE is compressed: {command} FILE | ... --from=-")
    command = {b"{": "jq -c .", b"[": "jq -c '.[]'"}.get(line.lstrip()[:1], "")
    return f"; if it is one value on many lines: {command} FILE | ... --from=-" if command else ""


def posts_of(value: Any) -> list[Any]:
    """Return the posts in a line's value, and None for each thing in it that is not one.

    A value is a post, a thing or a listing; an array of those, as a permalink's .json is;
    or {"data": [...]}, as the archives' interfaces answer.
    """
    if isinstance(value, dict) and isinstance(value.get("data"), list) and not is_post(value):
        value = value["data"]
    values = value if isinstance(value, list) else [value]
    return [post for each in values for post in thing_posts(each)]


def thing_posts(value: Any) -> list[Any]:
    if is_listing(value):
        return t3_data(value["data"]["children"])
    return [value] if is_post(value) else t3_data([value]) or [None]


_NOT_POSTS = ("body", "parent_id", "link_id")  # what comments and messages have


def is_post(value: Any) -> bool:
    """Return whether a bare object says that it is a post.

    An export that gives all kinds the same columns has those of others in posts, as null.
    """
    if not isinstance(value, dict) or any(value.get(key) is not None for key in _NOT_POSTS):
        return False
    name = value.get("name")
    if isinstance(name, str) and name:
        return name.startswith("t3_")
    return "title" in value and "author" in value


def unescaped(post: Post) -> Post:
    """Decode the three entities that Reddit escapes in titles, once.

    They are those of reddit_base.py, without raw_json.
    """
    title = post.get("title")
    if isinstance(title, str) and "&" in title:
        post["title"] = title.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    return post


# --- Transform ----------------------------------------------------------------

Row = dict[str, Any]

COLUMNS = ("id", "created_utc", "subreddit", "title", "author", "author_name", "permalink")
BUILT_IN = (*COLUMNS, "stored_utc", "checked_utc", "erased_utc")


def parse_fields(specs: Iterable[str]) -> list[Field]:
    """Read the --field options, each KEY or KEY:COLUMN.

    Raises BadUsage for what can be no column, or is one already.
    """
    fields: dict[str, Field] = {}
    for spec in specs:
        key, _, column = spec.partition(":")
        column, path = column or key.replace(".", "_"), tuple(key.split("."))
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", column) or not all(path):
            raise BadUsage(f"--field={spec}: no usable column name; give one as KEY:COLUMN")
        if column.lower() in (*BUILT_IN, *fields):
            raise BadUsage(f"--field={spec}: the column {column} is taken; choose another")
        fields[column.lower()] = Field(path, column)
    return list(fields.values())


_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


def text(value: Any) -> str | None:
    """Return a string that SQLite can hold; NULs and lone surrogates become U+FFFD."""
    if not isinstance(value, str):
        return None
    return value if value.isascii() and "\0" not in value else _UNSTORABLE.sub("\ufffd", value)


def scalar(value: Any) -> Any:
    """Return any JSON value as SQLite can hold it; objects and lists as JSON text."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return value
    with suppress(RecursionError, ValueError):
        value = _decode(json.dumps(value))  # 1e999 is infinite, which is not JSON: it is None
        plain = value is None or isinstance(value, float)
        return value if plain else text(json.dumps(value, ensure_ascii=False))
    return None


def value_at(post: Post, path: Sequence[str]) -> Any:
    value: Any = post
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def transform(post: Post, fields: Sequence[Field] = ()) -> Row:
    """Trim and rename a post to the columns of `posts`, and those of `fields`.

    Whatever is missing, null or of the wrong type is None; only `id` must be right.
    """
    name, permalink = text(post.get("author")), text(post.get("permalink"))
    return {
        "id": post["id"],
        "created_utc": created(post),
        "subreddit": text(post.get("subreddit")),
        "title": text(post.get("title")),
        "author": text(post.get("author_fullname")),
        "author_name": None if name == "[deleted]" else name,
        "permalink": permalink and permalink.partition("?")[0],
        **{field.column: scalar(value_at(post, field.path)) for field in fields},
    }


# --- Load ---------------------------------------------------------------------

APPLICATION_ID = 0x72647069  # "rdpi", so that `file` and we know our databases
USER_VERSION = 2

SCHEMA = f"""CREATE TABLE IF NOT EXISTS posts (
    id TEXT PRIMARY KEY NOT NULL, created_utc INTEGER, subreddit TEXT, title TEXT, author TEXT,
    author_name TEXT, permalink TEXT, stored_utc INTEGER, checked_utc INTEGER, erased_utc INTEGER);
CREATE INDEX IF NOT EXISTS posts_created_utc ON posts (created_utc);
CREATE TABLE IF NOT EXISTS cursors (
    subreddit TEXT PRIMARY KEY NOT NULL, since_utc INTEGER, newest_utc INTEGER, polled_utc INTEGER);
CREATE TABLE IF NOT EXISTS gaps (
    subreddit TEXT, after_utc INTEGER, before_utc INTEGER, noticed_utc INTEGER);
DROP VIEW IF EXISTS recent_posts;
CREATE VIEW recent_posts AS
    SELECT strftime('%Y-%m-%dT%H:%M:%SZ', created_utc, 'unixepoch') AS created, subreddit,
        title, author_name, 'https://www.reddit.com' || permalink AS link
    FROM posts WHERE erased_utc IS NULL ORDER BY created_utc DESC;
CREATE VIEW IF NOT EXISTS posts_per_hour AS
    SELECT strftime('%Y-%m-%dT%H:00:00Z', created_utc, 'unixepoch') AS hour, count(*) AS posts
    FROM posts GROUP BY 1 ORDER BY 1 DESC;
CREATE VIEW IF NOT EXISTS coverage AS SELECT subreddit,
    strftime('%Y-%m-%dT%H:%M:%SZ', since_utc, 'unixepoch') AS since,
    strftime('%Y-%m-%dT%H:%M:%SZ', newest_utc, 'unixepoch') AS until,
    strftime('%Y-%m-%dT%H:%M:%SZ', polled_utc, 'unixepoch') AS last_poll,
    (SELECT count(*) FROM gaps WHERE gaps.subreddit = cursors.subreddit) AS gaps FROM cursors;
PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {USER_VERSION}"""

# Of two first runs at once, the one that began later says where coverage begins.
MOVE_CURSOR = """INSERT INTO cursors VALUES (?, ?, ?, ?) ON CONFLICT (subreddit) DO UPDATE SET
    since_utc = max(since_utc, excluded.since_utc),
    newest_utc = max(newest_utc, excluded.newest_utc), polled_utc = excluded.polled_utc"""

NAME_GAP = """INSERT INTO gaps SELECT ?1, newest_utc - ?2 AS after, ?3, ?4 FROM cursors
WHERE subreddit = ?1 AND after < ?3 AND NOT EXISTS (
    SELECT 1 FROM gaps WHERE subreddit = ?1 AND after_utc <= after AND before_utc >= ?3)"""

# Of a post: Reddit has shown it without its author, whose account is deleted.
NAMELESS = "posts.checked_utc IS NOT NULL AND posts.author_name IS NULL"
LASTING = ("id", "created_utc", "subreddit", "stored_utc", "checked_utc", "erased_utc")
PART = 10_000  # rows read at once: in between, signals are heard


def check_header(path: str, *, exists: bool = False) -> None:
    """Raise NotOurs if PATH is no database of ours; without `exists` it may be missing or empty.

    https://www.sqlite.org/fileformat.html#the_database_header
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise NotOurs(f"{path}: not a regular file")
    header = b""
    try:
        with suppress(FileNotFoundError), open(path, "rb") as file:
            header = file.read(2**16)  # the schema, too, if it fits into the first page
    except OSError as exc:
        raise NotOurs(f"{path}: {exc.strerror}") from exc
    if header and not header.startswith(b"SQLite format 3\0"):
        raise NotOurs(f"{path}: not a SQLite database; give another path")
    owner, version = (int.from_bytes(header[at : at + 4], "big") for at in (68, 60))
    if header and owner != APPLICATION_ID:
        told = "belongs to another program; give another path"
        if not owner and b"CREATE TABLE cursors (" in header:
            told = f"a restored .dump? run sqlite3 FILE 'PRAGMA application_id = {APPLICATION_ID}'"
        raise NotOurs(f"{path}: {told}")
    if version > USER_VERSION:
        raise NotOurs(f"{path}: was written by a newer redpipe; upgrade this one")
    if exists and not header:
        raise NotOurs(f"{path}: there is no database")


Hold = Callable[[], AbstractContextManager[Any]]  # makes what holds signals back


class Database(AbstractContextManager["Database"]):
    """An open database of ours; `columns` are those that `load` fills.

    Every sqlite3 error is raised as StorageFailed that names the file. `hold` is
    entered once a transaction has its lock, and left when it is committed.
    """

    def __init__(
        self, path: str, fields: Sequence[Field] = (), clock: Clock = time, hold: Hold = nullcontext
    ) -> None:
        self.path = path
        self.clock = clock
        self.hold = hold
        check_header(self.path)
        self._made_here = not os.path.lexists(self.path)
        try:
            # One second of waiting inside SQLite at most: it hears no signals there.
            self._connection = sqlite3.connect(self.path, timeout=1.0, isolation_level=None)
            self._file = os.stat(self.path)
        except (sqlite3.Error, OSError) as exc:
            raise NotOurs(f"{self.path}: {exc}; check the folder and its permissions") from exc
        try:
            self.columns = self._prepare([*COLUMNS, *(field.column for field in fields)])
        except BaseException:
            self._connection.close()
            raise

    def __exit__(self, kind: object = None, *error: object) -> None:
        with self.hold(), closing(self._connection):
            if kind is Gone and self._made_here:
                self._withdraw()

    def _withdraw(self) -> None:
        """Remove the file if it holds nothing, and nobody else has it open."""
        with suppress(sqlite3.Error, OSError, StorageFailed):
            self.check()
            # The first of them fails beside others.
            self._connection.executescript("PRAGMA journal_mode = DELETE; BEGIN EXCLUSIVE")
            if not self.execute("SELECT 1 FROM posts UNION ALL SELECT 1 FROM cursors LIMIT 1"):
                os.unlink(self.path)

    def _prepare(self, wanted: Sequence[str]) -> Sequence[str]:
        """Make the schema, or what an older one lacks, and missing columns; return ours.

        A generated column is its maker's: it is left alone.
        """
        with self.transaction():
            ((version,),) = self.execute("PRAGMA user_version")
            if version < USER_VERSION:
                for statement in SCHEMA.split(";"):
                    self.execute(statement)
            table = self.execute("PRAGMA table_xinfo(posts)")
            present = {name.lower(): generated for _, name, *_, generated in table}
            for column in (*BUILT_IN, *wanted):
                if column.lower() not in present:
                    kind = "INTEGER" if column in BUILT_IN else ""
                    self.execute(f'ALTER TABLE posts ADD COLUMN "{column}" {kind}')
        # After the schema: so the file's own header tells whose it is, at any instant.
        # An older redpipe reads it, too, and is to refuse what was version 1: the checkpoint.
        for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "wal_checkpoint"):
            self.execute(f"PRAGMA {pragma}")
        return [column for column in wanted if not present.get(column.lower())]

    def check(self) -> None:
        """Raise StorageFailed when the file has been deleted or replaced under us."""
        with suppress(OSError):
            if os.path.samestat(os.stat(self.path), self._file):
                return
        raise StorageFailed(f"{self.path}: deleted or replaced while in use; start again")

    def execute(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run one statement and return its rows."""
        return self._patiently(lambda: self._connection.execute(sql, values).fetchall())

    def execute_many(self, sql: str, rows: Sequence[Any]) -> int:
        """Run a statement for each row, inside a transaction; return how many changed."""
        return self._patiently(lambda: self._connection.executemany(sql, rows).rowcount)

    def _patiently(self, work: Callable[[], T]) -> T:
        """Wait for locks up to LOCK_PATIENCE."""
        ends = self.clock.monotonic() + LOCK_PATIENCE
        while True:
            try:
                return work()
            except sqlite3.Error as exc:
                if "is locked" not in str(exc) or self.clock.monotonic() >= ends:
                    raise StorageFailed(f"{self.path}: {exc}") from exc
            self.clock.sleep(0.05)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Hold the write lock; commit at the end, roll back after an exception."""
        self.check()
        self.execute("BEGIN IMMEDIATE")
        with self.hold(), self._connection:
            yield
            self.execute("COMMIT")

    def cursor(self, name: str) -> Cursor | None:
        """Return a subreddit's cursor, or None when it has none."""
        self.check()
        found = self.execute("SELECT * FROM cursors WHERE subreddit = ?", (name,))
        return Cursor(*found[0]) if found else None

    def due(self, before_utc: int, names: Names) -> Iterator[str]:
        """Yield the ids of posts last asked about, or stored, until then, oldest stored first.

        `names` select subreddits; none, or all, selects every post. A part at a
        time, so that signals are heard, and little is held.
        """
        chosen = [] if "all" in names else names
        where = f" AND lower(subreddit) IN ({', '.join('?' * len(chosen))})" if chosen else ""
        ((last,),) = self.execute("SELECT max(_rowid_) FROM posts")
        for start in range(0, (last or 0) + 1, PART):
            sql = (
                "SELECT id FROM posts WHERE _rowid_ BETWEEN ? AND ? AND erased_utc IS NULL"
                f" AND coalesce(checked_utc, stored_utc, 0) <= ?{where} ORDER BY _rowid_"
            )
            for (one,) in self.execute(sql, (start, start + PART - 1, before_utc, *chosen)):
                yield one

    def revise(self, changes: Mapping[str, Mapping[str, Any] | None]) -> None:
        """Change columns of stored posts, by id, in one transaction; None erases one.

        What is erased stays so. Which columns there are is read anew: others may add some.
        """
        now = int(self.clock.time())
        with self.transaction():
            columns = self.execute("PRAGMA table_xinfo(posts)")
            content = [row[1] for row in columns if not (row[3] or row[6] or row[1] in LASTING)]
            for one, change in changes.items():
                erased = dict.fromkeys(content) | {"erased_utc": now}
                values = (erased if change is None else dict(change)) | {"checked_utc": now}
                assigned = ", ".join(f'"{column}" = ?' for column in values)
                sql = f"UPDATE posts SET {assigned} WHERE id = ? AND erased_utc IS NULL"
                self.execute(sql, (*values.values(), one))

    def rates(self) -> dict[str, float]:
        """Return the posts a second stored in the last hour polled, by subreddit and of all."""
        rows = self.execute(
            "SELECT lower(subreddit), count(*) / 3600.0 FROM posts, (SELECT max(newest_utc) AS end"
            " FROM cursors) WHERE created_utc BETWEEN end - 3600 AND end GROUP BY 1"
        )
        return {**dict(rows), "all": sum(rate for _, rate in rows)}

    def unstored(self, posts: Sequence[Post]) -> list[Post]:
        """Return the posts that are not stored, or stored without the author they have."""
        sql = f"SELECT 1 FROM posts WHERE id = ? AND (author IS ifnull(author, ?) OR {NAMELESS})"
        values = [(post["id"], text(post.get("author_fullname"))) for post in posts]
        return [post for post, of in zip(posts, values, strict=True) if not self.execute(sql, of)]


def insert_statement(columns: Sequence[str], now: int) -> str:
    """Return the statement that stores a row, or fills what is NULL in one stored."""
    names = ", ".join(f'"{c}"' for c in columns)
    new = {c: f'excluded."{c}"' for c in columns}
    new |= {c: f"iif({NAMELESS}, NULL, excluded.{c})" for c in ("author", "author_name")}
    filled = ", ".join(f'coalesce(posts."{c}", {value})' for c, value in new.items())
    return (
        f"INSERT INTO posts ({names}, stored_utc) VALUES (:{', :'.join(columns)}, {now})"
        f" ON CONFLICT (id) DO UPDATE SET ({names}) = ({filled})"
        f" WHERE erased_utc IS NULL AND ({filled}) IS NOT ({names})"
    )


def load(
    database: Database, rows: list[Row], cursors: Sequence[Cursor] = (), gaps: Sequence[Gap] = ()
) -> int:
    """Store rows, cursors and gaps in one transaction; return the posts stored or filled.

    The rows are those that `transform` makes with the database's fields. A post that
    is stored already gains what was NULL, and loses nothing. Raises StorageFailed.
    """
    insert = insert_statement(database.columns, int(database.clock.time()))
    with database.transaction():
        stored = max(0, database.execute_many(insert, rows))
        database.execute_many(NAME_GAP, gaps)  # before the cursor moves: it looks at it
        database.execute_many(MOVE_CURSOR, cursors)
    log.debug("%d posts stored, %d gaps named", stored, len(gaps))
    return stored


COUNT_PART = """SELECT ifnull(lower(subreddit), ''), max(ifnull(created_utc, 0) / 86400, ?),
    count(*), {} FROM posts WHERE _rowid_ BETWEEN ? AND ? GROUP BY 1, 2"""


class Survey:
    """What a database holds; `posts`: how many of a subreddit were created on a day.

    Names are lower case, `all` counts every post; a day is `created_utc // 86400`, and all
    before the first that was asked for count as one. `erased`: how many of the posts are.
    `checked_utc`: when one was last asked about, or 0.
    """

    def __init__(self, connection: sqlite3.Connection, first_day: int) -> None:
        self.cursors = [Cursor(*row) for row in connection.execute("SELECT * FROM cursors")]
        self.gaps = list(connection.execute("SELECT subreddit, after_utc, before_utc FROM gaps"))
        self.posts: dict[str, Counter[int]] = defaultdict(Counter)
        self.erased = self.checked_utc = 0
        ((version,),) = connection.execute("PRAGMA user_version")
        sql = COUNT_PART.format("count(erased_utc), max(checked_utc)" if version > 1 else "0, 0")
        ((last,),) = connection.execute("SELECT ifnull(max(_rowid_), 0) FROM posts")
        # A part at a time: to group all at once takes longer and hears no signals.
        for start in range(0, last + 1, PART):
            part = connection.execute(sql, (first_day - 1, start, start + PART - 1))
            for name, day, count, erased, checked_utc in part:
                self.posts[name][day] += count
                self.posts["all"][day] += count
                self.erased += erased
                self.checked_utc = max(self.checked_utc, checked_utc or 0)


def survey(path: str, first_day: int) -> Survey:
    """Read what a database holds while others write; changes nothing. Raises NotOurs."""
    check_header(path, exists=True)
    # Where a WAL cannot be made beside it: https://www.sqlite.org/wal.html#read_only_databases
    sealed = not (os.access(os.path.dirname(path) or ".", os.W_OK) or os.path.exists(f"{path}-wal"))
    uri = f"file:{quote(os.fsencode(path))}?" + ("immutable=1" if sealed else "mode=rw")
    try:
        with closing(sqlite3.connect(uri, timeout=1.0, uri=True)) as connection:
            return Survey(connection, first_day)
    except sqlite3.Error as exc:
        raise NotOurs(f"{path}: {exc}") from exc
