"""Secrets: told to nobody but Reddit, whatever goes wrong.

The client secret, the token it is exchanged for, and the feed token.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import re
import select
import socket
import socketserver
import ssl
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import trustme

import pipeline
from artefact import ListingServer, serve_listing, wait_for
from conftest import Done
from fake_reddit import (
    REFUSE,
    RESET,
    TRUNCATE,
    FakeReddit,
    Fault,
    Reply,
    block_page,
    error_reply,
    json_reply,
    login_page,
    make_post,
    reply,
    wrong_gzip,
)
from virtual import VirtualClock

pytestmark = pytest.mark.timeout(60)

SECRET = "s3cret+of/the&app%"
FEED_TOKEN = "feed+t0ken/of&one%"
BEARER = "b3arer-of-one-hour"
APP = {"REDDIT_CLIENT_ID": "app-id", "REDDIT_CLIENT_SECRET": SECRET}
FEED = {"REDDIT_FEED_TOKEN": FEED_TOKEN, "REDDIT_USERNAME": "some_body"}
ALL = {**APP, **FEED}
PROXY_PASSWORD = "pr0xy-password"


def disguises(secret: str) -> set[bytes]:
    """Give the forms in which a secret travels."""
    forms = {
        secret,
        urllib.parse.quote(secret),
        urllib.parse.quote(secret, safe=""),
        urllib.parse.quote_plus(secret),
        json.dumps(secret)[1:-1],
        secret.encode().hex(),
        base64.b64encode(secret.encode()).decode().rstrip("="),
        base64.b64encode(f"app-id:{secret}".encode()).decode().rstrip("="),
    }
    return {form.encode() for form in forms}


DISGUISES = set().union(*map(disguises, (SECRET, FEED_TOKEN, BEARER, PROXY_PASSWORD)))


def secrets_in(text: str | bytes) -> list[bytes]:
    content = text.encode() if isinstance(text, str) else text
    return sorted(form for form in DISGUISES if form in content)


def leaks(done: Done, directory: Path) -> list[object]:
    """Search what a run said, and every file it left, for secrets."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    found: list[object] = [*secrets_in(done.out), *secrets_in(done.err)]
    return found + [path for path in files if secrets_in(path.read_bytes())]


@pytest.fixture
def fake_reddit(fake_reddit: FakeReddit) -> FakeReddit:
    """Know the app and the feed token, and give out the bearer token."""
    fake_reddit.clients = {"app-id": SECRET}
    fake_reddit.feed_tokens = {FEED_TOKEN: "some_body"}
    fake_reddit.budgets = {}
    fake_reddit.add(make_post(1))
    return fake_reddit


def grant() -> Reply:
    """Give the bearer token that is searched for."""
    return json_reply(200, {"access_token": BEARER, "token_type": "bearer", "expires_in": 86_400})


def test_the_search_itself_finds_what_it_should(redpipe, tmp_path):
    (tmp_path / "file").write_bytes(b"\0" + FEED_TOKEN.encode() + b"\0")
    header = base64.b64encode(f"app-id:{SECRET}".encode()).decode()
    done = Done(0, urllib.parse.urlencode({"feed": FEED_TOKEN}), header)
    assert len(leaks(done, tmp_path)) >= 3


def test_secrets_reach_reddit_and_nothing_else(redpipe, fake_reddit, tmp_path):
    fake_reddit.script(grant(), on="access_token")
    fake_reddit.script(json_reply(200, json.loads(listing_of_one())))
    done = redpipe("-v", "--once", "posts.db", "python", **ALL)
    assert done.status == 0
    assert leaks(done, tmp_path) == []
    token, page = fake_reddit.log[:2]
    basic = base64.b64encode(f"app-id:{SECRET}".encode()).decode()
    assert token.headers["authorization"] == f"Basic {basic}"
    assert page.headers["authorization"] == f"bearer {BEARER}"


def listing_of_one() -> bytes:
    thing = {"kind": "t3", "data": make_post(1)}
    return json.dumps({"kind": "Listing", "data": {"children": [thing], "after": None}}).encode()


