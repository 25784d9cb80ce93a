from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from lightrft.rewards import RemoteReward, RewardError, RewardTimeoutError, build_reward

Answer = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]


class RewardServer(ThreadingHTTPServer):
    """A real HTTP server on localhost whose answers a test decides."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[dict[str, Any]] = []
        self.answer: Answer = lengths
        self.release = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/get_reward"


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        self.server.answer(self, body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def send(handler: BaseHTTPRequestHandler, content: bytes | Any, status: int = 200) -> None:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def lengths(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    send(handler, {"rewards": [len(response) for response in body["responses"]]})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[RewardServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = RewardServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()
    thread.join()


def ask(reward: RemoteReward) -> Any:
    return reward(["p", "q"], ["a", "bcd"], ["x", {"answer": 2}])


def test_a_batch_goes_out_as_json_and_rewards_come_back(server: RewardServer):
    assert ask(RemoteReward([server.url])).rewards == [1, 3]
    assert server.requests == [
        {"prompts": ["p", "q"], "responses": ["a", "bcd"], "labels": ["x", {"answer": 2}], "query": ["pa", "qbcd"]}
    ]


def test_metrics_come_along(server: RewardServer):
    server.answer = lambda handler, body: send(handler, {"rewards": [0, 1], "metrics": {"style": [0.5, 0.25]}})
    assert ask(RemoteReward([server.url])).metrics == {"style": [0.5, 0.25]}


def test_a_large_batch_is_split_and_keeps_its_order(server: RewardServer):
    reward = RemoteReward([server.url], max_request_bytes=600)
    prompts, responses = ["p"] * 40, ["r" * (n % 7 + 1) for n in range(40)]
    assert reward(prompts, responses, [None] * 40).rewards == [n % 7 + 1 for n in range(40)]
    assert len(server.requests) > 1
    assert max(len(json.dumps(request)) for request in server.requests) <= 600


def test_a_sample_larger_than_a_request_is_named(server: RewardServer):
    with pytest.raises(RewardError, match=r"sample 1 .*a request may have 1000") as caught:
        RemoteReward([server.url], max_request_bytes=1000)(["p", "q"], ["a", "b" * 2000], [None, None])
    assert caught.value.sample == 1
    assert server.requests == []


def test_an_answer_larger_than_allowed_is_not_read_to_its_end(server: RewardServer):
    server.answer = lambda handler, body: send(handler, b" " * 100_000)
    with pytest.raises(RewardError, match=r"more than 1000 bytes"):
        ask(RemoteReward([server.url], max_response_bytes=1000))


def test_a_failing_server_is_asked_again(server: RewardServer):
    def fails_first(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        send(handler, b"busy", 503) if len(server.requests) == 1 else lengths(handler, body)

    server.answer = fails_first
    assert ask(RemoteReward([server.url], retry_seconds=0.01)).rewards == [1, 3]
    assert len(server.requests) == 2


def test_another_server_takes_over_for_one_that_is_gone(server: RewardServer):
    gone = "http://127.0.0.1:9/get_reward"
    assert ask(RemoteReward([gone, server.url], retry_seconds=0.01)).rewards == [1, 3]


def test_servers_take_turns(server: RewardServer):
    reward = RemoteReward([server.url + "?a", server.url + "?b"])
    paths: list[str] = []

    def remember(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        paths.append(handler.path)
        lengths(handler, body)

    server.answer = remember
    ask(reward), ask(reward)
    assert paths == ["/get_reward?a", "/get_reward?b"]


def test_a_refusal_is_not_repeated(server: RewardServer):
    server.answer = lambda handler, body: send(handler, b"no such key", 400)
    with pytest.raises(RewardError, match=r"HTTP 400: b'no such key'"):
        ask(RemoteReward([server.url]))
    assert len(server.requests) == 1


def test_a_silent_server_is_left_at_the_deadline(server: RewardServer):
    server.answer = lambda handler, body: server.release.wait(60)  # type: ignore[assignment,return-value]
    with pytest.raises(
        RewardTimeoutError, match=r"no reward within 0\.3 s for samples 0 to 1 \(prompt 'p'\).*--reward_timeout"
    ):
        ask(RemoteReward([server.url], timeout=0.3))


def test_a_server_that_trickles_is_left_at_the_deadline(server: RewardServer):
    def trickle(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        handler.send_response(200)
        handler.end_headers()
        while not server.release.wait(0.02):
            try:
                handler.wfile.write(b" ")
            except OSError:
                return

    server.answer = trickle
    start = time.monotonic()
    with pytest.raises(RewardTimeoutError):
        ask(RemoteReward([server.url], timeout=0.5))
    assert time.monotonic() - start < 30  # a bound against hanging, not a measurement


def test_no_server_at_all_names_the_address():
    with pytest.raises(RewardTimeoutError, match=r"http://127\.0\.0\.1:9/.*ConnectError"):
        ask(RemoteReward(["http://127.0.0.1:9/"], timeout=0.3, retry_seconds=0.05))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>", "did not answer with JSON"),
        (b"[1, 2]", "expected"),
        (b'{"score": [1, 2]}', "expected"),
        (b'{"rewards": [1]}', "1 rewards for 2 responses"),
        (b'{"rewards": [1, 2], "metrics": {"style": [1]}}', "2 numbers each"),
    ],
)
def test_a_wrong_answer_is_an_error(server: RewardServer, content: bytes, message: str):
    server.answer = lambda handler, body: send(handler, content)
    with pytest.raises(RewardError, match=message):
        ask(RemoteReward([server.url]))


def test_a_nan_from_the_server_names_the_sample(server: RewardServer):
    server.answer = lambda handler, body: send(handler, b'{"rewards": [1, NaN]}')
    with pytest.raises(RewardError, match=r"reward remote returned nan for sample 1"):
        build_reward(remote_urls=server.url)(["p", "q"], ["a", "b"], [None, None])


def test_a_label_that_json_cannot_express_is_named(server: RewardServer):
    with pytest.raises(RewardError, match=r"sample 1 .*cannot be sent as JSON"):
        RemoteReward([server.url])(["p", "q"], ["a", "b"], ["x", object()])


def test_rules_and_a_server_add_up(server: RewardServer):
    output = build_reward("exact_match", remote_urls=[server.url])(["p"], ["abc"], ["abc"])
    assert output.rewards == [1.0 + 3.0]


@pytest.mark.parametrize("url", ["rewards.py", "/srv/rewards.py", "file:///srv/rewards.py"])
def test_a_python_file_is_never_run(url: str):
    with pytest.raises(RewardError, match=r"code is never run from a URL.*--reward module:function"):
        RemoteReward([url])


@pytest.mark.parametrize("url", ["localhost:5000", "ftp://host/x", "http://", ""])
def test_an_address_that_is_none_is_refused(url: str):
    with pytest.raises(RewardError, match=r"give the whole address"):
        RemoteReward([url])
