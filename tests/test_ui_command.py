"""`run.py ui` up to its server: options, refusals, and the guard before it; tests_full/test_ui.py has the server itself."""

from __future__ import annotations

import importlib.util
import re
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_dataflow.cli import ui as command
from finetune_dataflow.cli.ui import HELP, Guard, page, ui
from finetune_dataflow.errors import UserError


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that something else listens on."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield int(other.getsockname()[1])


def test_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert ui(["--port", "1", "--help"]) == 0
    assert capsys.readouterr().out == HELP and "--directory DIR" in HELP and "8241" in HELP


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prot", "1"], "Unknown option '--prot'. Did you mean '--port'? `run.py ui --help` lists all."),
        (["8241"], "Unknown option '8241'."),
        (["--port"], "--port needs a value."),
        (["--port", "1", "--port=2"], "--port is given twice."),
        (["--port", "http"], "--port 'http' is no port. Expected a whole number from 0 to 65535."),
        (["--port", "-1"], "--port '-1' is no port."),
        (["--port", "65536"], "--port '65536' is no port."),
        (["--port", "\u0661"], "is no port."),
        (["--directory", ""], "--directory '' is no directory. Expected one, or the name of a new one."),
        (["--directory", __file__], "is no directory."),
    ],
)
def test_a_mistake_in_an_option_names_it(arguments: list[str], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        ui(arguments)


def test_a_port_in_use_is_named_before_anything_is_written(taken: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--port {taken}: 127.0.0.1:{taken} is in use, .* name another --port."):
        ui(["--port", str(taken), "--directory", str(tmp_path / "new")])
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named_with_the_extra_that_has_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("hamilton_ui", "django") else found(name))
    with pytest.raises(UserError, match=r"hamilton_ui, django missing. Install it: pip install 'finetune-dataflow\[ui\]'"):
        ui(["--port", "0", "--directory", str(tmp_path / "new")])
    assert list(tmp_path.iterdir()) == []


def test_the_page_has_the_uis_own_scripts_and_nobody_elses(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(
        '<script async src="https://tags.example/tag.js"></script><script>tag()</script>'
        '<link href="https://fonts.example/a.css" rel="stylesheet"><script type="module" crossorigin src="/assets/a.js"></script>'
        '<link rel="stylesheet" crossorigin href="/assets/a.css">'
    )
    text = page(tmp_path).decode()
    assert "example" not in text and "tag()" not in text
    scripts = re.findall(r"<script[^>]*></script>|<link[^>]*assets[^>]*>", text)
    assert scripts == [
        '<script src="/enter.js"></script>',
        '<script type="module" crossorigin src="/assets/a.js"></script>',
        '<link rel="stylesheet" crossorigin href="/assets/a.css">',
    ]


def test_the_page_of_the_installed_ui_asks_nobody_else() -> None:
    text = page(command._build()).decode()
    assert text.count('src="/assets/index-') == 1 and "http" not in text


def test_a_page_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text('<script src="/main.js"></script>')
    with pytest.raises(UserError, match="has no script"):
        page(tmp_path)


def answered(path: str, **headers: str) -> tuple[str, dict[str, str], bytes]:
    """Status, headers and body of the guard's answer; what it lets through is answered "hamilton"."""
    seen: dict[str, Any] = {}

    def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain"), ("Referrer-Policy", "unsafe-url")])
        return [b"hamilton"]

    def start_response(status: str, given: list[tuple[str, str]]) -> None:
        seen.update(status=status, headers=given)

    environ = {"PATH_INFO": path, "HTTP_HOST": "127.0.0.1:8241", **{f"HTTP_{name}": each for name, each in headers.items()}}
    body = b"".join(Guard(application, 8241, b"the page")(environ, start_response))
    assert len({name.lower() for name, _ in seen["headers"]}) == len(seen["headers"])
    return seen["status"], dict(seen["headers"]), body


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8241", "127.0.0.1", "127.0.0.1:80", "0.0.0.0:8241", ""])
@pytest.mark.parametrize("path", ["/", "/api/v1/projects", "/api/ping", "/assets/a.js"])
def test_another_hosts_name_is_refused(path: str, host: str) -> None:
    assert answered(path, HOST=host)[0] == "403 Forbidden"


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:8000", "https://127.0.0.1:8241"])
def test_another_sites_page_is_refused(origin: str) -> None:
    assert answered("/api/v1/projects", ORIGIN=origin)[0] == "403 Forbidden"
    assert answered("/api/v1/projects", ORIGIN="http://localhost:8241", HOST="localhost:8241")[0] == "200 OK"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/v1/projects", b"hamilton"),
        ("/assets/a.js", b"hamilton"),
        ("/favicon.png", b"hamilton"),
        ("/", b"the page"),
        ("/dashboard/project/1/runs/1", b"the page"),
        ("/admin/", b"the page"),
        ("/dashboard/../admin.html", b"the page"),
    ],
)
def test_what_is_no_file_and_no_call_is_the_page(path: str, body: bytes) -> None:
    status, headers, found = answered(path)
    assert (status, found) == ("200 OK", body)
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "script-src 'self';" in policy and "connect-src 'self';" in policy
    assert headers["Referrer-Policy"] == "no-referrer" and headers["X-Content-Type-Options"] == "nosniff"


def test_the_first_visit_enters_under_the_name_that_runs_are_tracked_under() -> None:
    body = answered("/enter.js")[2].decode()
    assert '"hamilton-username": "local"' in body and '"authed": "true"' in body
