"""Secrets appear in no file of a run, on no console and in no error message.

A secret is the value of an environment variable such as WANDB_API_KEY, of a key such as `api_key`, `hub_token` or
`password`, and whatever stands before the `@` of a URL or behind `?token=`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from rewardgen.cli import main
from rewardgen.config import load_experiment
from rewardgen.errors import ConfigError
from rewardgen.manifest import blot, blot_entries, is_secret, redact
from rewardgen.sources import find_sources, materialise

ROOT = Path(__file__).resolve().parent.parent.parent
ENVIRONMENT = {
    "WANDB_API_KEY": "hush-wandb-0123456789abcdef",
    "HF_TOKEN": "hf_hushABCDEFGHIJKLMNOP",
    "OPENAI_API_KEY": "sk-hush-proj-0123456789",
    "AWS_SECRET_ACCESS_KEY": "hush/aws+0123456789",
}
PLUGIN = """
from typing import Any

from tests.toys import ToyDataset


class Judged(ToyDataset):
    def __init__(self, size: int, seed: int = 0, api_key: str = "", judge: Any = None, endpoint: str = "") -> None:
        super().__init__(size, seed)
"""
EXPERIMENT = """\
name: small
policy: {{use: "tests.toys:ToyPolicy", args: {{hidden: 4}}}}
data:
  train:
    use: "{folder}/judged.py:Judged"
    args:
      size: 4
      api_key: hush-key-in-the-file
      endpoint: https://me:hush-in-the-url@judge.example.org/v1?model=big&access_token=hush-behind-the-url
      judge:
        model: large
        password: hush-password
        hub_token: hush-owner/hush-name
        credentials: {{user: hush-user, keys: [hush-first, hush-second]}}
        pasted: "Bearer {OPENAI_API_KEY}"
  held_out: {{use: "tests.toys:ToyDataset", args: {{size: 4, seed: 1}}}}
rollout: {{image_size: [8, 8], num_steps: 3, window: {{kind: refl, entry_range: [1, 2]}}}}
objective:
  rewards:
    style: {{use: "tests.toys:ToyReward", weight: 0.5}}
train: {{num_steps: 2, batch_size: 2, device: cpu}}
evaluation: {{num_examples: 4, grid_examples: 1}}
report: {{tensorboard: {tensorboard}, wandb: {{project: toys}}}}
"""
SECRETS = ("hush", *ENVIRONMENT.values())


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(ROOT)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "judged.py").write_text(PLUGIN)
    path = tmp_path / "experiment.yaml"
    path.write_text(EXPERIMENT.format(folder=tmp_path, tensorboard="true", **ENVIRONMENT))
    return path


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str]:
    """Exit code and everything said, as the command line of the process."""
    monkeypatch.setattr(sys, "argv", ["rewardgen", *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    told = capsys.readouterr()
    return int(stopped.value.code or 0), told.out + told.err


def leaks(folder: Path) -> list[str]:
    """The files that hold a secret."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 6
    return [str(path) for path in files if any(secret.encode() in path.read_bytes() for secret in SECRETS)]


def test_a_whole_run_keeps_none(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []
    nothing = SimpleNamespace(define_metric=lambda *a, **k: None, log=sent.append, finish=lambda: None)
    wandb = SimpleNamespace(init=lambda **options: sent.append(options) or nothing)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    overrides = ["data.train.args.api_key=hush-override", "data.train.args.judge={model: small, secret: hush one two}"]
    folder = tmp_path / "run"
    code, told = run(capsys, monkeypatch, "train", str(experiment), *overrides, "--output", str(folder))
    assert code == 0, told
    assert "hush" not in told
    assert leaks(folder) == []
    assert sent[0]["config"]["name"] == "small"
    assert "hush" not in repr(sent)
    # What is no secret is all there.
    args = yaml.safe_load((folder / "config.yaml").read_text())["data"]["train"]["args"]
    assert args == {
        "size": 4,
        "api_key": "***",
        "endpoint": "https://***@judge.example.org/v1?model=big&access_token=***",
        "judge": {"model": "small", "password": "***", "hub_token": "***", "secret": "***"}
        | {"credentials": {"user": "***", "keys": ["***", "***"]}, "pasted": "Bearer ***"},
    }
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["experiment"]["data"]["train"]["args"] == args
    shown = ["data.train.args.api_key=***", "data.train.args.judge={model: small, secret: ***}"]
    assert manifest["command"][3:5] == shown

    # Resuming and judging the run say no more, though they read the experiment again.
    for arguments in (
        ["train", str(experiment), *overrides, "--output", str(folder), "--resume", "train.num_steps=3"],
        ["eval", str(experiment), *overrides, "--run", str(folder)],
        ["check", str(experiment), *overrides],
    ):
        code, told = run(capsys, monkeypatch, *arguments)
        assert code == 0, told
        assert "hush" not in told
    assert leaks(folder) == []


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("data.train.args.api_key=[hush]", "data.train.args.api_key (override): input should be a valid string"),
        ("data.train.args.api_key={hush: hush}", "data.train.args.api_key"),
        ("data.train.args.size={password: hush}", "input should be a valid integer"),
        ("data.train.args.size=https://me:hush@host/x", "got 'https://***@host/x'"),
        ("data.train.args.size=sk-hush-proj-0123456789", "got '***'"),
        ("data.train.args.api_key=[hush", "override 'data.train.args.api_key=***', line 1: "),
        ("data.train.args={token: 'hush hush', size: [}", "override 'data.train.args={token: ***, size: [}', line 1: "),
        ("data.train.api_key=hush", "data.train.api_key (override): unknown key."),
        ("train.num_steps=hf_hushABCDEFGHIJKLMNOP", "train.num_steps (override): should be a valid integer"),
        ("data.train.use=https://me:hush@host/x.py:Judged", "https://***@host"),
        ("flavors.api_key=hush", "override 'flavors.api_key=***': choose a flavor"),
        ("api_key.=hush", "override 'api_key.=***': expected 'dotted.key=value'"),
    ],
)
def test_no_error_tells_one(
    override: str,
    told: str,
    experiment: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, message = run(capsys, monkeypatch, "check", str(experiment), override)
    assert code == 2
    assert told in message
    assert "hush" not in message


def test_errors_about_the_file_itself_tell_none(experiment: Path) -> None:
    """A line of YAML that does not parse is told by its number, never by its text."""
    good = experiment.read_text()
    for old, new in (("api_key: ", "api_key: [["), ("password: ", "password: *"), ("hub_token: ", "hub_token: 'a' ")):
        experiment.write_text(good.replace(old, new))
        with pytest.raises(ConfigError) as caught:
            load_experiment(experiment)
        assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    "key",
    [
        "api_key", "API_KEY", "apiKey", "openai_api_key", "access_key", "aws_access_key_id", "private-key", "token",
        "hf_token", "HF_TOKEN", "authToken", "token_file", "access_tokens", "password", "db_password", "passwd",
        "passphrase", "secret", "client_secret", "secrets", "credentials", "Authorization", "bearer", "signing.key",
    ],
)  # fmt: skip
def test_names_of_secrets(key: str) -> None:
    assert is_secret(key)
    assert redact({key: "x" * 20, "nested": [{key: ["y"]}]}) == {key: "***", "nested": [{key: ["***"]}]}


