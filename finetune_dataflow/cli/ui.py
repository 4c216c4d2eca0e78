"""`run.py ui`: the Hamilton UI on this machine alone, with the runs that were tracked.

Hamilton's own command listens on every interface, has no login and opens a page that reports to others. Here its server is
started in this process, on 127.0.0.1, behind `Guard`, which keeps other sites out and the page to itself.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import logging.config
import os
import re
import signal
import socket
import sys
import webbrowser
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from finetune_dataflow.engine import files
from finetune_dataflow.engine.user_cache import user_cache_directory
from finetune_dataflow.errors import UserError, nearest
from finetune_dataflow.tracking.client import USER

ADDRESS, PORT = "127.0.0.1", 8241
LOG, DATABASE = "server.log", "db.sqlite3"
HELP = f"""\
Show tracked runs (run.py train --track) in the Hamilton UI, until Ctrl-C.

usage: run.py ui [options]

  --port PORT       where it answers, on {ADDRESS} only (default: {PORT}; 0 for any that is free)
  --directory DIR   where runs and the server's log are kept (default: ui in the user's cache directory)
  --open            open it in the browser
  -h, --help        this text

There is no login: everybody with an account on this machine can open it (docs/hamilton-ui.md).
"""
PACKAGES = ("hamilton_ui", "django", "django_extensions", "ninja", "aiofiles", "aiohttp", "psycopg2")
ENTER = "/enter.js"
# The page's own files and calls, and nothing of anybody else's: not its analytics, not its fonts, not its videos.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; font-src 'self' data:; "
    "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)

SAFE = (("Content-Security-Policy", POLICY), ("Referrer-Policy", "no-referrer"), ("X-Content-Type-Options", "nosniff"))

Headers = list[tuple[str, str]]
StartResponse = Callable[..., Any]
Application = Callable[[dict[str, Any], StartResponse], Iterable[bytes]]


@dataclass(frozen=True)
class Options:
    """What the command line says; port 0 is any that is free."""

    port: int
    directory: Path
    opens: bool


def ui(arguments: Sequence[str]) -> int:
    """Serve the Hamilton UI on 127.0.0.1 until Ctrl-C or a termination, which end it with exit code 0.

    Raises UserError for an unknown option, missing packages, a port in use (before anything is written), and a directory that
    cannot be used.
    """
    if {"-h", "--help"} & {*arguments}:
        print(HELP, end="")
        return 0
    options = _parsed(arguments)
    _check_packages()
    with _listening(options.port) as listener, _held(options.directory):
        port = listener.getsockname()[1]
        try:
            _serve(listener, options, f"http://{ADDRESS}:{port}/dashboard/projects")
        except KeyboardInterrupt:
            print("Stopped.", file=sys.stderr)
    return 0


def _parsed(arguments: Sequence[str]) -> Options:
    """The options of a command line."""
    given: dict[str, str] = {}
    opens, words = False, list(arguments)
    while words:
        name, separator, value = words.pop(0).partition("=")
        if name == "--open" and not separator:
            opens = True
            continue
        if name not in ("--port", "--directory"):
            known = ("--port", "--directory", "--open")
            raise UserError(f"Unknown option {name!r}.{nearest(name, known)} `run.py ui --help` lists all.")
        if not separator and not words:
            raise UserError(f"{name} needs a value.")
        if name in given:
            raise UserError(f"{name} is given twice.")
        given[name] = value if separator else words.pop(0)
    port = given.get("--port", str(PORT))
    if not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise UserError(f"--port {port!r} is no port. Expected a whole number from 0 to 65535.")
    if "--directory" not in given:
        return Options(int(port), user_cache_directory() / "ui", opens)
    directory = files.user_path(given["--directory"])
    if not given["--directory"].strip() or (directory.exists() and not directory.is_dir()):
        raise UserError(f"--directory {given['--directory']!r} is no directory. Expected one, or the name of a new one.")
    return Options(int(port), directory.absolute(), opens)


def _check_packages() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"The Hamilton UI is not installed: {', '.join(missing)} missing. Install it: pip install 'finetune-dataflow[ui]'"
        )


@contextmanager
def _listening(port: int) -> Iterator[socket.socket]:
    """A socket that listens on the port; a request waits in it until there is a server."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was in use a moment ago is free
        try:
            listener.bind((ADDRESS, port))
            listener.listen(32)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UserError(
                    f"--port {port}: {ADDRESS}:{port} is in use, perhaps by another `run.py ui`. End it, or name another --port."
                ) from error
            raise UserError(f"--port {port}: {ADDRESS}:{port} cannot be used: {error.strerror}. Name another --port.") from error
        yield listener