def test_the_feed_token_goes_into_the_query_of_the_feed_alone(redpipe, fake_reddit, tmp_path):
    fake_reddit.anonymous_json_blocked = True
    done = redpipe("-v", "--once", "posts.db", "python", **FEED)
    assert done.status == 0
    assert leaks(done, tmp_path) == []
    json_request, feed_request = fake_reddit.log[:2]
    assert "feed" not in json_request.query
    assert feed_request.query["feed"] == FEED_TOKEN
    assert feed_request.query["user"] == "some_body"


# Every failure, over real HTTP, on a clock that does not wait

FAILURES: dict[str, Fault | Reply] = {
    "refused": REFUSE,
    "reset": RESET,
    "truncated": TRUNCATE,
    "wrong gzip": wrong_gzip(),
    "nothing": reply(200),
    "login page": login_page(),
    "no listing": json_reply(200, {"kind": "t5", "data": {}}),
    "300": reply(300),
    "302 elsewhere": reply(302, "", {"location": "https://reddit.invalid/login?dest=x"}),
    "302 nowhere": reply(302, "", {"location": "http://["}),
    "302 to the search": reply(302, "", {"location": "/subreddits/search?q=python"}),
    "400": error_reply(400, "Bad Request"),
    "401": error_reply(401, "Unauthorized"),
    "403 blocked": block_page(),
    "403 private": error_reply(403, "Forbidden", reason="private"),
    "404": error_reply(404, "Not Found"),
    "408": reply(408),
    "414": reply(414),
    "429": error_reply(429, "Too Many Requests"),
    "429 in an hour": reply(429, "", {"retry-after": "3600"}),
    "500": reply(500),
    "503": error_reply(503, "Service Unavailable"),
    "token refused": json_reply(200, {"error": "invalid_grant"}),
    "no token": json_reply(200, {"token_type": "bearer"}),
    "a token that cannot be sent": json_reply(200, {"access_token": "a\r\nb", "expires_in": 1}),
}


