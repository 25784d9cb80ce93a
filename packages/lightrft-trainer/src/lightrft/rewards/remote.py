"""A reward server that speaks JSON over HTTP, with deadlines, retries and size limits.

Request (POST): ``{"prompts": [...], "responses": [...], "labels": [...], "query": [prompt + response, ...]}``.
Answer: ``{"rewards": [number, ...]}``, one for each response, optionally with ``"metrics": {"name": [number, ...]}``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx
import tenacity

from .protocol import RewardError, RewardOutput, RewardTimeoutError, excerpt

MAX_BYTES = 16 * 2**20
RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})


class _TryAgainError(Exception):
    """A failure that may pass: no connection, an overloaded or failing server."""


def check_url(url: str) -> str:
    """The URL without whitespace, if it is acceptable.

    :raises RewardError: not http or https, without a host, or a Python file.
    """
    url = url.strip()
    parts = urlsplit(url)
    if url.endswith(".py") and parts.scheme not in ("http", "https"):
        raise RewardError(
            f"--remote_rm_url {url}: this is a Python file, and code is never run from a URL; put its folder on "
            "the path and write --reward module:function"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RewardError(
            f"--remote_rm_url {url!r}: give the whole address, for example http://localhost:5000/get_reward"
        )
    return url


class RemoteReward:
    """A reward from one of several servers, which take batches in turn; after a failure the next is tried.

    :param urls: at least one http or https address.
    :param timeout: seconds for a whole batch, retries included.
    :param max_request_bytes: a larger batch is sent in several requests; one sample larger than this is an error.
    :param max_response_bytes: a longer answer is an error, and is not read completely.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        timeout: float = 60.0,
        max_request_bytes: int = MAX_BYTES,
        max_response_bytes: int = MAX_BYTES,
        retry_seconds: float = 0.5,
    ) -> None:
        self.urls = [check_url(url) for url in urls]
        if not self.urls:
            raise RewardError("a remote reward needs at least one URL")
        if not timeout > 0:
            raise RewardError(f"remote reward: timeout={timeout} must be positive (seconds)")
        self.timeout = timeout
        self.max_request_bytes = max_request_bytes
        self.max_response_bytes = max_response_bytes
        self.retry_seconds = retry_seconds
        self._turn = 0

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], labels: Sequence[Any], **extras: Any
    ) -> RewardOutput:
        """Rewards of one batch.

        :raises RewardTimeoutError: no server answered in time.
        :raises RewardError: a label that JSON cannot express, a sample or an answer that is too large, or a wrong
            answer.
        """
        deadline = time.monotonic() + self.timeout
        rewards: list[Any] = []
        metrics: dict[str, list[Any]] = {}
        for start, end, body in self._requests(prompts, responses, labels):
            answer = self._ask(body, deadline, what=f"samples {start} to {end - 1} (prompt {excerpt(prompts[start])})")
            part, part_metrics = self._read(answer, end - start)
            rewards += part
            if start and set(part_metrics) != set(metrics):
                raise RewardError(
                    f"the reward server gave metrics {sorted(part_metrics)} for samples {start} to {end - 1} "
                    f"and {sorted(metrics)} before; it must give the same for all"
                )
            for key, values in part_metrics.items():
                metrics.setdefault(key, []).extend(values)
        return RewardOutput(rewards=rewards, metrics=metrics)

    def _requests(
        self, prompts: Sequence[str], responses: Sequence[str], labels: Sequence[Any]
    ) -> list[tuple[int, int, bytes]]:
        """The batch as requests below the size limit: first sample, one past the last, body."""
        sizes = []
        for index, (prompt, response, label) in enumerate(zip(prompts, responses, labels, strict=True)):
            try:
                sample = json.dumps([prompt, response, label, prompt + response], allow_nan=False)
            except (TypeError, ValueError) as error:
                raise RewardError(
                    f"sample {index} (prompt {excerpt(prompt)}): its label {str(label)[:80]!r} cannot be sent "
                    f"as JSON: {error}",
                    sample=index,
                ) from error
            sizes.append(len(sample) + 16)
            if sizes[-1] + 128 > self.max_request_bytes:
                raise RewardError(
                    f"sample {index} (prompt {excerpt(prompt)}) takes {sizes[-1]} bytes as JSON; a request may have "
                    f"{self.max_request_bytes}",
                    sample=index,
                )
        requests, start, size = [], 0, 128
        for index, sample_size in enumerate([*sizes, self.max_request_bytes]):
            if size + sample_size > self.max_request_bytes and index > start:
                part = slice(start, index)
                body = {
                    "prompts": list(prompts[part]),
                    "responses": list(responses[part]),
                    "labels": list(labels[part]),
                    "query": [
                        prompt + response for prompt, response in zip(prompts[part], responses[part], strict=True)
                    ],
                }
                requests.append((start, index, json.dumps(body, allow_nan=False).encode()))
                start, size = index, 128
            size += sample_size
        return requests

    def _ask(self, body: bytes, deadline: float, *, what: str) -> Any:
        """One answer, from the first server that gives it before the deadline."""
        failures: list[str] = []

        def attempt() -> Any:
            url = self.urls[self._turn % len(self.urls)]
            self._turn += 1
            try:
                return self._post(url, body, deadline)
            except _TryAgainError as error:
                if not failures or time.monotonic() < deadline:  # the last answer says more than a late try
                    failures.append(f"{url}: {error}")
                raise

        wait = tenacity.wait_exponential(multiplier=self.retry_seconds, max=10.0) + tenacity.wait_random(
            0.0, self.retry_seconds
        )
        retry = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_TryAgainError),
            wait=wait,
            # There must be time for another wait and another try before the deadline.
            stop=lambda state: time.monotonic() + state.upcoming_sleep >= deadline,
            reraise=True,
        )
        try:
            return retry(attempt)
        except _TryAgainError:
            raise RewardTimeoutError(
                f"no reward within {self.timeout:g} s for {what}, after {len(failures)} tries; the last: "
                f"{failures[-1]}. Is the server of --remote_rm_url up? --reward_timeout gives it more time"
            ) from None

    def _post(self, url: str, body: bytes, deadline: float) -> Any:
        left = deadline - time.monotonic()
        if left <= 0:
            raise _TryAgainError("no time left")
        try:
            with httpx.stream(
                "POST", url, content=body, headers={"Content-Type": "application/json"}, timeout=left
            ) as response:
                if response.status_code in RETRIED_STATUS:
                    raise _TryAgainError(f"HTTP {response.status_code}")
                content = bytearray()
                for chunk in response.iter_bytes():
                    content += chunk
                    if len(content) > self.max_response_bytes:
                        raise RewardError(f"{url} sent more than {self.max_response_bytes} bytes; rewards are small")
                    if time.monotonic() > deadline:  # httpx's limit is for one read: a slow stream resets it
                        raise _TryAgainError("still sending at the deadline")
        except httpx.TransportError as error:
            raise _TryAgainError(f"{type(error).__name__} {error}".strip()) from error
        if response.status_code != 200:
            raise RewardError(f"{url} answered HTTP {response.status_code}: {bytes(content[:200])!r}")
        try:
            return json.loads(content)
        except ValueError as error:
            raise RewardError(f"{url} did not answer with JSON but with {bytes(content[:80])!r}") from error

    def _read(self, answer: Any, count: int) -> tuple[list[Any], dict[str, list[Any]]]:
        rewards = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(rewards, list):
            raise RewardError(
                f'the reward server answered {str(answer)[:80]!r}; expected {{"rewards": [one number per response]}}'
            )
        if len(rewards) != count:
            raise RewardError(f"the reward server gave {len(rewards)} rewards for {count} responses")
        metrics = answer.get("metrics", {})
        if not isinstance(metrics, dict) or not all(isinstance(v, list) and len(v) == count for v in metrics.values()):
            raise RewardError(
                f'the reward server\'s "metrics" must map names to {count} numbers each, not {str(metrics)[:80]!r}'
            )
        return rewards, metrics
