"""One call of an OpenAI-compatible endpoint, by the standard library alone, and every way in which it can fail."""

from __future__ import annotations

import email.utils
import http.client
import json
import math
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias
from urllib.parse import urlsplit

from rewardgen.errors import ConfigError

Kind: TypeAlias = Literal["rate_limited", "timeout", "server_error", "connection", "nonsense", "refused"]
KINDS: tuple[Kind, ...] = ("rate_limited", "timeout", "server_error", "connection", "nonsense", "refused")
_MAX_REPLY_BYTES = 8 << 20
_LARGEST_LOGPROB = 1e5
"""Services write -9999 or the like for what is as good as impossible; what is beyond this is no number to read."""


class CallError(Exception):
    """A call that brought no answer.

    Args:
        kind: `rate_limited` 429; `timeout`; `server_error` 5xx; `connection` refused, cut or not found; `nonsense` a
            reply that cannot be understood; `refused` any other status: the same call would be refused again.
        message: one line, without secrets.
        status: the HTTP status, None where there was no reply.
        retry_after_s: how long the server asks to wait, None where it does not say.
    """

    def __init__(
        self, kind: Kind, message: str, *, status: int | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.kind: Kind = kind
        self.status = status
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """The text of a reply, and the candidates for its first word with their log-probabilities where the server says."""

    text: str
    candidates: tuple[tuple[str, float], ...] | None


def check_url(url: str) -> str:
    """A base URL such as `http://host:8000/v1`, without its last slash.

    Raises:
        ConfigError: it is none, or carries a secret: a password, or a query.
    """
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError("urls: write the base URL alone; a key goes into the environment variable named by key_env")
    try:
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        fine = False
    if not fine or not url.isprintable() or " " in url:
        raise ConfigError(f"urls: '{url}' is no base URL; write one such as http://localhost:8000/v1")
    return url.rstrip("/").removesuffix("/chat/completions")


def read_key(key_env: str | None) -> str | None:
    """The key from the environment variable of that name.

    Raises:
        ConfigError: no such variable, or a value that cannot be a key; never shows it.
    """
    if key_env is None:
        return None
    check_key_name(key_env)
    key = os.environ.get(key_env, "").strip()
    if not key:
        raise ConfigError(f"key_env: the environment variable {key_env} is not set; export it where the run starts")
    if not key.isascii() or not key.isprintable():
        raise ConfigError(f"key_env: the value of {key_env} is no key: it has characters that cannot be sent")
    return key


def check_key_name(key_env: str) -> None:
    """Raise ConfigError for what cannot be the name of an environment variable; never shows it."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", key_env):
        raise ConfigError("key_env: give the name of an environment variable that holds the key, never the key itself")


def call(url: str, body: bytes, *, key: str | None, timeout_s: float) -> Reply:
    """POST a chat completion and read its first choice.

    Args:
        url: base URL.
        body: the request as JSON.
        key: sent as bearer token.
        timeout_s: for the call as a whole.

    Raises:
        CallError: any failure.
    """
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(f"{url}/chat/completions", data=body, headers=headers, method="POST")
    deadline = time.monotonic() + timeout_s
    try:
        with _OPENER.open(request, timeout=timeout_s) as response:
            content = _read(response, deadline)
    except urllib.error.HTTPError as error:
        raise _status_error(error, deadline, key) from None
    except TimeoutError:
        raise CallError("timeout", f"no reply within {timeout_s:g} s") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise CallError("timeout", f"no reply within {timeout_s:g} s") from None
        raise CallError("connection", _clean(f"{type(reason).__name__}: {reason}", key)) from None
    try:
        return _parse(json.loads(content))
    except (ValueError, RecursionError, OverflowError):
        raise CallError("nonsense", "the reply is no JSON") from None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would send the key to whoever the server names."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _read(response: Any, deadline: float) -> bytes:
    """The body, bit by bit: a socket's timeout alone would let a server trickle for ever."""
    chunks, size = [], 0
    while chunk := response.read1(1 << 16):
        chunks.append(chunk)
        size += len(chunk)
        if time.monotonic() > deadline:
            raise TimeoutError
        if size > _MAX_REPLY_BYTES:
            raise CallError("nonsense", "the reply is far too long")
    if response.length:  # read1 does not notice that the connection was cut
        raise http.client.IncompleteRead(b"".join(chunks), response.length)
    return b"".join(chunks)


def _status_error(error: urllib.error.HTTPError, deadline: float, key: str | None) -> CallError:
    kind: Kind = "refused"
    if error.code == 429:
        kind = "rate_limited"
    elif error.code >= 500 or error.code in (408, 425):
        kind = "server_error"
    try:
        with error:
            said = _read(error.fp, deadline)[:2000].decode("utf-8", "replace") if kind == "refused" else ""
    except (OSError, http.client.HTTPException, CallError, AttributeError):
        said = ""
    message = _clean(f"HTTP {error.code} {said}".strip(), key)
    return CallError(kind, message, status=error.code, retry_after_s=_retry_after(error.headers))


def _retry_after(headers: Any) -> float | None:
    text = headers.get("Retry-After") if headers is not None else None
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _clean(text: str, key: str | None) -> str:
    """One short printable line. Servers like to repeat the key that they refuse."""
    if key:
        text = text.replace(key, "***")
    text = re.sub(r"(?i)(bearer\s+|sk-)[\w.~+/=-]+", r"\1***", text)
    return "".join(c if c.isprintable() else " " for c in text)[:300]


def _parse(content: Any) -> Reply:
    try:
        choice = content["choices"][0]
        text = choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise CallError("nonsense", "the reply has no choices[0].message.content") from None
    if not isinstance(text, str):
        raise CallError("nonsense", "the reply's content is no text")
    logprobs = choice.get("logprobs")
    tokens = logprobs.get("content") if isinstance(logprobs, dict) else None
    return Reply(text=text, candidates=_first_word(tokens) if isinstance(tokens, list) else None)


def _first_word(tokens: Sequence[Any]) -> tuple[tuple[str, float], ...] | None:
    """Candidates for the first token that is not blank. Some models begin a reply with a line break."""
    for token in tokens:
        if not isinstance(token, dict) or not isinstance(token.get("token"), str):
            return None
        if token["token"].strip():
            top = token.get("top_logprobs")
            entries = [token, *top] if isinstance(top, list) else [token]
            found: dict[str, float] = {}
            for entry in entries:
                name, value = (entry.get("token"), entry.get("logprob")) if isinstance(entry, dict) else (None, None)
                if isinstance(name, str) and isinstance(value, int | float) and abs(value) < _LARGEST_LOGPROB:
                    found.setdefault(name, float(value))
            return tuple(found.items()) or None
    return None
