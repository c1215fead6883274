"""The Hugging Face hub: files by `owner/name:path/in/it`, and what to do where something of it cannot be had.

Everything that reads such a file comes here, and everything that reads a whole repository asks `remedy` what to say.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from rewardgen.errors import CheckpointError
from rewardgen.manifest import blot

SITE = "https://huggingface.co"
"""Where licences are accepted, whatever mirror files come from."""
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def split(text: str) -> tuple[str, str] | None:
    """(repository, path in it) of `owner/name:path/in/it`, None for any other text."""
    repository, colon, inside = text.partition(":")
    return (repository, inside) if colon and inside and _REPOSITORY.fullmatch(repository) else None


def cached(repository: str, inside: str) -> Path | None:
    """Where a file of the hub lies on this machine, None where it is not here. Contacts nobody."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repository, inside)
    except HFValidationError:  # not a name that a repository can have
        return None
    return Path(found) if isinstance(found, str) else None


def fetch(text: str) -> Path:
    """A file `owner/name:path/in/it` as a path on this machine, fetched if it is not here.

    Raises:
        CheckpointError: it cannot be had: the name of the file, why, and what to do about it.
    """
    named = split(text)
    if named is None:
        raise CheckpointError(f"{text}: no file on the hub; one is written 'owner/repository:path/in/it'")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(*named))
    except Exception as error:  # of the hub, its server, the network and the disk: there is no common one
        advice = remedy(named[0], error, named[1]) or f"if its repository is gated, {_access(named[0])}"
        raise CheckpointError(blot(f"{text}: {_reason(error)}; {advice}")) from error


def remedy(repository: str, error: BaseException, inside: str | None = None) -> str:
    """What to do about a repository, or a file in it, that could not be had; empty where the error is about neither.

    Args:
        repository: `owner/name`.
        error: what huggingface_hub raised, or a library that asked it.
        inside: path of the file that was asked for.
    """
    page, access = f"{SITE}/{repository}", _access(repository)
    what = f"{repository} {inside}" if inside else f"{repository} --local-dir FOLDER"
    match _kind(error):
        case "gated":
            return access
        case "login":
            return f"log in with `hf auth login`; if it is gated, accept its licence at {page} first"
        case "no repository":
            return f"look whether it is at {page}; if it is private or gated, {access}"
        case "no file":
            return f"look which files are at {page}/tree/main; if it is gated, {access}"
        case "offline":
            place = "file" if inside else "folder"
            return (
                f"where the hub is reached ({access} if it is gated), `hf download {what}`, then name the {place} here"
            )
    return ""


def _access(repository: str) -> str:
    return f"accept its licence at {SITE}/{repository}, then log in with `hf auth login`"


def _kind(error: BaseException) -> str:
    """What went wrong, by the first of huggingface_hub's errors among an error and its causes, else by their words.

    Empty where neither tells.
    """
    from huggingface_hub import errors

    # In this order: a gated repository is one that is not found, and a file that is not here is one that is not there.
    kinds: tuple[tuple[type[BaseException] | tuple[type[BaseException], ...], str], ...] = (
        (errors.GatedRepoError, "gated"),
        (errors.RepositoryNotFoundError, "no repository"),
        (errors.LocalTokenNotFoundError, "login"),
        ((errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError, TimeoutError), "offline"),
        (errors.EntryNotFoundError, "no file"),
    )
    words = ""
    for found in _chain(error):
        for of, kind in kinds:
            if isinstance(found, of):
                return kind
        if getattr(getattr(found, "response", None), "status_code", None) == 401:
            return "login"
        words += f" {type(found).__name__} {found}".lower()
    patterns = (
        (r"gated repo|restricted", "gated"),
        (r"unauthorized|\b401\b", "login"),
        (r"'t connect|connection|offline|resolve host|name resolution|timed out|timeout|cached files", "offline"),
        (r"not a valid model identifier|\b404\b", "no repository"),
    )
    return next((kind for pattern, kind in patterns if re.search(pattern, words)), "")


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__


def _reason(error: Exception) -> str:
    told = {
        "gated": "its repository is gated, and this account has no access",
        "login": "the hub does not accept this login, or there is none",
        "no repository": "there is no such repository, or this account may not see it",
        "no file": "its repository holds no such file",
        "offline": "it is not on this machine, and the hub cannot be reached",
    }
    first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return f"{told.get(_kind(error), 'it cannot be had from the hub')} ({first})"
