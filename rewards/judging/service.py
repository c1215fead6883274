"""Asks a service many questions at a time, and comes back with an answer or a reason for each."""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rewardgen.rewards.judging.cache import Answer, AnswerCache
from rewardgen.rewards.judging.client import CallError, Kind, Reply, call, check_url, read_key
from rewardgen.rewards.judging.endpoints import Endpoint, Endpoints, Lease
from rewardgen.rewards.judging.pictures import DataUrls, Picture
from rewardgen.rewards.judging.questions import Part, Question, read_logprobs, read_text

_LONGEST_WAIT_S = 60.0
TOP_LOGPROBS = 20
"""Candidates asked for; OpenAI's most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceConfig:
    """Where a judge is and how it is called; the meaning of each field stands at `VlmJudge`."""

    urls: tuple[str, ...]
    model: str
    key_env: str | None = None
    concurrency: int = 16
    adaptive: bool = True
    timeout_s: float = 60.0
    max_attempts: int = 4
    give_up_s: float = 300.0
    backoff_s: float = 0.5
    eject_after: int = 5
    eject_s: float = 30.0
    cache_dir: str | None = None
    max_side: int | None = 1024
    request: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came of one question: an answer, or the last failure; and what was counted on the way.

    `counts` has `attempts` (calls made), `from_cache`, and failed calls by their kind.
    """

    answer: Answer | None
    counts: Mapping[str, int]
    kind: Kind | None = None
    reason: str = ""


