"""A server that drips bytes, or repeats the key: a raw socket on loopback that sends what each test says."""

import json
import logging
import socket
import threading
import traceback

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mole_kernels.errors import MoleError, MoleValueError
from mole_kernels.methods.selma.endpoint import EndpointText
from mole_kernels.methods.selma.generators import UnusableAnswer
from mole_kernels.methods.selma.project import Project
from mole_kernels.methods.selma.prompts import PromptSettings, write_prompts
from mole_kernels.methods.selma.skills import Skill

KEY = "sk-Aq7/Zw+93xyz"


class RawServer:
    """Sends `head` at once, then `drip` byte by byte, `pause` seconds apart, until the client hangs up."""

    def __init__(self):
        self.head, self.drip, self.pause, self.dripped = b"", b"", 0.02, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.stop = threading.Event()
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1"
        self.served = threading.Semaphore(0)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while not self.stop.is_set():
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection:
                count = 0
                try:
                    _read_request(connection)
                    connection.sendall(self.head)
                    for byte in self.drip:
                        if self.stop.wait(self.pause):
                            break
                        connection.sendall(bytes([byte]))
                        count += 1
                except OSError:
                    pass
            self.dripped.append(count)
            self.served.release()

    def close(self):
        self.stop.set()
        self.listener.close()


def _read_request(connection):
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(1 << 16)
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
    while len(body) < length:
        body += connection.recv(1 << 16)


@pytest.fixture
def raw(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = RawServer()
    yield server
    server.close()


def answered(body, status=b"200 OK", headers=b""):
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n%s\r\n%s" % (status, len(body), headers, body)


OK = b"HTTP/1.1 200 OK\r\n"
DRIPS = {
    "status line": (b"", b"HTTP/1.1 200 O" + b"K" * 400, "did not answer in time"),
    "header": (OK + b"X-Name: ", b"x" * 400, "did not answer in time"),
    "many headers": (OK, b"A: b\r\n" * 80, "did not answer in time"),
    "body of a length": (OK + b"Content-Length: 400\r\n\r\n", b" " * 400, "had not finished"),
    "body to the end": (OK + b"Connection: close\r\n\r\n", b" " * 400, "had not finished"),
    "chunks": (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n" * 80, "had not finished"),
    "chunk size": (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"0" * 400, "had not finished"),
    "refusal": (b"HTTP/1.1 401 No\r\nContent-Length: 400\r\n\r\n", b" " * 400, "had not finished"),
}


@pytest.mark.parametrize("name", DRIPS)
def test_a_dripping_server_is_left_at_the_deadline(raw, name):
    raw.head, raw.drip, message = DRIPS[name]
    with pytest.raises(UnusableAnswer, match=message):
        EndpointText(raw.url, "tiny", timeout=0.3).write("more", 0, 1)
    # the connection was ended while the server still had most to send: no thread waits for the rest
    assert raw.served.acquire(timeout=60) and raw.dripped[0] < len(raw.drip) // 2


def test_an_answer_that_drips_but_ends_in_time_is_taken(raw):
    body = json.dumps({"choices": [{"message": {"content": "4. a cat"}}]}).encode()
    raw.head, raw.drip, raw.pause = OK + b"Content-Length: %d\r\n\r\n" % len(body), body, 0.001
    assert EndpointText(raw.url, "tiny", timeout=60.0).write("more", 0, 1) == "4. a cat"


def escaped(text):
    return "".join(f"\\u{ord(c):04x}" for c in text)


ECHOES = {
    "reason": lambda pad: answered(b"", b"401 " + pad + KEY.encode()),
    "refusal": lambda pad: answered(pad + KEY.encode() + pad, b"401 No"),
    "busy": lambda pad: answered(pad + KEY.encode() + pad, b"503 Busy"),
    "no json": lambda pad: answered(pad + KEY.encode()),
    "status line": lambda pad: pad + KEY.encode() + b"\r\n\r\n",
    "header": lambda pad: OK + b"X-" + pad + KEY.encode() + b" no colon\r\nContent-Length: 2\r\n\r\n{}",
    "header only": lambda pad: OK + b"\x00" + KEY.encode() + b"\r\n\r\n",
    "length": lambda pad: OK + b"Content-Length: " + KEY.encode() + b"\r\n\r\n",
    "chunk": lambda pad: OK + b"Transfer-Encoding: chunked\r\n\r\n" + KEY.encode() + b"\r\n",
}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(sorted(ECHOES)), before=st.integers(0, 230))
def test_a_key_that_is_echoed_stays_out_of_messages_tracebacks_and_logs(raw, caplog, kind, before):
    raw.head, raw.drip = ECHOES[kind](b"p" * before), b""
    caplog.set_level(logging.DEBUG)
    with pytest.raises(MoleError) as caught:
        EndpointText(raw.url, "tiny", key=KEY, timeout=60.0).write("more", 0, 1)
    shown = "".join(traceback.format_exception(caught.value)) + caplog.text
    # nor the beginning of one that was cut off
    assert KEY not in shown and KEY[:6] not in shown


@pytest.mark.parametrize("spelling", [json.dumps(KEY)[1:-1], KEY.replace("/", "\\/"), escaped(KEY)])
def test_a_key_in_an_answer_reaches_no_file(raw, tmp_path, spelling):
    text = "\\n".join(f"{4 + i}. word{i} only{i} {spelling}" for i in range(3))
    raw.head = answered(b'{"choices": [{"message": {"content": "%s"}}]}' % text.encode())
    skill = Skill("colours", ("a red ball", "a blue cup", "a green hat"))
    writer = EndpointText(raw.url, "tiny", key=KEY, timeout=60.0)
    prompts = write_prompts(Project(tmp_path), skill, writer, PromptSettings(count=3, more=3))
    assert prompts == [f"word{i} only{i} <key>" for i in range(3)]
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "url", [f"http://h/v1?key={KEY}", f"http://h/v1#{KEY}", f"http://{KEY}@h/v1", f"http://h:{KEY}/v1"]
)
def test_an_address_with_a_key_in_it_is_refused_without_showing_it(url):
    with pytest.raises(MoleValueError, match="a key belongs in key=") as caught:
        EndpointText(url, "tiny")
    assert KEY not in str(caught.value) and KEY[:6] not in str(caught.value)
