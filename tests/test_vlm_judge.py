"""The judge behind a service: questions and replies, the calls it makes, concurrency, ejection, cache and keys."""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import pickle
import threading
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from rewardgen import plugins
from rewardgen.errors import ConfigError
from rewardgen.manifest import redact
from rewardgen.reward import RewardWarning, check_reward, score
from rewardgen.rewards.judging import pictures as pictures_module
from rewardgen.rewards.judging.cache import Answer, AnswerCache
from rewardgen.rewards.judging.client import CallError, _parse, check_url
from rewardgen.rewards.judging.endpoints import Endpoints
from rewardgen.rewards.judging.pictures import DataUrls, Picture, data_url, to_pil
from rewardgen.rewards.judging.questions import (
    TEMPLATES,
    load_question,
    parse_template,
    read_logprobs,
    read_text,
)
from rewardgen.rewards.vlm_judge import VlmJudge
from rewardgen.sources import find_sources, materialise
from rewardgen.types import Example
from tests.judge_servers import JudgeServer, asked, belief, digest

NAMES = sorted(path.stem for path in TEMPLATES.glob("*.txt"))
STYLE = load_question("style")


def pictures(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def examples(n: int) -> list[Example]:
    refs = pictures(n, seed=1)
    return [Example(id=str(i), prompt=f"thing {i}", content_refs=(refs[i],), style_refs=(refs[i],)) for i in range(n)]


def judge(servers: Sequence[JudgeServer], question: str = "style", **args: Any) -> VlmJudge:
    settings = {"backoff_s": 0.01, **args}
    return VlmJudge(question, tuple(server.url for server in servers), "tiny", **settings)


def believed(reward: VlmJudge, pixels: Tensor, given: Sequence[Example]) -> Tensor:
    """What the servers think, without asking them."""
    found = []
    for pixels_3HW, example in zip(pixels, given, strict=True):
        found.append(belief(digest(asked(reward, pixels_3HW, example))))
    return torch.tensor(found)


class TestQuestions:
    @pytest.mark.parametrize("name", NAMES)
    def test_bundled_templates_read_and_show_the_picture(self, name):
        question = load_question(name)
        picture, content, style = pictures(3)
        parts = question.put(picture, Example(id="a", prompt="plums", content_refs=(content,), style_refs=(style,)))
        shown = [part for part in parts if isinstance(part, Tensor)]
        assert any(part is picture for part in shown)
        assert "{" not in "".join(part for part in parts if isinstance(part, str))
        assert set(question.values.values()) >= {0.0, 1.0}

    def test_any_number_of_pictures_in_the_order_of_the_text(self):
        question = parse_template("---\nanswer: yes_no\n---\n{style_refs} then {picture} and {picture}", name="x")
        picture, a, b = pictures(3)
        parts = question.put(picture, Example(id="a", style_refs=(a, b)))
        assert [part if isinstance(part, str) else part.sum().item() for part in parts] == [
            a.sum().item(), b.sum().item(), " then ", picture.sum().item(), " and ", picture.sum().item()
        ]  # fmt: skip

    def test_a_question_about_what_the_example_lacks_is_not_put(self):
        assert load_question("style").put(pictures(1)[0], Example(id="a", prompt="plums")) is None
        assert load_question("prompt").put(pictures(1)[0], Example(id="a", prompt=" ")) is None

    def test_a_prompt_is_text_whatever_it_holds(self):
        parts = load_question("prompt").put(pictures(1)[0], Example(id="a", prompt="{picture} {style_refs} {"))
        (_,) = [part for part in parts if isinstance(part, Tensor)]
        assert "{picture} {style_refs} {" in "".join(part for part in parts if isinstance(part, str))

    def test_own_template_by_path(self, tmp_path):
        path = tmp_path / "mine.txt"
        path.write_text("---\nanswer: {lowest: 1, highest: 5}\nsystem: Be strict.\n---\n{picture} of {prompt}?\n")
        question = load_question(str(path))
        assert question.values == {"1": 0.0, "2": 0.25, "3": 0.5, "4": 0.75, "5": 1.0}
        assert question.settings.system == "Be strict."

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("{picture}", "must begin with its settings"),
            ("---\nanswer: yes_no\n---\n{pictures}", "Did you mean 'picture'"),
            ("---\nanswer: yes_no\n---\n{prompt}", "does not show the picture"),
            ("---\nanswr: yes_no\n---\n{picture}", "answer"),
            ("---\nanswer: {lowest: 4, highest: 0}\n---\n{picture}", "lowest must be below highest"),
            ("---\nanswer: [\n---\n{picture}", "no YAML"),
        ],
    )
    def test_faulty_templates_are_refused(self, text, said):
        with pytest.raises(ConfigError, match=said):
            parse_template(text, name="mine")

    def test_unknown_names_get_the_nearest(self):
        with pytest.raises(ConfigError, match="Did you mean 'subject'"):
            load_question("subjekt")
        with pytest.raises(ConfigError, match=r"nowhere\.txt cannot be read"):
            load_question("./nowhere.txt")


