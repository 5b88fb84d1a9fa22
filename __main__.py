"""Keep a SQLite database of Reddit's new posts.

Usage:
  redpipe.pyz [options] [--field=SPEC]... [--] <database> [<subreddit>...]
  redpipe.pyz (-h | --help)
  redpipe.pyz --version

Follows the subreddits (python, r/python or a+b; none means all of Reddit) until
it is stopped, and stores each new post once. Started again, it goes on.

Options:
  --once              Store everything new since the last run, then exit (cron).
  --from=FILE         Read posts from FILE, a JSON value a line; - is standard input.
  --field=SPEC        Also store KEY, KEY.KEY or KEY:COLUMN. May be repeated.
  --interval=SECONDS  Longest wait between two polls, 1 to 3600 (default: 25).
  --print             Also write each new post to standard output, as a line of JSON.
  --recheck=HOURS     Ask again about posts not asked about for HOURS, erase what
                      was deleted on Reddit, refresh the fields, then exit.
  --status            Show what is stored and how complete it is, then exit.
  -q, --quiet         Say errors only.
  -v, --verbose       Say what every poll did.

Credentials come from the environment: see Credentials in README.
"""

# The process: version, arguments, environment, signals, terminal, exit status.

import sys

if sys.version_info < (3, 10):  # this file must parse on Python 3.6 to say so
    sys.exit("redpipe needs Python 3.10 or newer; %s is %.3s" % (sys.executable, sys.version))

import gc
import os
import select
import signal
import time
from _thread import allocate_lock, start_new_thread
from contextlib import contextmanager, suppress

TYPE_CHECKING = False  # typing's own costs milliseconds at every start
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Any, TextIO

    import pipeline
    from pipeline import Batch, Cursor, Database, Row, Survey

    Tell = Callable[[], str]
else:

    class Late:
        """The module pipeline, imported at its first use: --help and --version need none."""

        def __getattr__(self, name: str) -> "Any":
            return getattr(__import__("pipeline"), name)

    pipeline = Late()

VERSION = "2.0.0"

# python -OO leaves the docstring out, which is the first one in the source.
USAGE = (__doc__ or __import__("inspect").getsource(sys.modules[__name__]).split('"""')[1]).strip()

CONFLICTS = {  # none of the second goes with the first
    "--from": ("--once", "--recheck", "--status", "--interval", "--print"),
    "--recheck": ("--once", "--status", "--interval", "--print"),
    "--status": ("--once", "--interval", "--print", "--field"),
    "--quiet": ("--verbose",),
}

if not os.path.isdir(sys.path[0]):  # in the archive: the host's packages keep out
    sys.path[:] = [p for p in sys.path if not p.endswith(("site-packages", "dist-packages"))]


class Stopped(BaseException):
    """A signal asks the process to end."""


class Signals:
    """Turns signals into Stopped. Inside of `with` they wait until its end."""

    number = 0  # of the first that came
    holds = 0

    def listen(self) -> None:
        """Take over the signals that end a process, save those that are ignored."""
        import atexit

        atexit.register(self.die)  # the first to be registered is the last to run
        for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.arrived)

    def arrived(self, number: int, frame: object) -> None:
        """Stop, by the first that comes; more would disturb the end."""
        if not self.number:
            self.number = number
            # What is raised in a finalizer is lost, and told here: stop a moment later.
            signal.signal(signal.SIGALRM, lambda *_: self.check())
            sys.unraisablehook = lambda _: signal.setitimer(signal.ITIMER_REAL, 0.1)
            self.check()

    def check(self) -> None:
        if self.number and not self.holds:
            raise Stopped

    def __enter__(self) -> None:
        self.holds += 1

    def __exit__(self, *error: object) -> None:
        self.holds -= 1
        self.check()

    def die(self) -> None:
        """End the process by the signal that came, when all exit handlers have run."""
        if self.number:
            signal.signal(self.number, signal.SIG_DFL)
            os.kill(os.getpid(), self.number)


