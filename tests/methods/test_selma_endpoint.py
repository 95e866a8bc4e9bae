"""Stage 1 through HTTP: a real server on loopback that answers rightly, late, wrongly, or not at all."""

import json
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mole_kernels.errors import MoleStateError, MoleValueError
from mole_kernels.methods.selma.endpoint import EndpointText
from mole_kernels.methods.selma.generators import UnusableAnswer
from mole_kernels.methods.selma.project import Project, read_lines
from mole_kernels.methods.selma.prompts import PromptSettings, write_prompts
from mole_kernels.methods.selma.skills import Skill

SKILL = Skill("colours", ("a red ball", "a blue cup", "a green hat"))
SETTINGS = PromptSettings(count=6, more=3, attempts=3, wait=0.0)


class Server:
    """Answers the k-th POST with plan[k] (status, body, headers), or with three new prompts where the plan
    has nothing.
    """

    def __init__(self):
        self.plan, self.seen = {}, []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.seen.append((self.path, dict(self.headers), body))
                try:
                    outer.answer(self, len(outer.seen) - 1, body)
                except (BrokenPipeError, ConnectionResetError):
                    pass

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, handler, k, body):
        planned = self.plan.get(k)
        if callable(planned):
            return planned(handler)
        if planned is None:
            planned = (200, chat("\n".join(f"{4 + i}. word{k}x{i} only{k}x{i}" for i in range(3))), {})
        send(handler, *planned)


def send(handler, status, body, headers=()):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(data)), **dict(headers)}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(data)


def chat(text, finish="stop"):
    return {
        "choices": [
            {"message": {"role": "assistant", "content": text}, "finish_reason": finish, "text": text}
        ]
    }


@pytest.fixture
def server(monkeypatch, tmp_path):
    # neither a proxy nor a login of the machine that tests may come between
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login someone password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def test_a_chat_endpoint_writes_prompts(server, tmp_path):
    writer = EndpointText(server.url, "tiny", key="secret", temperature=0.7)
    found = write_prompts(Project(tmp_path / "run"), SKILL, writer, SETTINGS)
    assert len(found) == 6 and len(server.seen) == 2
    path, headers, body = server.seen[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert (body["model"], body["temperature"], [m["role"] for m in body["messages"]]) == (
        "tiny",
        0.7,
        ["user"],
    )
    assert "1. " in body["messages"][0]["content"] and server.seen[0][2]["seed"] != server.seen[1][2]["seed"]
    assert not any(b"secret" in p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file())


def test_a_completion_endpoint_and_an_answer_cut_off(server):
    server.plan[0] = (200, chat(" a cat\n5. a dog\n6. half a", "length"))
    assert EndpointText(server.url, "tiny", kind="completion").write("more", 0, 1) == " a cat\n5. a dog"
    path, headers, body = server.seen[0]
    assert path == "/v1/completions" and body["prompt"] == "more" and "Authorization" not in headers


def late(handler):
    time.sleep(2.0)


def trickling(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    for _ in range(20):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)


def hanging_up(handler):
    handler.connection.close()


def endless(handler):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(6):
        handler.wfile.write(b"x" * (1 << 20))


PASSING = {
    "late": (late, "did not answer in time"),
    "trickling": (trickling, "had not finished its answer"),
    "hanging up": (hanging_up, "broke off"),
    "endless": (endless, "more than 4 MB"),
    "overloaded": ((503, b"busy"), "answered 503"),
    "too many": ((429, b"", {"Retry-After": "3"}), "answered 429"),
    "not json": ((200, b"<html>hello"), r"expected JSON with choices\[0\]"),
    "nothing": ((200, b""), "got nothing"),
    "no choices": ((200, {"choices": []}), "choices"),
    "a list": ((200, [1]), "choices"),
    "null": ((200, {"choices": [{"message": {"content": None}}]}), "choices"),
    "not text": ((200, b"\xff\xfe\x00"), "choices"),
}


@pytest.mark.parametrize("plan, message", PASSING.values(), ids=PASSING)
def test_what_another_attempt_may_help_with(server, plan, message):
    server.plan[0] = plan
    slow = plan in (late, trickling)
    writer = EndpointText(server.url, "tiny", timeout=0.4 if slow else 60.0)
    with pytest.raises(UnusableAnswer, match=message) as caught:
        writer.write("more", 0, 1)
    assert caught.value.wait == (3.0 if message.endswith("429") else 0.0) and "\x00" not in str(caught.value)
    writer.timeout = 60.0
    assert "word1x0" in writer.write("more", 0, 2)


@pytest.mark.parametrize("status", [301, 400, 401, 404])
def test_what_no_attempt_helps_with_stops_at_once(server, tmp_path, status):
    server.plan[0] = (status, b"\x1b[2J wrong", {"Location": server.url})
    with pytest.raises(MoleStateError, match=f"answered {status}") as caught:
        write_prompts(Project(tmp_path), SKILL, EndpointText(server.url, "tiny"), SETTINGS)
    assert len(server.seen) == 1 and "\x1b" not in str(caught.value)


def test_progress_is_kept_when_the_endpoint_dies_and_comes_back(server, tmp_path):
    waits, project = [], Project(tmp_path)
    server.plan |= {1: (500, b""), 2: (429, b"", {"Retry-After": "5"}), 3: (200, chat("I would rather not."))}
    writer = EndpointText(server.url, "tiny")
    with pytest.raises(MoleStateError, match=r"request 2: no usable answer in 3 attempts.*no list"):
        write_prompts(project, SKILL, writer, replace(SETTINGS, wait=0.5), sleep=waits.append)
    assert waits == [0.5, 5.0] and len(read_lines(tmp_path / "colours/requests.jsonl")) == 1
    found = write_prompts(project, SKILL, writer, SETTINGS)
    assert len(found) == len(set(found)) == 6 and len(server.seen) == 5


def test_a_server_that_is_not_there():
    with pytest.raises(UnusableAnswer, match="could not be reached"):
        EndpointText("http://127.0.0.1:9/v1", "tiny", timeout=1.0).write("more", 0, 1)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://host/v1", "file:///etc", "http://me:pass@host/v1", "http://"]
)
def test_addresses_that_are_none(url):
    with pytest.raises(MoleValueError, match="url") as caught:
        EndpointText(url, "tiny")
    assert "pass" not in str(caught.value)
    with pytest.raises(MoleValueError, match="kind"):
        EndpointText("http://h/v1", "tiny", kind="other")
    with pytest.raises(MoleValueError, match="key") as caught:
        EndpointText("http://h/v1", "tiny", key="secret\n")
    assert "secret" not in str(caught.value)
    with pytest.raises(MoleValueError, match="timeout"):
        EndpointText("http://h/v1", "tiny", timeout=float("nan"))