@contextmanager
def _held(directory: Path) -> Iterator[None]:
    """Hold the directory, which only its owner may read, because a run may be tracked with its data."""
    new = not directory.exists()
    files.make_output_directory(directory)
    if new:
        directory.chmod(0o700)
    with files.writing(directory / LOG):
        (directory / LOG).touch()
    with ExitStack() as holding:
        try:
            holding.enter_context(files.locked(directory))
        except UserError as error:
            raise UserError(
                f"--directory {directory} is in use by another `run.py ui`. Use that one, or name another."
            ) from error
        yield


def _serve(listener: socket.socket, options: Options, address: str) -> None:
    """Bring the database up to date, say where the server answers, and answer."""
    signal.signal(signal.SIGTERM, _stop)
    logging.config.dictConfig(_logging(options.directory / LOG))
    application = _application(options.directory)
    port = listener.getsockname()[1]
    with _server(listener, Guard(application, port, page(_build()))) as server:
        print(f"The Hamilton UI answers on {address} (Ctrl-C ends it). Its runs are in {options.directory}.", flush=True)
        if options.opens:
            webbrowser.open(address)
        server.serve_forever()


def _stop(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _application(directory: Path) -> Application:
    """Hamilton's server over the database in `directory`. Raises UserError where that cannot be read or written."""
    os.environ["HAMILTON_BASE_DIR"] = str(directory)
    root = _build().parent
    sys.path.insert(0, str(root))  # its modules import each other by bare names
    import django
    from django.conf import settings
    from django.core.management import call_command
    from django.core.wsgi import get_wsgi_application
    from django.db import DatabaseError
    from django.db.migrations.exceptions import InconsistentMigrationHistory

    settings.configure(**_settings(directory))
    try:
        django.setup()
        call_command("migrate", verbosity=0, interactive=False)
    except (DatabaseError, InconsistentMigrationHistory, OSError) as error:
        raise UserError(f"The database {directory / DATABASE} cannot be used: {error}. Name another --directory.") from error
    application: Application = get_wsgi_application()
    return application


def _settings(directory: Path) -> dict[str, Any]:
    """Hamilton's settings for one machine, made tighter."""
    from server import settings_mini  # Hamilton's, by its bare name

    theirs = {name: getattr(settings_mini, name) for name in dir(settings_mini) if name.isupper()}
    database = {"ENGINE": "django.db.backends.sqlite3", "NAME": directory / DATABASE, "OPTIONS": {"timeout": 20}}
    return {
        **theirs,
        "ALLOWED_HOSTS": [ADDRESS, "localhost"],
        "DATABASES": {"default": database},
        "DEBUG": False,
        "LOGGING_CONFIG": None,
        "SECRET_KEY": os.urandom(32).hex(),
    }


def _logging(path: Path) -> dict[str, Any]:
    """What the server says goes to a file, the last few megabytes of it."""
    handler = {"class": "logging.handlers.RotatingFileHandler", "filename": str(path), "maxBytes": 4_000_000, "backupCount": 1}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
        "handlers": {"file": {**handler, "encoding": "utf-8", "formatter": "line"}},
        "root": {"handlers": ["file"], "level": "INFO"},
    }


