"""Judges: learned scores, a model in memory, and a real server on this machine."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch

from cdpo_utils import judges, policies

PROMPTS, OURS, THEIRS = ["p", "q"], [["long answer", "x"], ["longest answer", "yy"]], [["short", "y"], ["brief", "zzz"]]


def longer(prompts, first, second):
    return judges.scores_judge(lambda p, answers: np.array([len(a) for a in answers]))(prompts, first, second)


def test_win_rate_by_hand():
    found = judges.win_rate(longer, PROMPTS, OURS, THEIRS)  # wins, tie; wins, loss
    assert found["rate"] == pytest.approx((1 + 0.5 + 1 + 0) / 4) and found["consistent"] == 1
    assert found["low"] == 0.5 and found["high"] == 0.75, "prompts are resampled: 0.75 and 0.5"
    assert judges.win_rate(longer, PROMPTS, THEIRS, OURS)["rate"] == pytest.approx(1 - found["rate"])


def test_a_judge_that_prefers_a_place_is_told_by_its_consistency():
    found = judges.win_rate(lambda p, a, b: np.ones(len(a)), PROMPTS, OURS, THEIRS)
    assert found["rate"] == 0.5 and found["consistent"] == 0


def test_a_model_in_memory_judges_by_its_letters():
    texts = [judges.FORM.format(question=q, prompt="p", first="a", second="b") for q in judges.QUESTIONS.values()]
    tokenizer = policies.word_tokenizer([*texts, "A B a b p"])
    model = policies.small_llama(tokenizer, seed=0, width=16)
    a, b = (tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "AB")
    asked = policies.encode_prompts(tokenizer, judges._texts("safe", ["p", "p"], ["a", "b"], ["b", "a"]))
    expected = [model(torch.tensor([ids])).logits[0, -1, [a, b]].argmax().item() == 0 for ids in asked]
    verdicts = judges.local_judge(model, tokenizer, "safe")(["p", "p"], ["a", "b"], ["b", "a"])
    assert verdicts.tolist() == [float(e) for e in expected] and a != b
    with pytest.raises(ValueError, match="question='kind'; expected one of helpful, safe"):
        judges.local_judge(model, tokenizer, "kind")(["p"], ["a"], ["b"])


@pytest.fixture
def server():
    """A server of chat completions that prefers the longer answer, and remembers what it was sent."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, self.headers.get("Authorization"), body))
            text = body["messages"][0]["content"]
            first, second = text.split("Answer A: ")[1].split("\n\nAnswer B: ")
            broken = "breakdown" in text and len(seen) < 3
            reply = "A." if len(first) > len(second) else " b" if len(second) > len(first) else "Neither"
            answer = json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]}).encode()
            self.send_response(500 if broken else 200)
            self.end_headers()
            self.wfile.write(b"" if broken else answer)

        def log_message(self, *args):
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/v1", seen
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [("A", 1), ("b", 0), ("**B**", 0), (" (A) ", 1), ("B.", 0), ("Answer B", 0.5), ("Both", 0.5), ("As an", 0.5),
     ("A good", 0.5), ("", 0.5), (None, 0.5)],
)  # fmt: skip
def test_a_reply_is_a_letter_or_a_tie(reply, verdict):
    assert judges._letter(reply) == verdict


def test_a_server_judges_without_a_key_and_with_one(server, monkeypatch):
    url, seen = server
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    judge = judges.http_judge(url, "tiny", "helpful")
    assert judge(["p"] * 3, ["longer", "b", "c"], ["short", "bb", "d"]).tolist() == [1, 0, 0.5]
    path, key, body = seen[0]
    assert path == "/v1/chat/completions" and key is None and body["model"] == "tiny" and body["temperature"] == 0
    assert judges.QUESTIONS["helpful"] in body["messages"][0]["content"]
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    judge(["p"], ["a"], ["b"])
    assert seen[-1][1] == "Bearer secret"
    assert (
        judges.win_rate(judge, PROMPTS, OURS, THEIRS)["rate"] == judges.win_rate(longer, PROMPTS, OURS, THEIRS)["rate"]
    )


def test_a_server_that_stumbles_is_asked_again_and_one_that_is_gone_is_named(server):
    url, seen = server
    assert judges.http_judge(url, "tiny", "safe")(["breakdown"], ["aa"], ["b"]).tolist() == [1] and len(seen) == 3
    seen.clear()
    with pytest.raises(ConnectionError, match="judge tiny at .*: HTTPError: HTTP Error 500"):
        judges.http_judge(url, "tiny", "safe", tries=2)(["breakdown"], ["aa"], ["b"])
    with pytest.raises(ConnectionError, match="judge tiny at http://127.0.0.1:9"):
        judges.http_judge("http://127.0.0.1:9", "tiny", "safe", tries=1)(["p"], ["aa"], ["b"])
