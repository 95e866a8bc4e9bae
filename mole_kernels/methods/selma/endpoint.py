"""Prompts from a server that speaks OpenAI's HTTP dialect (vLLM, llama.cpp, Ollama and others do)."""

from __future__ import annotations

import json
import math
import time
from typing import Any, Literal
from urllib.parse import urlsplit

from mole_kernels.errors import MoleStateError, MoleValueError, printable
from mole_kernels.methods.selma.generators import UnusableAnswer, without_last_line

MAX_BYTES = 4 << 20
# worth another attempt: time-out, conflict, too early, too many requests, and whatever is the server's own
# fault
_PASSING = {408, 409, 425, 429}


class EndpointText:
    """POST {url}/chat/completions, or {url}/completions.

    url          up to and with the version, as in http://127.0.0.1:8000/v1
    key          sent as a bearer token, never written down
    timeout      seconds for one answer in all
    Redirects are not followed: a key is for the server it was given for.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        kind: Literal["chat", "completion"] = "chat",
        temperature: float = 1.0,
        max_tokens: int = 2048,
        timeout: float = 120.0,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
            hint = "a key belongs in key=, not in the address"
            raise MoleValueError(
                "EndpointText: url", expected="http(s)://host[:port]/v1", got=_without_login(url), hint=hint
            )
        if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
            raise MoleValueError(
                "EndpointText: key", expected="printable letters without a space", got="something else"
            )
        if kind not in ("chat", "completion"):
            raise MoleValueError("EndpointText: kind", expected="'chat' or 'completion'", got=repr(kind))
        if not (math.isfinite(timeout) and timeout > 0):
            raise MoleValueError("EndpointText: timeout", expected="seconds above 0", got=timeout)
        self.url, self.model, self.kind, self._key = url.rstrip("/"), model, kind, key
        self.temperature, self.max_tokens, self.timeout = temperature, max_tokens, timeout
        self.name = f"{kind} {model} at {self.url}"

    def write(self, request: str, number: int, seed: int) -> str:
        about: dict[str, Any] = {
            "model": self.model,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "seed": seed,
        }
        said = (
            {"messages": [{"role": "user", "content": request}]}
            if self.kind == "chat"
            else {"prompt": request}
        )
        return self._text_of(
            self._post(f"{self.url}/{'chat/' if self.kind == 'chat' else ''}completions", about | said)
        )

    def _post(self, url: str, body: dict[str, Any]) -> bytes:
        import requests

        until = time.monotonic() + self.timeout
        connect = min(10.0, self.timeout)
        try:
            with requests.post(
                url,
                json=body,
                auth=self._sign,
                timeout=(connect, self.timeout),
                stream=True,
                allow_redirects=False,
            ) as response:
                content = self._read(response, until)
                self._check(response, content)
                return content
        except requests.RequestException as error:
            raise UnusableAnswer(f"endpoint {self.url}", _reason(error)) from error

    def _sign(self, request: Any) -> Any:
        """The key into the request; given as auth, since requests would otherwise put in what a .netrc holds
        for the host.
        """
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _read(self, response: Any, until: float) -> bytes:
        """The body, within the time and size allowed: a server may send a byte now and then for ever."""
        import urllib3

        content = b""
        try:
            while part := response.raw.read1(1 << 16, decode_content=True):
                content += part
                if len(content) > MAX_BYTES:
                    raise UnusableAnswer(
                        f"endpoint {self.url}", f"answered with more than {MAX_BYTES >> 20} MB"
                    )
                if time.monotonic() > until:
                    raise UnusableAnswer(
                        f"endpoint {self.url}", f"had not finished its answer after {self.timeout:g} s"
                    )
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise UnusableAnswer(f"endpoint {self.url}", _reason(error)) from error
        return content

    def _check(self, response: Any, content: bytes) -> None:
        status = response.status_code
        if status == 200:
            return
        said = f"answered {status} {printable(response.reason or '', 60)}: {printable(content[:200].decode('utf-8', 'replace'), 200)}"
        if status in _PASSING or status >= 500:
            error = UnusableAnswer(f"endpoint {self.url}", said)
            error.wait = _seconds(response.headers.get("Retry-After"))
            raise error
        hint = (
            "the address must end in the version, as in http://127.0.0.1:8000/v1"
            if status == 404
            else "look at the model's name and the key"
        )
        raise MoleStateError(f"endpoint {self.url}", said, hint=hint)

    def _text_of(self, content: bytes) -> str:
        try:
            choice = json.loads(content)["choices"][0]
            text = choice["message"]["content"] if self.kind == "chat" else choice["text"]
            cut = choice.get("finish_reason") == "length"
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            text, cut = None, False
        if not isinstance(text, str) or not text.strip():
            got = printable(content[:200].decode("utf-8", "replace"), 200)
            raise UnusableAnswer(
                f"endpoint {self.url}", expected="JSON with choices[0] and a text in it", got=got or "nothing"
            )
        return without_last_line(text) if cut else text


def _reason(error: Exception) -> str:
    import requests

    slow = isinstance(error, requests.Timeout) or "timed out" in str(error)
    return "did not answer in time" if slow else f"could not be reached or broke off ({type(error).__name__})"


def _seconds(retry_after: str | None) -> float:
    """What a Retry-After header asks for, at most two minutes; dates count as no wish."""
    try:
        return min(120.0, max(0.0, float(retry_after or 0)))
    except ValueError:
        return 0.0


def _without_login(url: str) -> str:
    head, _, tail = url.rpartition("@")
    return printable(f"…@{tail}" if head else url)