class Console:
    """Standard error: messages and, on a terminal, a line below them that lives.

    Control characters, which messages may have from outside, are not written. A closed
    standard error is not an error, and a terminal that takes nothing is not waited for.
    """

    def __init__(self, stream: "TextIO | None") -> None:
        self.is_open = stream is not None
        self.terminal = stream is not None and stream.isatty() and os.name == "posix"
        self.lives, self.line = False, ""
        self.lock = allocate_lock()

    def write(self, message: str) -> None:
        """Write a message above the line; what a logging handler calls."""
        printable = "".join(c if c.isprintable() else "\ufffd" for c in message.rstrip("\n"))
        with self.lock:
            blank = " " * len(self.line) + "\r" if self.line else ""
            self._put(f"{blank}redpipe: {printable}\n{self.line}")

    def live(self, tell: "Tell") -> None:
        """Show what `tell` returns, from now on and anew every second, until `close`."""
        if self.lives:
            start_new_thread(self._draw, (tell,))

    def close(self) -> None:
        """Leave the line as it is; nothing is drawn any more."""
        with self.lock:
            if self.line:
                self._put("\n")
            self.lives, self.line = False, ""

    def _draw(self, tell: "Tell") -> None:
        # A signal that comes to this thread might not wake the main one.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while self.lives:
            with self.lock, suppress(OSError):  # the terminal may be gone
                width = os.get_terminal_size(2).columns or 80
                line = f"redpipe: {tell()}"[: width - 1] if self.lives else ""
                self._put(line.ljust(len(self.line)))
                self.line = line
            time.sleep(1)

    def _put(self, text: str) -> None:
        # Ctrl-S stops a terminal; capturing does not wait for it.
        if self.is_open and (not self.terminal or select.select([], [2], [], 0.5)[1]):
            with suppress(OSError):  # past Python's buffer, which would fail once more at exit
                os.write(2, ("\r" * self.terminal + text).encode())


def say(lines: "Iterable[str]", signals: Signals) -> None:
    """Write to standard output, at once. Raises StorageFailed, or Stopped by SIGPIPE."""
    left = "".join(f"{line}\n" for line in lines).encode()
    try:
        while left:  # past Python's buffer, which would be written once more at exit
            left = left[os.write(sys.stdout.fileno(), left) :]
    except BrokenPipeError:
        signals.arrived(signal.SIGPIPE, None)
    except (OSError, AttributeError) as exc:  # it is None when it was closed at the start
        reason = getattr(exc, "strerror", "closed")
        raise pipeline.StorageFailed(f"standard output: {reason}") from exc


def parse_arguments(argv: "list[str]") -> "dict[str, Any]":
    """Read the command line. Raises BadUsage."""
    from docopt import docopt

    try:  # without a database, too: what is wrong with the options is said first
        arguments = docopt(USAGE.replace("<database>", "[<database>]"), argv, default_help=False)
    except SystemExit as error:
        check_options({word.partition("=")[0] for word in argv})
        said = str(error).partition("\n")[0]
        wrong = " ".join(said.split("'")[1::2])  # what docopt puts into a list of objects
        words = f"unknown or repeated: {wrong}" if wrong else said
        raise pipeline.BadUsage(f"{words}; see redpipe.pyz --help") from None
    check_options({option for option, value in arguments.items() if value not in (None, False, [])})
    if arguments["<database>"] is None:
        raise pipeline.BadUsage("missing <database>; see redpipe.pyz --help")
    return arguments


def check_options(given: "set[str]") -> None:
    """Raise BadUsage for options that do not go together."""
    for one, others in CONFLICTS.items():
        for other in given.intersection(others if one in given else ()):
            raise pipeline.BadUsage(f"{one} and {other} do not go together")


