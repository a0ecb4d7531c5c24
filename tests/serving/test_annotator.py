"""Annotations by a model on a server that may fail."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from trl_opsd.context import make_context
from trl_opsd.serving import ServerError, client
from trl_opsd.serving.annotator import ServerAnnotator


class Chat:
    """A server that answers each question with its own text, or with what `faults` holds for the next ones."""

    def __init__(self):
        self.asked, self.faults, self.served = [], [], ["annotator", "other"]
        self.closed = threading.Event()
        chat = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer(200, {"data": [{"id": name} for name in chat.served]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                chat.asked.append(body)
                fault = chat.faults.pop(0) if chat.faults else None
                if fault == "stall":
                    chat.closed.wait()
                if isinstance(fault, tuple):
                    self.answer(*fault)
                else:
                    self.answer(200, {"choices": [{"message": {"content": body["messages"][-1]["content"]}}]})

            def answer(self, status, body):
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *args: None  # clients that gave up waiting
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def chat():
    chat = Chat()
    yield chat
    chat.closed.set()
    chat.http.shutdown()
    chat.http.server_close()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(client._Retries, "get_backoff_time", lambda self: 0.0)


def ask(annotator, *texts):
    return annotator([({}, None, [{"role": "user", "content": text}]) for text in texts])


def test_answers_are_in_order(chat):
    annotator = ServerAnnotator(chat.url + "/", concurrent=3, request={"seed": 1})
    annotator.check_run()
    texts = [f"Question {number}" for number in range(7)]
    assert ask(annotator, *texts) == texts
    for body in chat.asked:
        assert {name: value for name, value in body.items() if name != "messages"} == {
            "model": "annotator",
            "max_tokens": 512,
            "temperature": 0.0,
            "seed": 1,
        }


def test_an_answer_without_text_is_one_that_cannot_be_read(chat):
    annotator = ServerAnnotator(chat.url, "annotator")
    chat.faults = [(200, {"choices": [{"message": {"content": None}}]})]
    assert ask(annotator, "a") == [""]


def test_it_is_asked_again_where_it_was_busy_or_slow(chat):
    annotator = ServerAnnotator(chat.url, "annotator", timeout=3.0)  # in which a slow machine answers
    for fault in ((503, {}), "stall"):
        chat.faults = [fault]
        assert ask(annotator, "a") == ["a"]


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        (["stall"] * 2, "does not answer: .*timed out"),
        ([(400, {"error": "too long"})], "status 400: .*too long"),
        ([(200, {"choices": []})], "something else than a completion"),
    ],
    ids=["slow", "refuses", "no completion"],
)
def test_failure(chat, faults, message):
    annotator = ServerAnnotator(chat.url, "annotator", timeout=0.3 if "stall" in faults else 60.0)
    chat.faults = faults
    with pytest.raises(ServerError, match=f"The annotator at {chat.url} .*{message}"):
        ask(annotator, "a")


def test_it_is_missed_before_a_run(chat):
    with pytest.raises(ValueError, match=r"serves \['annotator', 'other'\], and not the annotator's `model='third'`"):
        ServerAnnotator(chat.url, "third").check_run()
    chat.served = []
    with pytest.raises(ValueError, match=r"serves \[\]"):
        ServerAnnotator(chat.url).check_run()
    context = make_context(
        "diagnosis", {"annotator": "server", "annotator_kwargs": {"base_url": "http://127.0.0.1:9"}}
    )
    with pytest.raises(ValueError, match=r"No annotator answers at http://127\.0\.0\.1:9"):
        context.check_run(8, has_rewards=True, has_feedback=True)


@pytest.mark.parametrize("wrong", [{"timeout": 0}, {"concurrent": 0}, {"max_new_tokens": 0}, {"temperature": -1.0}])
def test_numbers_out_of_range(wrong):
    with pytest.raises(ValueError, match="must be at least 1"):
        ServerAnnotator("http://127.0.0.1:9", **wrong)