class TestReplies:
    @pytest.mark.parametrize(
        "reply", ["yes", "Yes.", " YES\n", "**Yes**", '"yes"', "Answer: yes", "It is.\nAnswer: **Yes**"]
    )
    def test_yes(self, reply):
        assert read_text(load_question("style"), reply) == 1.0

    @pytest.mark.parametrize(
        "reply",
        ["", "Yes, but", "yes no", "maybe", "not", "Answer: yes\nAnswer: no", "Answer: yes or no", "yesno", "1", "-"],
    )
    def test_what_is_no_answer_to_yes_or_no(self, reply):
        assert read_text(load_question("style"), reply) is None

    @pytest.mark.parametrize(
        ("reply", "value"), [("0", 0.0), ("3.", 0.75), ("Score: 4", 1.0), ("- Rating: **2**", 0.5)]
    )
    def test_rubric(self, reply, value):
        assert read_text(load_question("prompt_rubric"), reply) == value

    @pytest.mark.parametrize("reply", ["5", "-1", "3/4", "2.5", ".4", "3 4", "four", "Score: 3 of 4", "34"])
    def test_what_is_no_answer_to_a_rubric(self, reply):
        assert read_text(load_question("prompt_rubric"), reply) is None

    def test_reasons_come_before_the_score(self):
        question = load_question("subject_rubric")
        assert read_text(question, "Shape: 4 legs.\nColour: red.\n\nScore: 3") == 0.75
        assert read_text(question, "Score: 3\nThough one might say 2.") is None
        assert not question.by_logprob

    @given(st.text(max_size=40))
    def test_any_text_is_an_answer_or_none(self, reply):
        assert read_text(STYLE, reply) in (None, 0.0, 1.0)

    def test_probabilities_of_all_spellings(self):
        found = read_logprobs(
            load_question("style"),
            [("Yes", math.log(0.3)), (" yes", math.log(0.1)), ("No", math.log(0.4)), ("Well", math.log(0.2))],
        )
        assert found == pytest.approx(0.5)

    def test_expectation_over_a_rubric(self):
        found = read_logprobs(
            load_question("prompt_rubric"), [("4", math.log(0.5)), ("2", math.log(0.25)), ("x", -9.0)]
        )
        assert found == pytest.approx((0.5 * 1 + 0.25 * 0.5) / 0.75)

    @pytest.mark.parametrize(
        "candidates", [[], [("Yes", math.log(0.4))], [("Yes", math.nan)], [("Yes", 3.0)], [("Yes", math.inf)]]
    )
    def test_probabilities_that_say_nothing(self, candidates):
        assert read_logprobs(load_question("style"), candidates) is None

    def test_the_first_word_may_follow_blank_tokens(self):
        tokens = [{"token": "\n", "logprob": 0.0}, {"token": "No", "logprob": -0.1, "top_logprobs": []}]
        choice = {"message": {"content": "\nNo"}, "logprobs": {"content": tokens}}
        assert _parse({"choices": [choice]}).candidates == (("No", -0.1),)

    @pytest.mark.parametrize("logprob", [10**400, float("nan"), True, None, "-1", float("-inf")])
    def test_odd_numbers_are_no_log_probabilities(self, logprob):
        choice = {"message": {"content": "No"}, "logprobs": {"content": [{"token": "No", "logprob": logprob}]}}
        found = _parse({"choices": [choice]}).candidates
        assert found is None or read_logprobs(STYLE, found) is None

    @given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=5), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(["choices", "message", "content", "logprobs", "token", "logprob", "top_logprobs"]), x, max_size=4), max_leaves=8))  # fmt: skip  # noqa: E501
    def test_any_json_is_a_reply_or_nonsense(self, content):
        try:
            _parse(content)
        except CallError as error:
            assert error.kind == "nonsense"  # noqa: PT017 - either outcome is right


