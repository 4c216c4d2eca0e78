"""Where the study is kept: the storages of Optuna by their URLs, checked before any work, and never printed with a password."""

from __future__ import annotations

import re
import sqlite3
import sys
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, urlsplit

from finetune_dataflow.errors import UserError

if TYPE_CHECKING:
    import optuna

T = TypeVar("T")
WAIT_SECONDS = 120  # for an SQLite file that another process writes
ANSWER_SECONDS = 20.0  # for a database, a server or a file system to answer for the first time
EXPECTED = (
    "a URL as SQLAlchemy writes it (sqlite:////path/study.db, postgresql://user@host/database, mysql+pymysql://...), "
    "journal:///path/study.log, redis://host:6379, or grpc://host:13000 for Optuna's proxy"
)
# The package that brings a module that SQLAlchemy, Optuna or fsspec asks for, where the two are called differently.
PACKAGES = {
    "psycopg": "'psycopg[binary]'",
    "psycopg2": "psycopg2-binary",
    "MySQLdb": "mysqlclient",
    "pymysql": "PyMySQL",
    "grpc": "grpcio protobuf",
    "google": "grpcio protobuf",
    "google.protobuf": "grpcio protobuf",
    "cx_Oracle": "oracledb",
}
NETWORK = ("nfs", "cifs", "smb", "fuse.sshfs", "fuse.s3fs", "lustre", "gpfs", "ceph", "glusterfs", "fuse.gluster", "beegfs", "9p")


def redacted(text: str) -> str:
    """A text with the passwords of its URLs blotted out; the rest of it as it was."""
    text = re.sub(r"(://[^:/?#@\s]*):[^\s]*@", r"\1:***@", text)
    return re.sub(r"(?i)([?&](?:password|passwd|pwd|passphrase|token|secret|key)=)[^&\s]*", r"\1***", text)


def without_secrets(text: str, url: str) -> str:
    """What a library says of a URL, its password nowhere in it, spelled as in the URL or as it is meant."""
    found = re.search(r"://[^:/?#@\s]*:([^\s]*)@", url)
    secrets = [found[1], unquote(found[1])] if found else []
    secrets += re.findall(r"(?i)[?&](?:password|passwd|pwd|passphrase|token|secret|key)=([^&\s]*)", url)
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        text = text.replace(secret, "***")
    return redacted(text)


def storage(url: str) -> optuna.storages.BaseStorage:
    """The storage at a URL.

    Raises UserError where it is no URL of a storage, or its driver is not installed; what an absent database raises, else.
    """
    import warnings

    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalRedisBackend
    from sqlalchemy.exc import ArgumentError

    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    scheme = url.partition(":")[0].lower() if "://" in url else ""
    try:
        if scheme == "journal":
            return optuna.storages.JournalStorage(JournalFileBackend(_journal(url)))
        if scheme in ("redis", "rediss"):
            return optuna.storages.JournalStorage(JournalRedisBackend(url))
        if scheme == "grpc":
            return _proxy(url)
        return optuna.storages.RDBStorage(_with_driver(url), engine_kwargs=_engine(url))
    except ImportError as error:
        raise UserError(f"--storage {redacted(url)} needs a package that is not installed: {_install(error)}.") from error
    except (ArgumentError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        why = without_secrets(first_line(error), url)
        raise UserError(f"--storage {redacted(url)!r} is refused ({why}). Expected {EXPECTED}.") from error


def check_storage(url: str) -> None:
    """Raise UserError where a storage does not answer within ANSWER_SECONDS, with the reason and without its password."""
    answered(lambda: storage(url).get_all_studies(), f"The study's storage {redacted(url)}", url)


def answered(call: Callable[[], T], what: str, url: str = "", seconds: float = ANSWER_SECONDS) -> T:
    """What a call returns within so many seconds. Raises UserError that names `what`, whatever goes wrong, and for silence."""
    found: list[T] = []
    problems: list[BaseException] = []

    def asked() -> None:
        try:
            found.append(call())
        except BaseException as error:
            problems.append(error)

    # A thread that can be left behind: not every driver knows how to give up.
    thread = threading.Thread(target=asked, daemon=True)
    thread.start()
    thread.join(seconds)
    if found:
        return found[0]
    if not problems:
        raise UserError(f"{what} did not answer within {seconds:g} seconds. Nothing was begun.")
    error = problems[0]
    if isinstance(error, UserError):
        raise error
    if isinstance(error, ImportError):
        raise UserError(f"{what} needs a package that is not installed: {_install(error)}.") from error
    raise UserError(f"{what} cannot be used ({without_secrets(first_line(error), url)}). Nothing was begun.") from error


def network_file_system(path: Path) -> str | None:
    """The kind of network file system that a path is on, where the system says so; None on a disk of this machine."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return None
    place = path.resolve()
    over = [(each, kind) for each, kind in mounts if place.is_relative_to(each.replace(r"\040", " "))]
    kind = max(over, key=lambda each: len(each[0]), default=("", ""))[1]
    return kind if kind.startswith(NETWORK) else None


def storage_errors() -> tuple[type[Exception], ...]:
    """What storages raise where they cannot be read or written just now."""
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    errors: list[type[Exception]] = [SQLAlchemyError, sqlite3.Error, optuna.exceptions.StorageInternalError, OSError]
    for module, name in (("grpc", "RpcError"), ("redis", "RedisError")):
        errors += _known_error(module, name)
    return tuple(errors)


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind; at most 200 characters."""
    return (str(error) or type(error).__name__).strip().splitlines()[0][:200]


def _known_error(module: str, name: str) -> list[type[Exception]]:
    return [vars(sys.modules[module])[name]] if module in sys.modules and name in vars(sys.modules[module]) else []


def _with_driver(url: str) -> str:
    """A URL of PostgreSQL that names no driver, with psycopg2 where that one is installed and SQLAlchemy's choice is not."""
    rest = url.removeprefix("postgresql://")
    return f"postgresql+psycopg2://{rest}" if rest != url and not find_spec("psycopg") and find_spec("psycopg2") else url


def _engine(url: str) -> dict[str, Any]:
    """How SQLAlchemy opens a database: it waits, but not for ever, and finds out when a connection was cut."""
    if url.startswith("sqlite:"):
        return {"connect_args": {"timeout": WAIT_SECONDS}}
    timed = url.startswith(("postgresql", "mysql", "mariadb"))
    return {"pool_pre_ping": True, **({"connect_args": {"connect_timeout": int(ANSWER_SECONDS / 2)}} if timed else {})}


def _journal(url: str) -> str:
    path = unquote(url.removeprefix(url.partition("://")[0] + "://"))
    if not path.startswith("/"):
        raise UserError(f"--storage {url!r}: a journal is a file named from the root, as in journal:///share/study.log.")
    if not Path(path).parent.is_dir():
        raise UserError(f"--storage {url!r}: the directory {Path(path).parent} does not exist.")
    return path


def _proxy(url: str) -> optuna.storages.BaseStorage:
    import optuna

    if find_spec("grpc") is None:  # Optuna would say so only later
        raise ImportError("grpc", name="grpc")
    parts = urlsplit(url)
    found = optuna.storages.GrpcStorageProxy(host=parts.hostname or "localhost", port=parts.port or 13000)
    found.wait_server_ready(timeout=ANSWER_SECONDS / 2)
    return found


def _install(error: ImportError) -> str:
    """The command that installs what an ImportError misses."""
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, ImportError) and cause.name):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, ImportError) and cause.name:
        return f"pip install {PACKAGES.get(cause.name, cause.name)}"
    return first_line(error)
