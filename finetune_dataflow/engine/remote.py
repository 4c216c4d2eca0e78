"""Files behind URLs, through fsspec: what a scheme needs installed, and which errors are not a fault of ours."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from finetune_dataflow.errors import UserError, nearest

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_PACKAGES = {  # the pip package that teaches fsspec a scheme, where it is not the one that cannot be imported
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "adl"), "adlfs"),
    **dict.fromkeys(("http", "https"), "aiohttp"),
    **dict.fromkeys(("ssh", "sftp"), "paramiko"),
    **dict.fromkeys(("oci", "ocilake"), "ocifs"),
    **dict.fromkeys(("tos", "tosfs"), "tosfs"),
    "box": "boxfs",
    "dropbox": "dropboxdrivefs",
    "gdrive": "gdrive_fsspec",
    "git": "pygit2",
    "hf": "huggingface_hub",
    "lakefs": "lakefs-spec",
    "oss": "ossfs",
    "root": "fsspec-xrootd",
    "smb": "smbprotocol",
    "wandb": "wandbfs",
    "webdav": "webdav4",
}


def scheme_of(location: str) -> str:
    """The scheme of a URL, of a chained one (`zip://…::s3://…`) the first."""
    return location.partition("://")[0]


def opened(location: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URL and the path in it."""
    from fsspec.core import url_to_fs

    filesystem, path = url_to_fs(location)
    return filesystem, str(path)


@contextmanager
def reading(location: str) -> Iterator[None]:
    """Turn what goes wrong while a URL is read into a UserError that says what to do."""
    scheme = scheme_of(location)
    try:
        yield
    except ImportError as error:
        package = _PACKAGES.get(scheme) or error.name or scheme
        raise UserError(
            f"{location}: {scheme}:// needs the package {package}, which is not installed: pip install {package}"
        ) from error
    except FileNotFoundError as error:
        raise UserError(f"{location} does not exist.") from error
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:  # fsspec's, for a URL it cannot make out
        raise _unreadable(location, error) from error
    except client_errors() as error:
        raise _unreadable(location, error) from error


def client_errors() -> tuple[type[Exception], ...]:
    """The errors of the network packages in use that are no OSError, so that a failed download is not a fault of ours."""
    bases = {
        "aiohttp": "ClientError",
        "azure.core.exceptions": "AzureError",
        "botocore.exceptions": "BotoCoreError",
        "google.auth.exceptions": "GoogleAuthError",
        "httpx": "HTTPError",
        "paramiko": "SSHException",
    }
    return tuple(vars(sys.modules[module])[name] for module, name in bases.items() if module in sys.modules)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type's name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _unreadable(location: str, error: Exception) -> UserError:
    from fsspec.registry import known_implementations

    scheme = scheme_of(location)
    hint = "" if scheme in known_implementations else nearest(scheme, known_implementations)
    return UserError(f"{location} cannot be read: {first_line(error)}.{hint}")