class Kept(logging.Handler):
    """Keep every record of every logger, as text."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """Give what is logged for users meanwhile."""
    kept, logger = Kept(), logging.getLogger("redpipe")
    level = logger.level
    logger.setLevel(logging.DEBUG)
    logger.addHandler(kept)
    yield kept.messages
    logger.removeHandler(kept)
    logger.setLevel(level)


def follow_some_polls(access: pipeline.Access, path: Path) -> str:
    """Poll four times on a clock that does not wait, and give the error that ended it."""
    clock = VirtualClock()
    reddit = pipeline.Reddit(access, pipeline.http_fetch(), clock)
    with pipeline.Database(str(path), clock=clock) as memory:
        try:
            for n, batch in enumerate(pipeline.stream(reddit, ["python"], memory)):
                pipeline.load(memory, map(pipeline.transform, batch.posts), batch.cursors)
                if n == 3:
                    return ""
        except pipeline.RedpipeError as exc:
            return f"{exc!r} {exc}"
    return ""


@pytest.mark.parametrize("first", [True, False], ids=["at first", "later"])
@pytest.mark.parametrize("source", ["oauth", "feed"])
@pytest.mark.parametrize("failure", FAILURES)
def test_no_failure_tells_a_secret(fake_reddit, database, logged, failure, source, first):
    answer = FAILURES[failure]
    fake_reddit.anonymous_json_blocked = True
    fake_reddit.token_lifetime = 61  # so that tokens are asked for now and then
    good = [] if first else [None]
    fake_reddit.script(*good, answer, answer, on="access_token")
    fake_reddit.script(*good, answer, answer, on=".rss" if source == "feed" else "/new")
    id_and_secret = ("app-id", SECRET) if source == "oauth" else ("", "")
    access = pipeline.Access(fake_reddit.url, *id_and_secret, "some_body", FEED_TOKEN)
    error = follow_some_polls(access, database)
    assert secrets_in(error) == []
    assert [message for message in logged if secrets_in(message)] == []
    assert secrets_in(database.read_bytes()) == []
    assert any(seen.status != 200 for seen in fake_reddit.log) or answer[0] == 200


# What comes back to us: a proxy or a debugging server may show what it was sent

BASIC = base64.b64encode(f"app-id:{SECRET}".encode()).decode()


def echoes(echo: str) -> list[Reply]:
    """Give answers that show what was sent."""
    return [
        json_reply(403, {"message": echo, "reason": echo}),
        json_reply(400, {"error": echo}),
        json_reply(200, {"error": echo}),
        reply(502, echo, {"content-type": echo}),
        reply(302, echo, {"location": f"https://reddit.invalid/?{echo}"}),
        reply(302, echo, {"location": f"https://reddit.invalid/{echo}"}),
        reply(302, echo, {"location": f"https://reddit.invalid/{echo.rpartition(' ')[2]}"}),
        json_reply(400, {"error": "invalid_grant", "error_description": f"No app: {echo}"}),
        json_reply(400, {"error": "invalid_grant", "error_description": echo}),
        reply(200, echo, {"content-type": f"text/{echo.rpartition(' ')[2]}"}),
    ]


WHAT_IS_SENT = {
    "access_token": [SECRET, f"Basic {BASIC}", f"{'x' * 60} {SECRET}"],
    "/new": [f"bearer {BEARER}", f"{'x' * 70} {BEARER}"],
    ".rss": [FEED_TOKEN, f"?feed={urllib.parse.quote_plus(FEED_TOKEN)}&user=some_body"],
}


@pytest.mark.parametrize("on", WHAT_IS_SENT)
@pytest.mark.parametrize("answer", range(10))
def test_secrets_that_are_sent_back_are_not_repeated(fake_reddit, logged, database, on, answer):
    for echo in WHAT_IS_SENT[on]:
        fake_reddit.anonymous_json_blocked = True
        if on == "/new":
            fake_reddit.script(grant(), on="access_token")
        fake_reddit.script(*[echoes(echo)[answer]] * 3, on=on)
        id_and_secret = ("", "") if on == ".rss" else ("app-id", SECRET)
        access = pipeline.Access(fake_reddit.url, *id_and_secret, "some_body", FEED_TOKEN)
        error = follow_some_polls(access, database)
        said = "\n".join([*logged, error])
        assert error or "page 1: " in said
        assert secrets_in(said) == []
        database.unlink()


@pytest.mark.parametrize("before", range(40, 200, 6))
def test_no_part_of_a_secret_stays_where_a_message_is_cut(fake_reddit, before):
    fake_reddit.script(json_reply(200, {"error": "x" * before + SECRET}), on="access_token")
    access = pipeline.Access(fake_reddit.url, "app-id", SECRET)
    with pytest.raises(pipeline.Refused) as refused:
        pipeline.Reddit(access, pipeline.http_fetch()).page("python")
    assert SECRET[:4] not in str(refused.value)


@pytest.mark.parametrize("source", [pipeline.OAUTH, pipeline.FEED])
@pytest.mark.parametrize("trouble", ["nobody listens", "no such host", "no TLS", "414"])
def test_no_trouble_with_the_connection_tells_a_secret(fake_reddit, logged, trouble, source):
    url = fake_reddit.url
    if trouble == "nobody listens":
        fake_reddit.stop()
    elif trouble == "no such host":
        url = "https://reddit.invalid"
    elif trouble == "no TLS":
        url = url.replace("http:", "https:")
    else:
        url += "/" + "x" * 100_000  # longer than a server takes
    id_and_secret = ("app-id", SECRET) if source == pipeline.OAUTH else ("", "")
    access = pipeline.Access(url, *id_and_secret, "some_body", FEED_TOKEN)
    reddit = pipeline.Reddit(access, pipeline.http_fetch())
    reddit.source = source
    with pytest.raises(pipeline.RedpipeError) as error:
        reddit.page("python")
    assert secrets_in("\n".join([*logged, str(error.value), repr(error.value)])) == []


def test_headers_that_are_none_tell_no_secret(redpipe, tmp_path):
    """urllib3 has a warning for such an answer, which holds the whole address."""
    body = listing_of_one()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            blocked = b".json" in self.rfile.readline()
            status = b"403 Blocked" if blocked else b"200 OK"
            while self.rfile.readline().strip():
                pass
            self.wfile.write(b"HTTP/1.0 " + status + b"\r\nno header\r\n: nor this\r\n\r\n" + body)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        process = redpipe.start("-v", "posts.db", "python", REDPIPE_URL=url, **FEED)
        try:
            lines = [process.stderr.readline() for _ in range(4)]
        finally:
            server.shutdown()
            thread.join(10)
    done = redpipe.stop(process)
    assert any("/r/python/new" in line for line in lines)
    assert leaks(done._replace(err="".join(lines) + done.err), tmp_path) == []


# To nobody else


@pytest.mark.parametrize(
    ("on", "status"),
    [
        ("access_token", 302),
        ("access_token", 307),
        ("/new", 301),
        ("/new", 308),
        (".json", 302),
        (".rss", 302),
    ],
)
def test_a_redirect_to_another_host_is_never_followed(redpipe, fake_reddit, tmp_path, on, status):
    with FakeReddit() as other:
        other.add(make_post(2))
        fake_reddit.anonymous_json_blocked = on == ".rss"
        elsewhere = reply(status, "", {"location": f"{other.url}/r/python/new?feed=x"})
        fake_reddit.script(elsewhere, on=on)
        environment = FEED if on.startswith(".") else ALL
        process = redpipe.start("--interval=1", "posts.db", "python", **environment)
        # Anonymous JSON that leads elsewhere is not asked for again: the feed is.
        wait_for(lambda: len(fake_reddit.log) >= 3 and fake_reddit.requests(on))
        done = redpipe.stop(process)
        assert other.log == []
    assert leaks(done, tmp_path) == []


@pytest.mark.parametrize("where", ["HOME", "NETRC"])
def test_netrc_is_ignored(redpipe, fake_reddit, tmp_path, where):
    netrc = tmp_path / ".netrc"
    netrc.write_text("default login somebody password else\n")
    netrc.chmod(0o600)
    environment = {where: str(netrc if where == "NETRC" else tmp_path)}
    assert redpipe("--once", "posts.db", "python", **environment).status == 0
    assert redpipe("--once", "posts.db", "python", **environment, **APP).status == 0
    schemes = {seen.headers.get("authorization", "none").split()[0] for seen in fake_reddit.log}
    assert schemes == {"none", "Basic", "bearer"}
    shown = [seen.headers.get("authorization") for seen in fake_reddit.log]
    assert f"Basic {base64.b64encode(b'somebody:else').decode()}" not in shown


@pytest.mark.parametrize(
    ("url", "environment"),
    [
        ("http://192.0.2.1", APP),
        ("http://192.0.2.1", {"REDDIT_CLIENT_ID": "app-id"}),
        ("http://192.0.2.1", FEED),
        ("HTTP://192.0.2.1", APP),
        ("Http://192.0.2.1", FEED),
        ("http://reddit.invalid", APP),
        ("http://localhost.invalid", APP),
        ("http://127.0.0.1.invalid", APP),
        ("http://0.0.0.0", APP),
        ("http://[2001:db8::1]:8080", APP),
    ],
)
def test_credentials_never_go_over_plain_http_to_another_machine(
    redpipe, tmp_path, url, environment
):
    done = redpipe("--once", "posts.db", "python", REDPIPE_URL=url, timeout=5, **environment)
    assert done.status == 78
    assert "https" in done.err
    assert not (tmp_path / "posts.db").exists()
    assert leaks(done, tmp_path) == []


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3"])
def test_credentials_may_go_over_plain_http_on_this_machine(redpipe, fake_reddit, host):
    url = fake_reddit.url.replace("127.0.0.1", host)
    # Whether another address of the loopback answers is the system's to decide.
    process = redpipe.start("--once", "posts.db", "python", REDPIPE_URL=url, **APP)
    with contextlib.suppress(TimeoutError):
        wait_for(lambda: process.poll() is not None, 1)
    assert redpipe.stop(process).status != 78


# Proxies and authorities


class Proxy(NamedTuple):
    """A proxy that keeps what passes through it."""

    url: str
    asked: list[str]
    """First lines of requests."""
    headers: list[str]
    passed: list[bytes]


@pytest.fixture
def proxy() -> Iterator[Callable[[int], Proxy]]:
    """Run a proxy on the loopback which leads every tunnel to one port, 0: refuses all."""
    with contextlib.ExitStack() as stack:
        yield lambda port: stack.enter_context(running_proxy(port))


@contextlib.contextmanager
def running_proxy(port: int) -> Iterator[Proxy]:
    kept = Proxy("", [], [], [])

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            kept.asked.append(self.rfile.readline().decode().strip())
            while line := self.rfile.readline().strip():
                kept.headers.append(line.decode())
            if not port:
                self.wfile.write(b"HTTP/1.1 407 Go away\r\nContent-Length: 0\r\n\r\n")
                return
            self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            with socket.create_connection(("127.0.0.1", port)) as upstream:
                pump(self.connection, upstream, kept.passed)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield kept._replace(url=f"127.0.0.1:{server.server_address[1]}")
        finally:
            server.shutdown()
            thread.join(10)


def pump(one: socket.socket, other: socket.socket, passed: list[bytes]) -> None:
    """Pass bytes on in both directions until one side closes."""
    while True:
        ready, _, _ = select.select([one, other], [], [], 20)
        for side in ready:
            try:
                chunk = side.recv(65536)
            except OSError:
                return
            if not chunk:
                return
            passed.append(chunk)
            (other if side is one else one).sendall(chunk)
        if not ready:
            return


@pytest.fixture
def tls_server(tmp_path: Path) -> Iterator[tuple[ListingServer, Path]]:
    """Serve a listing as https://reddit.invalid; gives also the file of its authority."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("reddit.invalid").configure_cert(context)
    bundle = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(str(bundle))
    with serve_listing(context) as server:
        yield server, bundle


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
def test_proxies_and_authorities_are_honoured(redpipe, tls_server, proxy, tmp_path, variable):
    server, bundle = tls_server
    tunnel = proxy(server.server_port)
    environment = {
        variable: f"http://user:{PROXY_PASSWORD}@{tunnel.url}",
        "REDPIPE_URL": "https://reddit.invalid",
        "REQUESTS_CA_BUNDLE": str(bundle),
    }
    done = redpipe("-v", "--once", "posts.db", "python", **environment)
    assert done.status == 0
    assert {line.rpartition(" ")[0] for line in tunnel.asked} == {"CONNECT reddit.invalid:443"}
    basic = base64.b64encode(f"user:{PROXY_PASSWORD}".encode()).decode()
    assert f"proxy-authorization: basic {basic.lower()}" in map(str.lower, tunnel.headers)
    assert leaks(done, tmp_path) == []