class TestCalls:
    def test_by_logprob(self):
        with JudgeServer() as server:
            reward = judge([server])
            found = score(reward, pictures(6), examples(6), enable_grad=False)
        assert torch.allclose(found.value_B, believed(reward, pictures(6), examples(6)), atol=1e-6)
        assert found.valid_B.all()
        assert (found.counts["by_logprob"], found.counts["by_text"], found.counts["attempts"]) == (6, 0, 6)
        body = server.bodies[0]
        assert (body["model"], body["temperature"], body["logprobs"]) == ("tiny", 0, True)
        kinds = [part["type"] for part in body["messages"][0]["content"]]
        assert kinds == ["text", "image_url", "text", "image_url", "text"]

    def test_by_text_where_the_server_ignores_logprobs(self):
        with JudgeServer(logprobs=False) as server:
            reward = judge([server])
            found = score(reward, pictures(5), examples(5), enable_grad=False)
        assert torch.equal(found.value_B, (believed(reward, pictures(5), examples(5)) > 0.5).float())
        assert (found.counts["by_logprob"], found.counts["by_text"]) == (0, 5)

    def test_a_server_that_refuses_logprobs_is_not_asked_for_them_again(self):
        with JudgeServer(refuses=True) as server:
            reward = judge([server], concurrency=1, max_attempts=1)
            found = score(reward, pictures(4), examples(4), enable_grad=False)
        assert torch.equal(found.value_B, (believed(reward, pictures(4), examples(4)) > 0.5).float())
        assert ["logprobs" in body for body in server.bodies] == [True, False, False, False, False]
        assert found.counts["refused"] == 1

    def test_where_one_of_two_servers_refuses_logprobs_the_other_is_still_asked_for_them(self):
        with JudgeServer(refuses=True) as refusing, JudgeServer() as good:
            reward = judge([refusing, good], concurrency=8, max_attempts=1)
            first = score(reward, pictures(1, seed=3), examples(1), enable_grad=False)
            assert ["logprobs" in body for body in refusing.bodies] == [True, False], "the one that refused is asked"
            assert (first.counts["refused"], first.counts["by_text"], first.counts["attempts"]) == (1, 1, 2)
            found = score(reward, pictures(8), examples(8), enable_grad=False)
        by_text = {digest(body) for body in refusing.bodies[2:]}
        expected = [
            float(p > 0.5) if digest(asked(reward, pixels, example)) in by_text else float(p)
            for p, pixels, example in zip(
                believed(reward, pictures(8), examples(8)), pictures(8), examples(8), strict=True
            )
        ]
        assert found.value_B.tolist() == pytest.approx(expected, abs=1e-6)
        assert not any("logprobs" in body for body in refusing.bodies[2:])
        assert good.bodies
        assert all("logprobs" in body for body in good.bodies)
        assert (found.counts["by_text"], found.counts["by_logprob"]) == (len(by_text), len(good.bodies))
        assert found.counts["refused"] == 0

    def test_a_server_that_refuses_the_question_itself_is_not_blamed_for_logprobs(self):
        with JudgeServer(plan=lambda code, before: "400") as server:
            reward = judge([server])
            with pytest.warns(RewardWarning, match="refused"):
                found = score(reward, pictures(1), examples(1), enable_grad=False)
        assert not found.valid_B.any()
        assert (found.counts["attempts"], found.counts["refused"], found.counts["failed"]) == (2, 2, 1)
        assert [endpoint.takes_logprobs for endpoint in reward.service._endpoints.all] == [True]

    def test_rubric_by_text(self):
        with JudgeServer(logprobs=False, rubric=True) as server:
            reward = judge([server], "subject_rubric")
            found = score(reward, pictures(5), examples(5), enable_grad=False)
        assert "logprobs" not in server.bodies[0]
        expected = (5 * believed(reward, pictures(5), examples(5))).floor() / 4
        assert torch.allclose(found.value_B, expected)

    def test_what_does_not_apply_is_masked_and_not_asked(self):
        with JudgeServer() as server:
            given = [*examples(2), Example(id="none")]
            pixels = pictures(3)
            found = score(judge([server]), pixels, given, enable_grad=False)
            assert found.valid_B.tolist() == [True, True, False]
            assert math.isnan(found.value_B[2].item())
            pixels[0, 0, 0, 0] = math.nan
            found = score(judge([server]), pixels, given, enable_grad=False)
        assert found.valid_B.tolist() == [False, True, False]
        assert found.counts["not_applicable"] == 2
        assert sum(server.calls.values()) == 3

    def test_equal_questions_are_asked_once(self):
        with JudgeServer() as server:
            pixels = pictures(1).repeat(3, 1, 1, 1)
            found = score(judge([server]), pixels, [examples(1)[0]] * 3, enable_grad=False)
        assert found.valid_B.all()
        assert found.counts["attempts"] == sum(server.calls.values()) == 1

    def test_keeps_the_contract(self):
        with JudgeServer() as server:
            assert check_reward(judge([server]), image_size=(16, 24))

    def test_by_its_name_and_without_a_host(self):
        cls = plugins.resolve("rewards", "vlm_judge")
        made = cls(
            **plugins.check_args(cls, {"question": "style", "urls": ["http://nowhere/v1"], "served_model": "m"}, "a")
        )
        assert isinstance(made, VlmJudge)
        assert not made.differentiable
        with pytest.raises(ConfigError, match="urls"):
            plugins.check_args(cls, {"question": "style", "urls": [], "served_model": "m"}, "a")

    def test_more_fields_and_fewer(self):
        with JudgeServer() as server:
            reward = judge([server], request={"max_tokens": None, "max_completion_tokens": 9, "seed": 3})
            score(reward, pictures(1), examples(1), enable_grad=False)
        assert server.bodies[0]["max_completion_tokens"] == 9
        assert "max_tokens" not in server.bodies[0]