def parse_subreddits(arguments: "list[str]") -> "list[str]":
    """Read python, r/python, /r/python/ and a+b as lower-case names, each once."""
    import re

    names = []
    for argument in arguments:
        if argument.lower().endswith((".db", ".sqlite", ".sqlite3")):
            raise pipeline.BadUsage(f"{argument}: the database comes first, then the subreddits")
        for name in re.sub(r"^/?r/|/$", "", argument).split("+"):
            if not re.fullmatch(r"(?a)[\w.-]*\w[\w.-]*", name):
                raise pipeline.BadUsage(f"{argument}: not a subreddit name, like python or a+b")
            names.append(name.lower())
    return list(dict.fromkeys(names))


def parse_number(option: str, text: str, least: int, most: int) -> float:
    """Read an option's number: of seconds, or of hours. Raises BadUsage."""
    with suppress(ValueError):
        if least <= float(text) <= most:
            return float(text)
    raise pipeline.BadUsage(f"{option}={text}: not a number from {least} to {most}")


def read_access(environ: "Mapping[str, str]") -> "pipeline.Access":
    """Read where to ask, and with which credentials. Raises BadEnvironment."""
    import re

    names = ("CLIENT_ID", "CLIENT_SECRET", "USERNAME", "FEED_TOKEN")
    client_id, secret, user, token = (environ.get(f"REDDIT_{name}", "").strip() for name in names)
    url = environ.get("REDPIPE_URL", "").strip()
    if url and ("@" in url or "://" not in url or not is_address(url)):  # it may hold a password
        raise pipeline.BadEnvironment("REDPIPE_URL: not of the form http(s)://host[:port][/path]")
    if secret and not client_id:
        raise pipeline.BadEnvironment("REDDIT_CLIENT_SECRET is set, but REDDIT_CLIENT_ID is not")
    if token and not user:
        raise pipeline.BadEnvironment("REDDIT_FEED_TOKEN is set, but REDDIT_USERNAME is not")
    for name, value, form in ("USERNAME", user, "[A-Za-z0-9_-]*"), ("FEED_TOKEN", token, "[!-~]*"):
        if not re.fullmatch(form, value):
            raise pipeline.BadEnvironment(f"REDDIT_{name}: not of the form that Reddit gives")
    if (client_id or token) and url.lower().startswith("http:") and not pipeline.is_loopback(url):
        raise pipeline.BadEnvironment("REDPIPE_URL: credentials go to other machines by https only")
    check_certificates(environ)
    agent = f"{sys.platform}:redpipe:{VERSION}" + (f" (by /u/{user})" if user else "")
    return pipeline.Access(url.rstrip("/"), client_id, secret, user, token, agent)


def is_address(url: str) -> bool:
    """Return whether it is of the form [http(s)://][user:password@]host[:port][/path]."""
    import re

    host = r"([^\s/?#]*@)?([\w.-]+|\[[0-9a-f:.]+\])"
    match = re.fullmatch(rf"(?i)(https?://)?{host}(:(?P<port>\d+))?(/[^\s?#]*)?", url)
    return match is not None and url.isprintable() and 0 < int(match["port"] or 80) < 65536


def check_proxy(url: str) -> None:
    """Raise BadEnvironment if the proxy that requests takes for an address can never work."""
    from requests.utils import get_environ_proxies, select_proxy

    proxy = select_proxy(url, get_environ_proxies(url))
    if proxy and not is_address(proxy):
        names = [name for name in os.environ if "_proxy" in name.lower()]
        name = next((name for name in names if os.environ[name] == proxy), "proxy")
        raise pipeline.BadEnvironment(f"{name}: not http(s)://host:port; SOCKS is not spoken")