def test_a_proxy_does_not_see_the_feed_token(redpipe, tls_server, proxy):
    server, bundle = tls_server
    tunnel = proxy(server.server_port)
    process = redpipe.start(
        "-v",
        "--interval=1",
        "posts.db",
        "python",
        HTTPS_PROXY=f"http://{tunnel.url}",
        REDPIPE_URL="https://reddit.invalid",
        REQUESTS_CA_BUNDLE=str(bundle),
        **ALL,
    )
    # This server gives no token, so that it is asked for again and again.
    wait_for(lambda: sum(map(len, tunnel.passed)) > 2000)
    done = redpipe.stop(process)
    assert secrets_in(b"".join(tunnel.passed)) == []
    assert secrets_in("\n".join([*tunnel.asked, *tunnel.headers, done.err])) == []


def test_an_authority_that_is_not_known_is_refused(redpipe, tls_server, proxy, tmp_path):
    server, _ = tls_server
    tunnel = proxy(server.server_port)
    environment = {"HTTPS_PROXY": f"http://{tunnel.url}", "REDPIPE_URL": "https://reddit.invalid"}
    process = redpipe.start("--interval=1", "posts.db", "python", **environment, **FEED)
    wait_for(lambda: len(tunnel.asked) >= 4)  # the fourth comes when it has been told
    done = redpipe.stop(process)
    assert re.fullmatch(r"redpipe: [^\n]*certificate[^\n]*; will keep trying\n", done.err)
    assert not server.served.acquire(blocking=False)
    assert leaks(done, tmp_path) == []


def test_a_proxy_that_refuses_is_said_without_its_password(redpipe, proxy, tmp_path):
    tunnel = proxy(0)
    environment = {
        "HTTPS_PROXY": f"http://user:{PROXY_PASSWORD}@{tunnel.url}",
        "REDPIPE_URL": "https://reddit.invalid",
    }
    process = redpipe.start("-v", "--interval=1", "posts.db", "python", **environment, **ALL)
    wait_for(lambda: len(tunnel.asked) >= 2)
    done = redpipe.stop(process)
    assert "407" in done.err
    assert leaks(done, tmp_path) == []


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
def test_what_goes_to_this_machine_passes_no_proxy(redpipe, fake_reddit, proxy, variable):
    tunnel = proxy(0)
    done = redpipe("--once", "posts.db", "python", **{variable: f"http://{tunnel.url}"}, **APP)
    assert done == (0, "", "")
    assert tunnel.asked == []
    assert len(fake_reddit.log) == 2
