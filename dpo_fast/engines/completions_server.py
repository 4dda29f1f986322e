"""A server of OpenAI-compatible completions: JSON to it and back, with retries and time limits."""

import email.utils
import http.client
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from dpo_fast.errors import EngineOutputError, UsageError
from dpo_fast.text import one_line

FIRST_PAUSE = 0.5  # seconds before the first retry; doubled each time
RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
# What llama-cpp-python answers, as a 500, to what it will never take.
NEVER = "valid string|string_type|logits_all"


class CompletionsServer:
    """JSON to a server and back: retries, time limits, and the key, which it keeps to itself.

    Attributes:
        url: that everything is sent to.
        name: the model and where it is served.
        stopped: set, no further try is made.
    """

    def __init__(self, url: str, model: str, *, api_key_variable: str, timeout_seconds: float, retries: int) -> None:
        self.url = _completions_url(url)
        self.name = f"{model} at {urlsplit(self.url).netloc}"
        self.stopped = threading.Event()
        self._model = model
        self._api_key_variable = api_key_variable
        self._api_key = os.environ.get(api_key_variable, "").strip()
        if self._api_key and not re.fullmatch("[!-~]+", self._api_key):
            raise UsageError(f"{api_key_variable} holds blanks or other characters that no API key has: copy it again")
        self._timeout_seconds = timeout_seconds
        self._retries = retries
        self._opener = urllib.request.build_opener(_NoRedirects)

    def post(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request, again where that may help, and read its JSON.

        Raises:
            UsageError: refused.
            EngineOutputError: failed at every try, out of reach, or no JSON.
        """
        headers = {"Content-Type": "application/json", "User-Agent": "dpo_fast"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        body = json.dumps(request).encode()
        for attempt in range(self._retries + 1):
            pause = min(FIRST_PAUSE * 2**attempt, self._timeout_seconds)
            # `from None`: what lies below may hold the key.
            try:
                content = self._send(urllib.request.Request(self.url, body, headers))  # noqa: S310  http, https
                break
            except urllib.error.HTTPError as error:
                reason = self._reason(error)
                if error.code not in RETRIED or re.search(NEVER, reason):
                    raise self._refused(error.code, reason) from None
                problem = f"answers {error.code} ({reason})"
                pause = _retry_after(error.headers.get("Retry-After"), pause)
            except TimeoutError:
                problem = f"takes longer than {self._timeout_seconds:g} s"
            except (OSError, http.client.HTTPException) as error:
                problem = f"cannot be reached, or breaks off ({self._hidden(error)})"
            if pause > self._timeout_seconds:
                raise EngineOutputError(f"{self.name} {problem} and asks for a pause of {pause:.0f} s: try again later")
            if attempt < self._retries and self.stopped.wait(pause):
                break
        else:
            raise EngineOutputError(
                f"{self.name} {problem}, at {self._retries + 1} tries: see its log, and whether --endpoint is right"
            )
        if self.stopped.is_set():
            raise EngineOutputError(f"{self.name}: given up, as another request failed")
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise EngineOutputError(f"{self.name} answers with something else than a JSON object: is {self.url} right?")
        return answer

    def _send(self, request: urllib.request.Request) -> bytes:
        """One try, whole, within the timeout: a server that dribbles is not waited for."""
        deadline = time.monotonic() + self._timeout_seconds
        content = bytearray()
        try:
            with self._opener.open(request, timeout=self._timeout_seconds) as response:
                while chunk := response.read1(1 << 16):
                    content += chunk
                    if time.monotonic() > deadline:
                        raise TimeoutError
                if response.length:  # read1 does not tell a cut connection
                    raise http.client.IncompleteRead(b"", response.length)
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError as error:
            raise (error.reason if isinstance(error.reason, OSError) else error) from None
        return bytes(content)

    def _reason(self, error: urllib.error.HTTPError) -> str:
        """What the body of a refusal says, in one line."""
        try:
            body = error.read(4000).decode(errors="replace")
        except (OSError, http.client.HTTPException):
            body = ""
        try:
            parsed = json.loads(body)
            nested = parsed.get("error", parsed)
            body = str(nested.get("message", nested) if isinstance(nested, dict) else nested)
        except (ValueError, AttributeError, RecursionError):
            pass
        return self._hidden(body or error.reason)

    def _hidden(self, text: object) -> str:
        """A server's or a library's own words in one line, the API key taken out."""
        return one_line(str(text).replace(self._api_key, "***") if self._api_key else text, 300)

    def _refused(self, status: int, reason: str) -> UsageError:
        """The error of a request that will not be answered however often it is sent."""
        way_out = f"check --endpoint and --model {self._model!r}"
        if status in (401, 403):
            has = "the key in" if self._api_key else "set"
            way_out = f"{has} {self._api_key_variable}" + (" is not accepted" if self._api_key else " to an API key")
        elif 300 <= status < 400:
            way_out = "give the URL that it redirects to"
        elif re.search("valid string|string_type", reason):
            way_out = "it takes text alone, as llama-cpp-python does, and no token ids: serve the model with vLLM"
        elif "logits_all" in reason:
            way_out = "start llama-cpp-python with --logits_all true"
        elif re.search(r"max.?logprobs|logprobs? .*(max|greater|allowed)", reason, re.IGNORECASE):
            way_out = "start vLLM with --max-logprobs 2 or more"
        elif re.search(r"context|too long|max_model_len|maximum.*tokens", reason, re.IGNORECASE):
            way_out = "lower --max-length, or start the server with a longer context"
        return UsageError(f"{self.name} refuses the request: {status}, {reason}; {way_out}")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refuse redirects: they would take the API key to another host."""

    def redirect_request(self, *arguments: Any, **named: Any) -> None:
        """Nowhere."""
        return


def _completions_url(url: str) -> str:
    """The URL of a server's completions.

    Raises:
        UsageError: it is no plain HTTP URL; a password in it is not repeated.
    """
    try:
        parts = urlsplit(url.strip())
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable:
        raise UsageError(f"--endpoint {url.rpartition('@')[2]!r} is no URL such as http://127.0.0.1:8000/v1")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UsageError(
            "--endpoint has a user name, a query or a fragment: give the plain URL, and the key by variable"
        )
    path = parts.path.rstrip("/")
    if not path.endswith("/completions"):
        path += "/completions" if path.endswith("/v1") else "/v1/completions"
    return f"{parts.scheme}://{parts.netloc}{path}"


def _retry_after(value: str | None, default: float) -> float:
    """Seconds that a Retry-After header asks for, as a number or as a date."""
    if value is None:
        return default
    try:
        seconds = (
            float(value)
            if re.fullmatch(r"\d+", value.strip())
            else (email.utils.parsedate_to_datetime(value).timestamp() - time.time())
        )
    except ValueError:
        return default
    return max(seconds, 0.0)