class JudgeService:
    """A judge behind one or several OpenAI-compatible endpoints.

    The key is read from the environment for each round of questions and kept nowhere, so that a copy, a pickle or a
    dump of this object holds none.

    Raises:
        ConfigError: an endpoint, the key's variable or the cache's folder cannot be used. No host is contacted.
    """

    def __init__(self, config: ServiceConfig) -> None:
        self.config = config
        self._urls = tuple(check_url(url) for url in config.urls)
        read_key(config.key_env)
        self._cache = AnswerCache(Path(config.cache_dir).expanduser()) if config.cache_dir else None
        self._data_urls = DataUrls(config.max_side)
        self._endpoints = Endpoints(
            self._urls,
            concurrency=config.concurrency,
            adaptive=config.adaptive,
            eject_after=config.eject_after,
            eject_s=config.eject_s,
        )
        self._stop = threading.Event()
        self._threads: ThreadPoolExecutor | None = None
        # Waits must not depend on, or disturb, the generators that training draws from.
        self._random = random.Random()

    def __reduce__(self) -> tuple[type[JudgeService], tuple[ServiceConfig]]:
        return JudgeService, (self.config,)

    def limits(self) -> dict[str, float]:
        """How many calls at a time each endpoint is given at present."""
        return {endpoint.url: endpoint.limit for endpoint in self._endpoints.all}

    def ask(self, question: Question, asked: Sequence[Sequence[Part]]) -> list[Outcome]:
        """Answers to one question about several pictures, in their order. Equal ones are asked once."""
        return self.begin(question, asked)()

    def begin(self, question: Question, asked: Sequence[Sequence[Part]]) -> Callable[[], list[Outcome]]:
        """As `ask`, without waiting: that is left to what is returned.

        Whatever is begun is asked in the order of beginning, as many questions at a time as the endpoints are given.
        If waiting for one of them is interrupted, all are given up. Pictures become files in the threads that ask: the
        first calls are made while others' are still to be encoded.
        """
        put = [tuple(part if isinstance(part, str) else Picture.of(part) for part in parts) for parts in asked]
        todo = dict.fromkeys(put)
        if not todo:
            return list
        key, stop = read_key(self.config.key_env), self._stop
        if self._threads is None:
            # No more than can be under way: what waits its turn here is not yet running out of time (`give_up_s`).
            workers = self.config.concurrency * len(self._urls)
            self._threads = ThreadPoolExecutor(workers, thread_name_prefix="judge")
        submit = self._threads.submit
        futures = {parts: submit(self._one, question, parts, key, stop) for parts in todo}

        def wait() -> list[Outcome]:
            try:
                found = {parts: future.result() for parts, future in futures.items()}
            except BaseException:
                self.give_up()
                raise
            # What was counted belongs to the first of equal ones.
            first = {parts: index for index, parts in reversed(list(enumerate(put)))}
            return [
                found[parts] if first[parts] == index else replace(found[parts], counts={})
                for index, parts in enumerate(put)
            ]

        return wait

    def give_up(self) -> None:
        """Make no further call for what was begun. Calls under way are not waited for."""
        self._stop.set()
        self._stop = threading.Event()
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._threads = None

    def _one(
        self, question: Question, parts: Sequence[str | Picture], key: str | None, stop: threading.Event
    ) -> Outcome:
        """Try until there is an answer, or the attempts or the time are used up."""
        body = self._body(question, parts)
        name = self._key(question, body)
        cached = self._cache.get(name) if self._cache else None
        if cached is not None:
            return Outcome(answer=cached, counts={"from_cache": 1})
        counts: Counter[str] = Counter()
        end = time.monotonic() + self.config.give_up_s
        charged, failure = 0, CallError("timeout", f"no endpoint had room within {self.config.give_up_s:g} s")
        endpoint: Endpoint | None = None
        while lease := self._endpoints.take(not_at=endpoint, timeout_s=end - time.monotonic(), stop=stop):
            endpoint = lease.endpoint
            result = self._attempt(question, lease, body, key, counts)
            if isinstance(result, Answer):
                if self._cache:
                    self._cache.put(name, result)
                return Outcome(answer=result, counts=counts)
            failure = result
            if failure.kind == "refused":
                break
            charged += failure.kind != "rate_limited"
            wait = self._wait(failure, charged, counts["rate_limited"])
            if charged >= self.config.max_attempts or time.monotonic() + wait > end or stop.wait(wait):
                break
        return Outcome(answer=None, counts=counts, kind=failure.kind, reason=str(failure))

    def _attempt(
        self, question: Question, lease: Lease, body: dict[str, Any], key: str | None, counts: Counter[str]
    ) -> Answer | CallError:
        """One call, and one more without log-probabilities where they may be what the endpoint refuses.

        Gives the place at the endpoint back, whatever happens.
        """
        ask = partial(self._counted, question, lease.endpoint, body, key, counts)
        logprobs = question.by_logprob and lease.endpoint.takes_logprobs
        try:
            result = ask(logprobs=logprobs)
            # It is this endpoint that must be asked again: what another one answers says nothing about it.
            plain = logprobs and isinstance(result, CallError) and result.status in (400, 422)
            result = ask(logprobs=False) if plain else result
        except BaseException:
            self._endpoints.failed(lease, "connection")
            raise
        if isinstance(result, CallError):
            self._endpoints.failed(lease, result.kind)
        else:
            self._endpoints.succeeded(lease, refuses_logprobs=plain)
        return result

    def _counted(
        self,
        question: Question,
        endpoint: Endpoint,
        body: dict[str, Any],
        key: str | None,
        counts: Counter[str],
        *,
        logprobs: bool,
    ) -> Answer | CallError:
        """One call, added to the counts."""
        counts["attempts"] += 1
        try:
            return self._call(question, endpoint, body, key, logprobs=logprobs)
        except CallError as error:
            counts[error.kind] += 1
            return error

    def _call(
        self, question: Question, endpoint: Endpoint, body: dict[str, Any], key: str | None, *, logprobs: bool
    ) -> Answer:
        asked = {**body, "logprobs": True, "top_logprobs": TOP_LOGPROBS} if logprobs else body
        data = json.dumps(asked).encode()
        reply: Reply = call(endpoint.url, data, key=key, timeout_s=self.config.timeout_s)
        if logprobs and reply.candidates is not None:
            value = read_logprobs(question, reply.candidates)
            if value is not None:
                return Answer(value=value, by_logprob=True)
        value = read_text(question, reply.text)
        if value is None:
            raise CallError("nonsense", f"the reply is no answer to the question: {_shown(reply.text)}")
        return Answer(value=value, by_logprob=False)

    def _wait(self, error: CallError, charged: int, limited: int) -> float:
        """Seconds until the next try: twice as long each time, at random, so that callers do not come back at once."""
        tries = limited if error.kind == "rate_limited" else charged
        longest = min(_LONGEST_WAIT_S, self.config.backoff_s * float(2 ** min(tries - 1, 16)))
        own_s = longest * (0.5 + 0.5 * self._random.random())
        if not error.retry_after_s:  # a server that says 0, or a time that is past by our clock, says nothing
            return own_s
        return float(error.retry_after_s) * (1 + 0.25 * self._random.random())

    def _body(self, question: Question, parts: Sequence[str | Picture]) -> dict[str, Any]:
        """The request, without log-probabilities."""
        content = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image_url", "image_url": {"url": self._data_urls(part)}}
            for part in parts
        ]
        system = [{"role": "system", "content": question.settings.system}] if question.settings.system else []
        body: dict[str, Any] = {
            "model": self.config.model,
            "messages": [*system, {"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": question.settings.max_tokens,
            **self.config.request,
        }
        return {name: value for name, value in body.items() if value is not None}

    def _key(self, question: Question, body: Mapping[str, Any]) -> str:
        """Of pictures, question, model and settings; not of the endpoint."""
        text = json.dumps([body, dict(question.values), question.settings.reasons], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _shown(text: str) -> str:
    shown = "".join(c if c.isprintable() else " " for c in text.strip())
    return repr(shown if len(shown) <= 80 else shown[:77] + "...")