def check_certificates(environ: "Mapping[str, str]") -> None:
    """Raise BadEnvironment for a file or folder that holds no certificate."""
    import glob
    import ssl

    for name in filter(environ.get, ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        for file in glob.glob(glob.escape(environ[name]) + "/*") or [environ[name]]:
            with suppress(OSError):
                context.load_verify_locations(file)
        if not context.cert_store_stats()["x509"]:
            raise pipeline.BadEnvironment(f"{name}: not a file or folder that holds a certificate")


def log_to(console: Console, arguments: "dict[str, Any]") -> None:
    """Send the log to the console, as much of it as the options say."""
    import logging

    level = logging.INFO if console.terminal else logging.WARNING
    level = logging.ERROR if arguments["--quiet"] else level
    pipeline.log.handlers[:] = [logging.StreamHandler(console)]
    pipeline.log.setLevel(logging.DEBUG if arguments["--verbose"] else level)
    console.lives = console.terminal and not (arguments["--quiet"] or arguments["--print"])


def share_done(file: "Any", began: float) -> str:
    """Say how much of FILE was read since then, and when a regular one will be done.

    It looks at two numbers only, so a thread may call it at any time, even on a closed file.
    """
    size, taken = file.raw.size, file.raw.taken  # of a CountingFile
    seconds = time.monotonic() - began
    speed = f"{taken / 1e6 / max(seconds, 0.1):,.0f} MB/s"
    if not 0 < taken <= size:  # a pipe, or a file that grows
        return f"{taken / 1e6:,.0f} MB read, {speed}"
    left = duration(seconds * (size - taken) / taken)
    return f"{100 * taken // size} % of {size / 1e6:,.0f} MB read, {speed}, {left} left"


def source_of(access: "pipeline.Access") -> str:
    from urllib.parse import urlsplit

    credentials = "a feed token" if access.feed_token else "no credentials"
    credentials = "an app" if access.client_id else credentials
    return f"from {urlsplit(access.url).hostname or 'Reddit'} with {credentials}"


def standing(reddit: "pipeline.Reddit") -> str:
    """Say what is going on, for how long, and what is left of the budget."""
    what, until = reddit.doing
    if until is not None:  # what comes next, or what lasts
        left = duration(until - reddit.clock.monotonic() + 0.999)
        what += (" in " if "next" in what else ": ") + left
    return f"{what}, {reddit.budget.free(reddit.clock.monotonic()):,} requests left"


def duration(seconds: float) -> str:
    """Say how long something takes, in the largest unit of which there are two."""
    units = ((86400, "d"), (3600, "h"), (60, "min"))
    size, unit = next((unit for unit in units if seconds >= 2 * unit[0]), (1, "s"))
    return f"{max(0, int(seconds)) // size:,} {unit}"


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + "s" * (number != 1)


class Progress:
    """What came to be stored, how old the newest post is, and how many come a minute.

    That is by the times of the last five minutes' posts: how fast one catches up tells nothing.
    """

    stored = gaps = newest = 0
    recent: "tuple[int, ...]" = ()

    def add(self, stored: int, rows: "Sequence[Row]", batch: "Batch") -> None:
        self.stored += stored
        self.gaps += len(batch.gaps)
        for cursor in batch.cursors:
            self.newest = max(self.newest, cursor.newest_utc)
            times = (*self.recent, *(row["created_utc"] or 0 for row in rows))
            self.recent = tuple(at for at in times if at > time.time() - 300)

    def line(self) -> str:
        now, seen = time.time(), ""
        if self.newest:
            rate = sum(at > now - 300 for at in self.recent) / 5
            seen = f", {rate:,.1f}/min, newest {duration(now - self.newest)} ago"
        return f"{counted(self.stored, 'post')} stored{seen}"

    def result(self) -> str:
        return f"{counted(self.stored, 'post')} stored, {counted(self.gaps, 'gap')}"


ROW = "{:22.22} {:10} {:16} {:>7} {:>10} {:>4} {:>8} {}"  # at most 100 columns


def status_table(survey: "Survey", cursors: "Sequence[Cursor]", now: int) -> "Iterator[str]":
    """Yield a heading, and a line for each cursor."""
    yield ROW.format("name", "since", "until", "poll", "posts", "gaps", "span", "last 14 days")
    for name, since, newest, polled in cursors:
        gaps = [(after, before) for owner, after, before in survey.gaps if owner == name]
        posts = survey.posts[name]
        poll = duration(now - polled) if polled else "never"
        span = duration(sum(before - after for after, before in gaps)) if gaps else ""
        covered = days_of([(since, max(newest, polled))])
        drawn = bar(posts, covered, days_of(gaps), now // 86400)
        counts = f"{sum(posts.values()):,}", f"{len(gaps):,}"
        yield ROW.format(name, utc(since)[:10], utc(newest), poll, *counts, span, drawn)


def utc(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds)) if seconds else "-"


def days_of(spans: "Sequence[tuple[int, int]]") -> "set[int]":
    return {day for first, last in spans for day in range(first // 86400, last // 86400 + 1)}


def bar(posts: "Mapping[int, int]", covered: "set[int]", gaps: "set[int]", today: int) -> str:
    """Draw the posts of the last 14 days, today's last, by the day that had most."""
    days = range(today - 13, today + 1)
    most = max(1, *(posts.get(day, 0) for day in days))
    levels = {day: "▁▂▃▄▅▆▇█"[-(-7 * posts.get(day, 0) // most)] for day in covered & {*days}}
    return "".join("!" if day in gaps else levels.get(day, "·") for day in days)


class Run:
    """One run: what was asked for, and the process it runs in."""

    def __init__(self, arguments: "dict[str, Any]", signals: Signals, console: Console) -> None:
        given = {option: value for option, value in arguments.items() if value is not None}
        self.arguments = arguments
        self.signals = signals
        self.console = console
        self.path: str = arguments["<database>"]
        with suppress(FileNotFoundError):  # the current folder may be deleted
            self.path = os.path.abspath(self.path)  # and never :memory:
        self.names = parse_subreddits([name for name in arguments["<subreddit>"] if name != "--"])
        self.fields = pipeline.parse_fields(arguments["--field"])
        self.interval = parse_number("--interval", given.get("--interval", "25"), 1, 3600)
        self.hours = parse_number("--recheck", given.get("--recheck", "0"), 0, 1_000_000)

    def follow(self) -> None:
        """Store what is new on Reddit."""
        reddit, names = self.open_reddit(), self.names or ["all"]
        once = self.arguments["--once"]
        what = f"{'polling' if once else 'following'} {pipeline.several(names)}"
        with self.open_database() as database:
            asker = pipeline.Asker(reddit, once=once)
            batches = pipeline.stream(asker, names, database, self.interval)
            what += f" {source_of(reddit.access)}"
            self.store(database, batches, what, lambda: standing(reddit))

    def import_file(self) -> None:
        """Store the posts of a file."""
        path, began = self.arguments["--from"], time.monotonic()
        with pipeline.open_file(path) as file, self.open_database() as database:
            batches = pipeline.read_file(file, self.names)
            self.store(database, batches, f"reading {path}", lambda: share_done(file, began))

    def recheck(self) -> None:
        """Ask about stored posts again, erase what was deleted and refresh the fields."""
        from collections import Counter

        reddit, sums = self.open_reddit(), Counter[str]()
        if not reddit.access.client_id:
            raise pipeline.BadEnvironment("--recheck needs an app; see README, Credentials")
        pipeline.check_header(self.path, exists=True)
        names = pipeline.several(self.names) or "all posts"

        line = "{asked:,} of {due:,} asked, {erased:,} erased".format_map
        end = "{asked:,} asked, {refreshed:,} refreshed, {erased:,} erased".format_map
        with self.open_database() as database:
            asker = pipeline.ModestAsker(reddit, once=True)
            what = f"rechecking {names} {source_of(reddit.access)}"
            with self.told(what, lambda: line(sums), lambda: end(sums), lambda: standing(reddit)):
                for part in pipeline.recheck(asker, database, self.names, self.fields, self.hours):
                    sums.update(part)

    def show_status(self) -> None:
        """Print what is stored of each name. Raises Failed if one was not polled lately."""
        now = int(time.time())
        survey = pipeline.survey(self.path, now // 86400 - 13)
        known = {cursor.subreddit: cursor for cursor in survey.cursors}
        names = sorted(known) if not self.names or "all" in self.names else self.names
        cursors = [known.get(name) or pipeline.Cursor(name, 0, 0, 0) for name in names]
        count, gaps = sum(survey.posts["all"].values()), len(survey.gaps)
        total = f"{counted(count, 'post')}, {survey.erased:,} erased, {counted(gaps, 'gap')}"
        if survey.checked_utc:
            total += f", last recheck {duration(now - survey.checked_utc)} ago"
        total += f", {os.path.getsize(self.path) / 1e6:,.1f} MB in all"
        say([*status_table(survey, cursors, now), total], self.signals)
        stale = [cursor.subreddit for cursor in cursors if cursor.polled_utc < now - 3600]
        if stale:
            raise pipeline.Failed(f"{pipeline.several(stale)}: not polled within the last hour")

    def open_reddit(self) -> "pipeline.Reddit":
        """Import requests, whose certificates go from the archive to a temporary file."""
        import tempfile

        try:
            # An import that was broken off would leave that file behind, and C makes an
            # ImportError of what is raised meanwhile.
            with self.signals:
                access = read_access(os.environ)
                with tempfile.TemporaryFile() as file:  # a full disk would cut it off in silence
                    file.write(bytes(2**19))
                reddit = pipeline.Reddit(access, pipeline.http_fetch())
        except OSError as exc:
            reason = f"{tempfile.tempdir or ''}: {exc.strerror or exc}"
            raise pipeline.StorageFailed(f"temporary directory {reason}; set TMPDIR") from exc
        check_proxy(access.url or pipeline.WWW_URL)
        return reddit

    def open_database(self) -> "Database":
        return pipeline.Database(self.path, self.fields, hold=lambda: self.signals)

    def store(
        self, database: "Database", batches: "Iterable[Batch]", what: str, standing: "Tell"
    ) -> None:
        """Run the pipeline: posts, rows, transactions; and say how it goes."""
        import json

        progress, transform = Progress(), pipeline.transform
        with self.told(what, progress.line, progress.result, standing):
            for batch in batches:
                rows = [transform(post, self.fields) for post in batch.posts]
                if self.arguments["--print"]:
                    say([json.dumps(row, ensure_ascii=False) for row in rows], self.signals)
                stored = pipeline.load(database, rows, batch.cursors, batch.gaps)
                progress.add(stored, rows, batch)

    @contextmanager
    def told(self, what: str, line: "Tell", result: "Tell", standing: "Tell") -> "Iterator[None]":
        """Say how it goes: at the beginning, all the time, and at the end."""
        gc.enable()
        pipeline.log.info("%s into %s; Ctrl-C stops it", what, self.arguments["<database>"])
        self.console.live(lambda: f"{line()}, {standing()}")
        try:
            yield
        finally:
            self.console.close()
            pipeline.log.info("%s", result())


def run(argv: "list[str]", signals: Signals, console: Console) -> None:
    """Do what the command line asks for."""
    if {"-h", "--help", "--version"} & set(argv):
        say([f"redpipe {VERSION}" if "--version" in argv else USAGE], signals)
        return
    arguments = parse_arguments(argv)
    run = Run(arguments, signals, console)
    log_to(console, arguments)
    if arguments["--status"]:
        run.show_status()
    elif arguments["--from"] is not None:
        run.import_file()
    elif arguments["--recheck"] is not None:
        run.recheck()
    else:
        run.follow()


def main(argv: "list[str]") -> int:
    """Run the program and return its exit status; a signal ends the process later on."""
    gc.disable()  # imports create no garbage; not looking for it saves 5 % of a start
    signals, console = Signals(), Console(sys.stderr)
    try:
        try:
            signals.listen()
            run(argv, signals, console)
            return 0
        except pipeline.RedpipeError as error:
            console.write(str(error))
            return error.exit_status
    except Stopped:
        return 0
    finally:
        signals.holds += 1  # exit handlers are not to be disturbed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