class TestCache:
    def test_answers_are_paid_for_once(self, tmp_path):
        args = {"cache_dir": str(tmp_path / "answers")}
        with JudgeServer() as server:
            first = score(judge([server], **args), pictures(4), examples(4), enable_grad=False)
        with JudgeServer() as server:  # another port: an endpoint is not part of the key
            again = score(judge([server], **args), pictures(4), examples(4), enable_grad=False)
            assert not server.calls
            score(judge([server], "subject", **args), pictures(4), examples(4), enable_grad=False)
            assert sum(server.calls.values()) == 4
            other = VlmJudge("style", (server.url,), "another", **args)
            score(other, pictures(4), examples(4), enable_grad=False)
            score(judge([server], **args), pictures(4, seed=5), examples(4), enable_grad=False)
            assert sum(server.calls.values()) == 12
        assert torch.equal(first.value_B, again.value_B)
        assert again.counts["from_cache"] == again.counts["by_logprob"] == 4

    def test_failures_are_not_kept(self, tmp_path):
        args = {"cache_dir": str(tmp_path), "max_attempts": 1}
        with JudgeServer(plan=lambda code, before: "500") as server, pytest.warns(RewardWarning):
            assert not score(judge([server], **args), pictures(2), examples(2), enable_grad=False).valid_B.any()
        with JudgeServer() as server:
            assert score(judge([server], **args), pictures(2), examples(2), enable_grad=False).valid_B.all()

    @pytest.mark.parametrize(
        "content",
        ["", "{", "[]", "null", '{"version": 1}', '{"version": 1, "key": "ab", "value": 2, "by_logprob": true}',
         '{"version": 1, "key": "ab", "value": NaN, "by_logprob": true}',
         '{"version": 1, "key": "cd", "value": 0.5, "by_logprob": true}',
         '{"version": 1, "key": "ab", "value": true, "by_logprob": true}'],
    )  # fmt: skip
    def test_damaged_entries_count_as_missing(self, tmp_path, content):
        cache = AnswerCache(tmp_path)
        (tmp_path / "ab").mkdir()
        (tmp_path / "ab" / "ab.json").write_text(content)
        assert cache.get("ab") is None
        cache.put("ab", Answer(value=0.25, by_logprob=False))
        assert cache.get("ab") == Answer(value=0.25, by_logprob=False)
        assert [path.name for path in tmp_path.rglob("*.*")] == ["ab.json"]

    def test_a_folder_that_cannot_be_written_is_refused(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match="cache_dir"):
            VlmJudge("style", ("http://nowhere/v1",), "m", cache_dir=str(tmp_path / "file" / "x"))


