"""Prompts from a server that speaks OpenAI's HTTP dialect (vLLM, llama.cpp, Ollama and others do)."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from mole_kernels.errors import MoleStateError, MoleValueError, printable
from mole_kernels.methods.selma.deadline import Deadline, silent_transport, watched_session
from mole_kernels.methods.selma.generators import UnusableAnswer, without_last_line

if TYPE_CHECKING:
    from requests import PreparedRequest, Response

MAX_BYTES = 4 << 20
# worth another attempt: time-out, conflict, too early, too many requests, and every error of the server (5xx)
_PASSING = {408, 409, 425, 429}
# a shorter key is a placeholder such as "x", which would be found in every other word of an answer
_SHORTEST_SECRET = 4


class EndpointText:
    """A `TextGenerator` that sends POST {url}/chat/completions, or {url}/completions.

    Redirects are not followed: a key is for the server it was given for. An answer that repeats the key is
    cleaned before anything is read from it, so that the key reaches no message, log or saved file.

    Args:
        url: Address up to and with the version, as in ``http://127.0.0.1:8000/v1``; no login and no query.
        model: The model's name, as the server knows it.
        key: Sent as a bearer token, never written down.
        kind: ``"chat"`` for chat completions, ``"completion"`` for plain ones.
        temperature: Sampling temperature.
        max_tokens: Longest answer in tokens.
        timeout: Seconds for one answer in all, from the first byte sent to the last byte received.

    Raises:
        MoleValueError: For an address, key, kind or timeout of another form.
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
        _check_url(url)
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
        """The server's answer to `request`; see `TextGenerator.write`.

        Raises:
            UnusableAnswer: No answer in time, a broken connection, 408, 409, 425, 429, 5xx, or no text.
            MoleStateError: Any other status: another attempt would not help.
        """
        settings: dict[str, Any] = {
            "model": self.model,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "seed": seed,
        }
        chat = self.kind == "chat"
        prompt = {"messages": [{"role": "user", "content": request}]} if chat else {"prompt": request}
        path = "chat/completions" if chat else "completions"
        return self._text_of(self._post(f"{self.url}/{path}", settings | prompt))

    def _post(self, url: str, body: dict[str, Any]) -> bytes:
        import requests

        where, began = f"endpoint {self.url}", False
        with Deadline(self.timeout) as deadline, watched_session(deadline) as session, silent_transport():
            try:
                with session.post(
                    url,
                    json=body,
                    auth=self._sign,
                    timeout=(min(10.0, self.timeout), self.timeout),
                    stream=True,
                    allow_redirects=False,
                ) as response:
                    # headers that the deadline cut off may look like whole ones
                    began = not deadline.passed
                    content = self._read(response)
                    if not deadline.passed:
                        self._check(response, content)
                        return content
                problem = ""
            # a broken status line or header stands in the message of the exception, and may repeat the key
            except (requests.RequestException, OSError, _transport_error()) as error:
                problem = _problem(error)
        if deadline.passed and began:
            problem = f"had not finished its answer after {self.timeout:g} s"
        elif deadline.passed:
            problem = "did not answer in time"
        raise UnusableAnswer(where, problem)

    def _sign(self, request: PreparedRequest) -> PreparedRequest:
        """Put the key into the request, as `auth`: else requests takes the login of a .netrc for the host."""
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _read(self, response: Response) -> bytes:
        """The body, at most `MAX_BYTES`."""
        content = b""
        while chunk := response.raw.read1(1 << 16, decode_content=True):
            content += chunk
            if len(content) > MAX_BYTES:
                raise UnusableAnswer(f"endpoint {self.url}", f"answered with more than {MAX_BYTES >> 20} MB")
        return content

    def _without_key(self, text: str) -> str:
        """The text with the key blotted out, before any of it is cut off, shown or kept."""
        if self._key and len(self._key) >= _SHORTEST_SECRET:
            return text.replace(self._key, "<key>")
        return text

    def _excerpt(self, content: bytes) -> str:
        return printable(self._without_key(content.decode("utf-8", "replace"))[:200], 200)

    def _check(self, response: Response, content: bytes) -> None:
        status = response.status_code
        if status == 200:
            return
        reason = printable(self._without_key(response.reason or ""), 60)
        problem = f"answered {status} {reason}: {self._excerpt(content)}"
        if status in _PASSING or status >= 500:
            error = UnusableAnswer(f"endpoint {self.url}", problem)
            error.wait = _seconds(response.headers.get("Retry-After"))
            raise error
        hint = (
            "the address must end in the version, as in http://127.0.0.1:8000/v1"
            if status == 404
            else "look at the model's name and the key"
        )
        raise MoleStateError(f"endpoint {self.url}", problem, hint=hint)

    def _text_of(self, content: bytes) -> str:
        try:
            choice = json.loads(content)["choices"][0]
            text = choice["message"]["content"] if self.kind == "chat" else choice["text"]
            cut = choice.get("finish_reason") == "length"
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            text, cut = None, False
        if not isinstance(text, str) or not text.strip():
            raise UnusableAnswer(
                f"endpoint {self.url}",
                expected="JSON with choices[0] and a text in it",
                got=self._excerpt(content) or "nothing",
            )
        # after JSON's escapes are undone, under which a key would not be recognised
        text = self._without_key(text)
        return without_last_line(text) if cut else text


def _transport_error() -> type[Exception]:
    """What urllib3 raises while a body is read, which requests does not turn into its own exceptions."""
    import urllib3

    return urllib3.exceptions.HTTPError


def _problem(error: Exception) -> str:
    import requests

    slow = isinstance(error, requests.Timeout) or "timed out" in str(error)
    return "did not answer in time" if slow else f"could not be reached or broke off ({type(error).__name__})"


def _seconds(retry_after: str | None) -> float:
    """What a Retry-After header asks for, at most two minutes; a date counts as 0."""
    try:
        seconds = float(retry_after or 0)
    except ValueError:
        return 0.0
    return min(120.0, max(0.0, seconds)) if math.isfinite(seconds) else 0.0


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        # raises ValueError for a port that is no number
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        extra = "@" in url or bool(parts.query or parts.fragment)
    except ValueError:
        usable, extra = False, True
    if not usable or extra:
        # a login or a query may be a key, and an address is shown and saved with every request
        raise MoleValueError(
            "EndpointText: url",
            expected="http(s)://host[:port]/v1",
            got="something with a login, a query or a port that is no number" if extra else printable(url),
            hint="a key belongs in key=, not in the address",
        )