@pytest.mark.parametrize(
    "key",
    [
        "tokens", "max_text_tokens", "num_tokens", "tokens_per_level", "tokenizer", "tokenizer_2", "tokenize", "key",
        "keys", "schedule", "monkey", "author", "path", "keyboard", "style_tokens_per_level",
    ],
)  # fmt: skip
def test_names_of_no_secrets(key: str) -> None:
    assert not is_secret(key)
    assert redact({key: "x" * 20}) == {key: "x" * 20}


def test_numbers_and_nothing() -> None:
    """A number under a password is one; under `token` it counts something, and whether there is one may be seen."""
    values = {"password": 12345678, "pad_token": 0, "use_auth_token": True, "hub_token": None, "secret": {"x": 1.5}}
    expected = {"password": "***", "pad_token": 0, "use_auth_token": True, "hub_token": None, "secret": {"x": "***"}}
    assert redact(values) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:s3cr3t@host/x", "https://***@host/x"),
        ("see postgres://u:p@ss@host:5/db now", "see postgres://***@host:5/db now"),
        ("https://host/a@b", "https://host/a@b"),
        ("https://host/x?token=abc&model=y", "https://host/x?token=***&model=y"),
        ("https://host/x?a=1&api_key=abc#top", "https://host/x?a=1&api_key=***#top"),
        ("https://s3/x?X-Amz-Credential=abc&X-Amz-Signature=def", "https://s3/x?X-Amz-Credential=***&X-Amz-Signature=***"),
        ("https://host/x?key=abc&sig=def&design=z", "https://host/x?key=***&sig=***&design=z"),
        ("someone@example.org and step 3", "someone@example.org and step 3"),
        ("token: what a word", "token: what a word"),
    ],
)  # fmt: skip
def test_credentials_in_text(text: str, expected: str) -> None:
    assert blot(text) == expected


def test_values_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    monkeypatch.setenv("JUDGE_TOKEN", "0123456789")
    monkeypatch.setenv("JUDGE_TOKEN_2", "0123456789abc")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "certainly")
    assert blot("EMPTY certainly 0123456789 x0123456789abcx") == "EMPTY certainly *** x***x"


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("judge.args.api_key=abc", "judge.args.api_key=***"),
        ("judge={args: {api_key: abc, model: x}}", "judge={args: {api_key: ***, model: x}}"),
        ("judge={args: {'api_key': 'a, b', model: x}}", "judge={args: {'api_key': ***, model: x}}"),
        ('judge={"password":"a\'b","model":"x"}', 'judge={"password":***,"model":"x"}'),
        ("train.num_steps=3", "train.num_steps=3"),
        ("--password=abc", "--password=***"),
        ("policy.args.max_text_tokens=3", "policy.args.max_text_tokens=3"),
    ],
)
def test_arguments(argument: str, expected: str) -> None:
    assert blot_entries(argument) == expected


@pytest.mark.parametrize(
    "piece", ["x", "?", "&", "token", "token ", ":/", ":/x@", "key=", "a.b_", "'", "\n", "token: "]
)
def test_a_secret_behind_a_long_text(piece: str) -> None:
    """A pattern that goes over a text once for each of its places would take minutes here."""
    text = piece * 20_000
    assert blot(f"{text} https://me:s3cr3t@host").endswith(" https://***@host")
    assert blot_entries(f"{text}\ntoken: s3cr3t").endswith("\ntoken: ***")


def test_a_secret_is_no_source() -> None:
    """A token may look like a file of the hub. It is not looked up there, and what is read does not list it."""
    args = {"hub_token": "owner/name:file", "judge": {"api_key": "world:csd.safetensors"}, "base": "owner/name"}
    assert [source.path for source in find_sources(args, "x")] == ["x.base"]
    assert materialise(args, "x") == args