class TestEndpoints:
    @staticmethod
    def make(n: int = 1, **settings: Any) -> tuple[Endpoints, list[float]]:
        now = [0.0]
        args = {"concurrency": 8, "adaptive": True, "eject_after": 3, "eject_s": 10.0, **settings}
        return Endpoints([f"e{i}" for i in range(n)], clock=lambda: now[0], **args), now

    def test_stated_concurrency_is_kept(self):
        endpoints, _ = self.make(adaptive=False)
        leases = [endpoints.take() for _ in range(8)]
        assert all(leases)
        assert endpoints.take() is None
        endpoints.failed(leases[0], "rate_limited")
        assert endpoints.take() is not None
        assert endpoints.take() is None

    def test_success_raises_the_limit_by_one_a_round_and_no_further_than_stated(self):
        endpoints, _ = self.make()
        limits = [endpoints.all[0].limit]
        for _ in range(12):
            for lease in [endpoints.take() for _ in range(int(limits[-1]))]:
                endpoints.succeeded(lease)
            limits.append(endpoints.all[0].limit)
        steps = [b - a for a, b in itertools.pairwise(limits)]
        assert limits[0] == 4
        assert all(0.75 <= step <= 1 for step in steps[:3])
        assert limits[-1] == 8

    def test_overload_halves_it_once_for_the_calls_under_way(self):
        endpoints, now = self.make()
        leases = [endpoints.take() for _ in range(4)]
        now[0] = 1.0
        for lease in leases[:3]:
            endpoints.failed(lease, "rate_limited")
        assert endpoints.all[0].limit == 2
        endpoints.failed(leases[3], "connection")
        lease = endpoints.take()
        now[0] = 2.0
        endpoints.failed(lease, "server_error")
        assert endpoints.all[0].limit == 1
        lease = endpoints.take()
        now[0] = 3.0
        endpoints.failed(lease, "timeout")
        assert endpoints.all[0].limit == 1

    def test_a_broken_endpoint_is_left_alone_and_tried_again(self):
        endpoints, now = self.make(2)
        bad, good = endpoints.all
        for _ in range(3):
            lease = endpoints.take(not_at=good)
            assert lease.endpoint is bad
            endpoints.failed(lease, "server_error")
        assert {endpoints.take().endpoint.url for _ in range(3)} == {"e1"}
        now[0] = 11.0
        lease = endpoints.take(not_at=good)
        assert lease.endpoint is bad
        for _ in range(3):
            endpoints.failed(lease, "server_error")
            now[0] += 0.1
            lease = endpoints.take(not_at=good)
        assert lease.endpoint is good
        assert bad.ejected_until == pytest.approx(11.2 + 20)

    def test_the_last_one_is_never_ejected_and_429_never_ejects(self):
        endpoints, _ = self.make(1)
        for _ in range(9):
            endpoints.failed(endpoints.take(), "server_error")
        assert endpoints.take() is not None
        endpoints, _ = self.make(2)
        for _ in range(9):
            endpoints.failed(endpoints.take(not_at=endpoints.all[1]), "rate_limited")
        assert all(e.ejected_until == 0 for e in endpoints.all)

    def test_the_freer_endpoint_takes_the_next_call(self):
        endpoints, _ = self.make(2)
        first, second = endpoints.take().endpoint, endpoints.take().endpoint
        assert first is not second
        assert endpoints.take(not_at=first).endpoint is second

    def test_no_more_calls_at_a_time_than_stated(self):
        with JudgeServer() as server:
            found = score(judge([server], concurrency=3, adaptive=False), pictures(20), examples(20), enable_grad=False)
        assert found.valid_B.all()
        assert server.peak <= 3

    def test_a_dead_endpoint_costs_nothing_but_calls(self):
        dead = JudgeServer()
        with dead:
            pass
        with JudgeServer() as server:
            reward = judge([dead, server], eject_after=2, eject_s=600)
            found = score(reward, pictures(20), examples(20), enable_grad=False)
            assert found.valid_B.all()
            assert found.counts["connection"] >= 2
            again = score(reward, pictures(20, seed=3), examples(20), enable_grad=False)
        assert again.counts["connection"] == 0
        assert again.counts["attempts"] == 20


