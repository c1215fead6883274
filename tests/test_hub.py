"""Files of the hub: whoever asks for one that cannot be had is told why and what to do, in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import hf_raise_for_status

from rewardgen import hub
from rewardgen.construct import make
from rewardgen.errors import CheckpointError
from rewardgen.policies import official
from rewardgen.rewards.loading import load_pretrained
from rewardgen.settings import Plugin
from rewardgen.sources import find_sources

FILE = "owner/closed:weights/csd.safetensors"
PAGE = "https://huggingface.co/owner/closed"


def answered(status: int, **headers: str) -> Callable[[], None]:
    """Raises what huggingface_hub makes of an answer of the hub."""
    request = httpx2.Request("HEAD", f"{PAGE}/resolve/main/weights/csd.safetensors")
    sent = {f"X-Error-{name.title()}": value for name, value in headers.items()}
    return lambda: hf_raise_for_status(httpx2.Response(status, headers=sent, request=request))


def unreachable() -> None:
    """As huggingface_hub does without a connection."""
    try:
        raise httpx2.ConnectError("[Errno -2] Name or service not known")
    except httpx2.ConnectError as error:
        raise errors.LocalEntryNotFoundError("An error happened while trying to locate the file") from error


def failing(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


FAULTS: dict[str, tuple[Callable[[], None], type[Exception], str]] = {
    "gated": (answered(403, code="GatedRepo"), errors.GatedRepoError, "repository is gated, and this account has no"),
    "gated, no login": (answered(401, code="GatedRepo"), errors.GatedRepoError, "repository is gated"),
    "no repository": (answered(404, code="RepoNotFound"), errors.RepositoryNotFoundError, "there is no such reposit"),
    "no repository, no login": (answered(401), errors.RepositoryNotFoundError, "or this account may not see it"),
    "wrong login": (
        answered(401, message="Invalid credentials in Authorization header"),
        errors.HfHubHTTPError,
        "does not accept this login",
    ),
    "token without rights": (
        answered(403, message="Please enable access to public gated repositories"),
        errors.HfHubHTTPError,
        "403 Forbidden",
    ),
    "no file": (answered(404, code="EntryNotFound"), errors.RemoteEntryNotFoundError, "holds no such file"),
    "no connection": (unreachable, errors.LocalEntryNotFoundError, "the hub cannot be reached"),
    "server": (answered(503), errors.HfHubHTTPError, "503"),
    "broken off": (failing(httpx2.ReadTimeout("the read timed out")), httpx2.ReadTimeout, "timed out"),
    "full disk": (failing(OSError(28, "No space left on device")), OSError, "No space left"),
}


@pytest.fixture(params=FAULTS)
def fault(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Downloads fail in one of the ways; what they must be told by."""
    fail, kind, reason = FAULTS[request.param]

    def download(*named: str, **_: Any) -> str:
        assert named == ("owner/closed", "weights/csd.safetensors")
        with pytest.raises(kind):  # it is the library's own
            fail()
        fail()
        raise AssertionError

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return reason


def told(ask: Callable[[], object], reason: str) -> str:
    """The one line that names the file, why, where its licence is, and how to log in."""
    with pytest.raises(CheckpointError) as caught:
        ask()
    said = str(caught.value)
    assert "\n" not in said
    for part in (FILE, reason, f"accept its licence at {PAGE}", "`hf auth login`"):
        assert part in said
    return said


def test_an_experiment_is_told_where_it_names_the_file(fault: str) -> None:
    said = told(lambda: make("objective.rewards.style", "rewards", Plugin(use="csd", args={"checkpoint": FILE})), fault)
    assert said.startswith("objective.rewards.style.args.checkpoint: ")
    policy = Plugin(use="uso", args={"base": "owner/base", "transformer": FILE})
    assert told(lambda: make("policy", "policies", policy), fault).startswith("policy.args.transformer: ")


def test_a_loader_is_told_the_same(fault: str) -> None:
    assert told(lambda: official.resolve_file(FILE), fault) == told(lambda: hub.fetch(FILE), fault)


def test_offline_for_real(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The library itself, told to ask nobody; then with the file in its cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert "hf download owner/closed weights/csd.safetensors" in told(lambda: hub.fetch(FILE), "not on this machine")
    kept = tmp_path / "models--owner--closed" / "snapshots" / "0123" / "weights" / "csd.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"here")
    (tmp_path / "models--owner--closed" / "refs").mkdir()
    (tmp_path / "models--owner--closed" / "refs" / "main").write_text("0123")
    assert hub.fetch(FILE).read_bytes() == b"here"
    assert hub.cached(*FILE.split(":")) == kept
    (source,) = find_sources({"checkpoint": FILE}, "x")
    assert (source.kind, source.location) == ("hub file", kept)


def test_what_is_no_file_of_the_hub() -> None:
    for text in ("owner/name", "name:file", "a/b/c:file", "owner/name:", "http://host:8000/v1"):
        assert hub.split(text) is None
        with pytest.raises(CheckpointError, match="owner/repository:path/in/it"):
            hub.fetch(text)
    assert hub.split("owner/name:a folder/file:2.pt") == ("owner/name", "a folder/file:2.pt")


def test_secrets_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijkl")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_: failing(OSError("no hf_abcdefghijkl here"))())
    with pytest.raises(CheckpointError) as caught:
        hub.fetch(FILE)
    assert "abcdefghijkl" not in str(caught.value)


def test_repositories_that_a_library_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers and diffusers wrap the hub's errors in their own."""

    class AutoThing:
        @staticmethod
        def from_pretrained(source: str, **_: Any) -> None:
            try:
                answered(401, code="GatedRepo")()
            except errors.GatedRepoError as error:
                raise OSError(f"You cannot have {source}.\nSee there.") from error

    with pytest.raises(CheckpointError, match=r"You cannot have owner/closed.*; accept its licence at .*/owner/closed"):
        load_pretrained(AutoThing, "owner/closed")
    assert hub.remedy("owner/closed", ValueError("size mismatch for head")) == ""
    assert "hf download owner/closed --local-dir" in hub.remedy("owner/closed", OSError("We couldn't connect to it"))