def _server(listener: socket.socket, application: Application) -> Any:
    """A server on a socket that listens already: a thread a request, none of which outlives the process."""
    from django.core.servers.basehttp import ThreadedWSGIServer, WSGIRequestHandler

    class Server(ThreadedWSGIServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            logging.getLogger(__name__).exception("A request from %s failed.", client_address)

    address = listener.getsockname()
    server = Server(address, WSGIRequestHandler, bind_and_activate=False)
    server.socket.close()
    server.socket, server.server_address = listener, address
    server.server_name, server.server_port = address
    server.setup_environ()
    server.set_app(application)
    return server


def _build() -> Path:
    """The directory of the page's files in the installed package."""
    found = importlib.util.find_spec("hamilton_ui")
    assert found is not None and found.submodule_search_locations
    return Path(found.submodule_search_locations[0]) / "build"


def page(build: Path) -> bytes:
    """The page that opens the UI, with its own scripts and styles and nobody else's. Raises UserError where there are none."""
    index = (build / "index.html").read_text(encoding="utf-8")
    tags = re.findall(r'<(script|link)\b([^>]*\b(?:src|href)="/assets/[^"]+"[^>]*)>', index)
    if not any(name == "script" for name, _ in tags):
        raise UserError("The page of the installed Hamilton UI has no script. Expected that of apache-hamilton-ui 0.0.")
    own = "".join(f"<{name}{rest}>{'</script>' if name == 'script' else ''}" for name, rest in tags)
    head = (
        '<meta charset="utf-8"><title>Hamilton UI</title><meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="/favicon.png"><style>body { font-family: system-ui, sans-serif }</style>'
        f'<script src="{ENTER}"></script>{own}'
    )
    return f'<!doctype html><html lang="en"><head>{head}</head><body><div id="root"></div></body></html>'.encode()


def _enter() -> bytes:
    """A script that fills in the name that the page asks for on the first visit: the one that runs are tracked under."""
    kept = {"hamilton-username": USER, "authed": "true", "finetune-dataflow": "entered"}
    return (
        'if (!localStorage.getItem("finetune-dataflow"))'
        f" for (const [name, value] of Object.entries({json.dumps(kept)})) localStorage.setItem(name, value);\n"
    ).encode()


class Guard:
    """Hamilton's server for this machine's own pages alone.

    A request under another host's name (DNS rebinding) or from another site's page is refused; every answer says that the page
    may talk to nobody else. What is neither the API nor a file is the page.
    """

    def __init__(self, application: Application, port: int, page: bytes) -> None:
        """`page`: what opens the UI."""
        self._application, self._page = application, page
        self._hosts = {f"{host}:{port}" for host in (ADDRESS, "localhost")} | ({ADDRESS, "localhost"} if port == 80 else set())

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        """Answer a request, as WSGI has it."""
        host, origin, path = (environ.get(name, "") for name in ("HTTP_HOST", "HTTP_ORIGIN", "PATH_INFO"))

        def start(status: str, headers: Headers, *rest: Any) -> Any:
            replaced = {name.lower() for name, _ in SAFE}
            kept = [each for each in headers if each[0].lower() not in replaced]
            safe = [
                ("Content-Security-Policy", POLICY),
                ("Referrer-Policy", "no-referrer"),
                ("X-Content-Type-Options", "nosniff"),
            ]
            return start_response(status, [*kept, *safe], *rest)

        if host not in self._hosts or (origin and origin.removeprefix("http://") not in self._hosts):
            return _answer(start, "403 Forbidden", "text/plain", b"This is another site's page.\n")
        if path == ENTER:
            return _answer(start, "200 OK", "text/javascript", _enter())
        if path.startswith(("/api/", "/assets/")) or re.fullmatch(r"/[\w-]+\.(png|svg|json|txt)", path):
            return self._application(environ, start)
        return _answer(start, "200 OK", "text/html; charset=utf-8", self._page)


def _answer(start: StartResponse, status: str, kind: str, body: bytes) -> list[bytes]:
    start(status, [("Content-Type", kind), ("Content-Length", str(len(body))), ("Cache-Control", "no-store")])
    return [body]