class TestKeys:
    KEY = "sk-hush-0123456789"

    def test_the_key_comes_from_the_environment_and_goes_nowhere_else(self, monkeypatch, tmp_path):
        monkeypatch.setenv("JUDGE_KEY", self.KEY)
        with JudgeServer(key=self.KEY) as server:
            reward = judge([server], key_env="JUDGE_KEY", cache_dir=str(tmp_path))
            assert score(reward, pictures(2), examples(2), enable_grad=False).valid_B.all()
            copied = pickle.loads(pickle.dumps(reward))
            assert torch.equal(
                score(copied, pictures(2), examples(2), enable_grad=False).value_B,
                score(reward, pictures(2), examples(2), enable_grad=False).value_B,
            )
        assert self.KEY not in json.dumps(server.bodies)
        assert self.KEY.encode() not in pickle.dumps(reward) + b"".join(
            p.read_bytes() for p in tmp_path.rglob("*.json")
        )
        assert self.KEY not in repr(vars(reward)) + repr(vars(reward.service))

    def test_a_refused_key_is_not_repeated(self, monkeypatch):
        monkeypatch.setenv("JUDGE_KEY", self.KEY)
        with JudgeServer(key="another") as server, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = score(judge([server], key_env="JUDGE_KEY"), pictures(2), examples(2), enable_grad=False)
        assert not found.valid_B.any()
        assert (found.counts["refused"], found.counts["attempts"]) == (2, 2)
        (said,) = [str(warning.message) for warning in caught]
        assert "HTTP 401" in said
        assert "Incorrect API key" in said
        assert "hush" not in said

    def test_variables_that_cannot_be_used(self, monkeypatch):
        monkeypatch.delenv("JUDGE_KEY", raising=False)
        with pytest.raises(ConfigError, match="JUDGE_KEY is not set"):
            VlmJudge("style", ("http://nowhere/v1",), "m", key_env="JUDGE_KEY")
        monkeypatch.setenv("JUDGE_KEY", "hush\nX-Other: hush")
        with pytest.raises(ConfigError, match="no key") as raised:
            VlmJudge("style", ("http://nowhere/v1",), "m", key_env="JUDGE_KEY")
        assert "hush" not in str(raised.value)
        with pytest.raises(ConfigError, match="never the key itself") as raised:
            VlmJudge("style", ("http://nowhere/v1",), "m", key_env=self.KEY)
        assert "hush" not in str(raised.value)

    @pytest.mark.parametrize(
        "url",
        [
            "localhost:8000",
            "http://",
            "ftp://host/v1",
            "http://me:hush@host/v1",
            "http://host/v1?key=hush",
            "http://h:x/v1",
        ],
    )
    def test_urls_that_cannot_be_used(self, url):
        with pytest.raises(ConfigError, match="urls") as raised:
            check_url(url)
        assert "hush" not in str(raised.value)

    def test_urls_that_can(self):
        assert check_url("http://h:80/v1/") == check_url("http://h:80/v1/chat/completions") == "http://h:80/v1"


