"""Places that fsspec has a URL for (s3://, hf://, https://, …): how they are opened, and what is tried again there."""

import errno
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from dpo_fast.errors import MissingDependencyError, UsageError
from dpo_fast.text import said_by

ATTEMPTS = 5
FIRST_WAIT = 0.2  # seconds; each further one is twice as long
TRANSIENT_ERRNOS = {
    getattr(errno, name)
    for name in ("EIO", "ESTALE", "EAGAIN", "EBUSY", "ETIMEDOUT", "ECONNRESET", "EPIPE", "EREMOTEIO")
    if hasattr(errno, name)  # Linux alone has the last
}
TRANSIENT_STATUSES = {408, 429}  # of HTTP, beside 500 and above
# Known by name, for the packages are loaded by fsspec alone, and only where they are needed.
TRANSIENT_CLASSES = {
    "aiohttp.client_exceptions.ClientConnectionError",
    "aiohttp.client_exceptions.ClientPayloadError",
    "botocore.exceptions.ConnectionError",
    "botocore.exceptions.HTTPClientError",
    "botocore.exceptions.IncompleteReadError",
    "httpcore.NetworkError",
    "httpcore.ProtocolError",
    "httpcore.TimeoutException",
    "httpx.TransportError",
    "httpx2.TransportError",
    "requests.exceptions.ChunkedEncodingError",
    "requests.exceptions.ConnectionError",
    "requests.exceptions.Timeout",
    "urllib3.exceptions.IncompleteRead",
    "urllib3.exceptions.ProtocolError",
    "urllib3.exceptions.TimeoutError",
}
PACKAGES = {"s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3")}  # by protocol: what is needed, and our extra that has it

Result = TypeVar("Result")


def open_url(url: str, **options: Any) -> tuple[Any, str]:
    """The fsspec file system of a URL, and what the URL is called there.

    fsspec keeps one connection a process, or a thread where a connection serves one thread alone; a forked process gets
    its own.

    Args:
        url: without secrets, for it is shown.
        options: of the file system.

    Raises:
        MissingDependencyError: an extra is not installed.
        UsageError: fsspec knows no such protocol, or needs a package that no extra has.
    """
    import fsspec

    protocol = url.partition("://")[0]
    if protocol == "hf":
        from datasets import config

        options["endpoint"] = config.HF_ENDPOINT
    try:
        filesystem, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        if protocol in PACKAGES:
            raise MissingDependencyError(*PACKAGES[protocol], url) from error
        raise UsageError(f"{url}: needs a package that is not there ({said_by(error)})") from error
    except ValueError as error:
        raise UsageError(f"{url}: is no URL that fsspec knows ({said_by(error)}); say s3://…") from error
    return filesystem, path


def retrying(action: Callable[[], Result]) -> Result:
    """What an action returns; tried `ATTEMPTS` times in all as long as its error `may_pass`.

    The waits in between are `FIRST_WAIT` seconds, then twice as long each time, give or take a half, so that many
    workers that were refused together do not come back together.
    """
    for number in range(ATTEMPTS - 1):
        try:
            return action()
        except Exception as error:
            if not may_pass(error):
                raise
        time.sleep(FIRST_WAIT * 2**number * random.uniform(0.5, 1.5))  # noqa: S311
    return action()


def may_pass(error: Exception) -> bool:
    """Whether the same may go well a moment later: a lost connection, a busy server, a network disk's hiccup."""
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    status = _http_status(error)
    if status is not None:
        return status >= 500 or status in TRANSIENT_STATUSES
    if isinstance(error, OSError) and error.errno in TRANSIENT_ERRNOS:
        return True
    return any(f"{each.__module__}.{each.__name__}" in TRANSIENT_CLASSES for each in type(error).__mro__)


def _http_status(error: BaseException) -> int | None:
    """What the server answered, as botocore, aiohttp, gcsfs or azure have it, here or in the error behind this one."""
    for each in (error, error.__cause__):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            answered: int | None = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return answered
        for source in (each, response):
            for name in ("status", "status_code", "code"):
                if isinstance(status := getattr(source, name, None), int):
                    return status
    return None
