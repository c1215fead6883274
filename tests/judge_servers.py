"""Judges to test against: real HTTP servers on a free port, in a thread of this process.

What such a judge thinks of a picture follows from the question's bytes, so that a test knows every answer without
having asked. Faults are injected below the application, as a proxy would.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import socket
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Literal, TypeAlias

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from torch import Tensor

from rewardgen.rewards.judging.pictures import Picture
from rewardgen.rewards.vlm_judge import VlmJudge
from rewardgen.types import Example

Fault: TypeAlias = Literal["400", "429", "500", "hang", "cut", "nonsense", "unsure"]
FaultPlan: TypeAlias = Callable[[str, int], Fault | None]
"""(digest of the question, how many times it was asked before) -> what goes wrong, or None."""
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def digest(body: Any) -> str:
    """Of what is asked, whether with log-probabilities or without."""
    return hashlib.sha256(json.dumps(body["messages"], sort_keys=True).encode()).hexdigest()


def belief(code: str) -> float:
    """P(yes) in (0, 1) of the question with this digest."""
    return (1 + int(code[:4], 16)) / 65537


def chosen(code: str, share: float) -> bool:
    """Whether a question is among a fixed share of all; independent of `belief`."""
    return int(code[8:12], 16) < share * 65536


def no_faults(_code: str, _before: int) -> Fault | None:
    return None


def asked(judge: VlmJudge, pixels_3HW: Tensor, example: Example) -> dict[str, Any]:
    """The request that a judge makes about a picture, which it must apply to; without log-probabilities."""
    parts = judge.question.put(pixels_3HW, example)
    assert parts is not None
    put = [part if isinstance(part, str) else Picture.of(part) for part in parts]
    return judge.service._body(judge.question, put)


class JudgeServer:
    """An OpenAI-compatible endpoint. Use as a context manager.

    Args:
        logprobs: return log-probabilities when asked; otherwise the field is ignored, as `transformers serve` does.
        refuses: answer 400 when asked for log-probabilities.
        plan: the faults.
        key: the bearer token it wants, None for none.
        rubric: answer with a number 0-4 in place of yes and no.
        named: what a question is called in `plan`, `calls` and `log`, given the request; asked for each call in turn.
    """

    def __init__(
        self,
        *,
        logprobs: bool = True,
        refuses: bool = False,
        plan: FaultPlan = no_faults,
        key: str | None = None,
        rubric: bool = False,
        named: Callable[[Any], str] = digest,
    ) -> None:
        self.logprobs, self.refuses, self.plan, self.key, self.rubric = logprobs, refuses, plan, key, rubric
        self.named = named
        self.calls: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.log: list[tuple[str, Fault | None]] = []
        self.bodies: list[dict[str, Any]] = []
        self.in_flight = self.peak = 0
        self.retry_after: str | Callable[[str], str | None] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    def __enter__(self) -> JudgeServer:
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        self._port = listener.getsockname()[1]
        self._server = uvicorn.Server(uvicorn.Config(self._asgi(), log_level="critical", lifespan="off", ws="none"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()
        while not self._server.started:
            self._thread.join(0.02)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(20)

    def _asgi(self) -> Any:
        app = FastAPI()
        app.post("/v1/chat/completions")(self._answer)

        async def outer(scope: Any, receive: Any, send: Send) -> None:
            self.in_flight += 1
            self.peak = max(self.peak, self.in_flight)
            try:
                content = b""
                more = True
                while more:
                    message = await receive()
                    content += message.get("body", b"")
                    more = message.get("more_body", False)
                body = json.loads(content)
                code = digest(body)
                name = self.named(body)
                fault = self.plan(name, self.calls[name])
                self.calls[name] += 1
                self.log.append((name, fault))
                self.bodies.append(body)

                async def again() -> Any:
                    return {"type": "http.request", "body": content, "more_body": False}

                if fault is None:
                    await app(scope, again, send)
                else:
                    self.faults[fault] += 1
                    after = self.retry_after(name) if callable(self.retry_after) else self.retry_after
                    await _fail(fault, send, code, after)
            finally:
                self.in_flight -= 1

        return outer

    async def _answer(self, request: Request) -> JSONResponse:
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            said = f"Incorrect API key provided: {request.headers.get('authorization')}"
            return JSONResponse({"error": {"message": said}}, status_code=401)
        body = await request.json()
        if self.refuses and "logprobs" in body:
            return JSONResponse({"error": {"message": "logprobs: not supported"}}, status_code=400)
        p = belief(digest(body))
        text = str(min(4, int(5 * p))) if self.rubric else ("Yes." if p > 0.5 else "No.")
        choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}}
        if self.logprobs and body.get("logprobs"):
            top = [_entry("Yes", 0.9 * p), _entry("No", 0.5 * (1 - p)), _entry(" no", 0.4 * (1 - p)), _entry("I", 0.1)]
            choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
        return JSONResponse({"object": "chat.completion", "choices": [choice]})


def _entry(token: str, probability: float) -> dict[str, Any]:
    return {"token": token, "logprob": math.log(probability)}


async def _fail(fault: Fault, send: Send, code: str, retry_after: str | None) -> None:
    if fault == "hang":
        await asyncio.sleep(3600)
    if fault == "cut":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1000")]})
        await send({"type": "http.response.body", "body": b'{"choices": [', "more_body": True})
        raise ConnectionAbortedError
    status, content = 200, b'{"choices": [{"message": {"content": "Yes'
    if fault == "unsure":
        reply = ("Maybe.", "Yes and no", "0.5", "")[int(code[-1], 16) % 4]
        content = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
    elif fault != "nonsense":
        status, content = int(fault), b'{"error": {"message": "injected"}}'
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    headers += [(b"retry-after", retry_after.encode())] if retry_after is not None else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