def test_an_experiment_may_be_shown_and_needs_no_source() -> None:
    args = {"served_model": "owner/model", "cache_dir": "./answers", "key_env": "OPENAI_API_KEY", "question": "style"}
    assert list(find_sources(args, "a")) == []
    assert materialise(args, "a") == args
    assert redact(args) == args


def test_a_picture_is_sent_as_its_8_bit_file() -> None:
    pixels = pictures(1)[0] * 1.2 - 0.1
    picture = Image.open(io.BytesIO(base64.b64decode(data_url(pixels).partition(",")[2])))
    levels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    assert torch.equal(levels, (pixels.clamp(0, 1) * 255).round().byte())
    assert to_pil(torch.zeros(3, 40, 20), max_side=10).size == (5, 10)
    assert to_pil(torch.zeros(3, 4, 2), max_side=10).size == (2, 4)


class TestEncoding:
    def test_a_reference_is_encoded_once_for_all_questions_about_it(self, monkeypatch):
        encoded = self.count(monkeypatch)
        reference = Example(id="a", style_refs=(pictures(1, seed=7)[0],))
        with JudgeServer() as server:
            reward = judge([server])
            found = score(reward, pictures(6), [reference] * 6, enable_grad=False)
            assert sorted(encoded) == sorted([*map(code_of, pictures(6)), code_of(reference.style_refs[0])])
        assert torch.allclose(found.value_B, believed(reward, pictures(6), [reference] * 6), atol=1e-6)

    def test_the_first_call_is_made_before_the_last_picture_is_encoded(self, monkeypatch):
        """The last picture's encoding waits for the first answer; encoded before all calls, it would wait for ever."""
        answered = threading.Event()
        last = code_of(pictures(3)[2])

        def hold(code: str) -> None:
            if code == last:
                assert answered.wait(20)

        self.count(monkeypatch, hold)
        with JudgeServer(named=lambda body: answered.set() or digest(body)) as server:
            found = score(judge([server]), pictures(3), examples(3), enable_grad=False)
        assert found.valid_B.all()

    def test_what_is_kept_is_bounded_and_the_latest(self, monkeypatch):
        shown, expected = zip(*[(Picture.of(pixels), data_url(pixels)) for pixels in pictures(3)], strict=True)
        urls = DataUrls(None, kept_characters=2 * max(map(len, expected)))
        encoded = self.count(monkeypatch)
        made = [urls(shown[i]) for i in (0, 1, 0, 2, 0, 1)]
        assert encoded == [shown[i].code for i in (0, 1, 2, 1)]
        assert made == [expected[i] for i in (0, 1, 0, 2, 0, 1)]
        assert urls._characters == sum(len(future.result()) for future in urls._made.values()) <= urls._kept_characters

    def test_a_failure_is_not_kept(self, monkeypatch):
        urls, (picture,) = DataUrls(None), [Picture.of(pictures(1)[0])]

        def full(code: str) -> None:
            raise MemoryError(code)

        with monkeypatch.context() as patch:
            self.count(patch, full)
            with pytest.raises(MemoryError):
                urls(picture)
        assert urls(picture) == data_url(pictures(1)[0])

    @staticmethod
    def count(monkeypatch: Any, before: Any = lambda code: None) -> list[str]:
        """The codes of pictures in the order in which they are encoded; `before` is called with each."""
        encoded, plain = [], pictures_module._data_url

        def counted(picture: Image.Image) -> str:
            levels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
            code = Picture.of(levels / 255).code
            encoded.append(code)
            before(code)
            return plain(picture)

        monkeypatch.setattr(pictures_module, "_data_url", counted)
        return encoded


def code_of(pixels: Tensor) -> str:
    return Picture.of(pixels).code


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2))
def test_equal_pixels_make_equal_pictures_and_no_others(height, width, channel):
    pixels = torch.rand(3, height, width)
    assert Picture.of(pixels) == Picture.of(pixels.clone())
    other = pixels.clone()
    other[channel, -1, -1] = (other[channel, -1, -1] + 0.5) % 1
    assert Picture.of(pixels) != Picture.of(other)
    turned = pixels.reshape(3, width, height)
    assert height == width or Picture.of(turned) != Picture.of(pixels)
