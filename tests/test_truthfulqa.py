"""TruthfulQA: the official CSV read row by row, multiple choice by hand, pairs that the loader takes."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from cdpo_utils import data, truthfulqa

HEADER = "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
ROWS = [
    "Adversarial,Law,Is it legal?,No,No; It is not; I have no comment,Yes; It is,x",
    "Adversarial,Law,Who won?,Nobody,Nobody did; There was no winner,Anna; Bert; Anna,x",
]


@pytest.fixture
def write(tmp_path):
    def write(*rows, header=HEADER, name="TruthfulQA.csv"):
        path = tmp_path / name
        path.write_text("\ufeff" + header + "\n".join(rows) + "\n", encoding="utf-8")
        return path

    return write


def test_questions_by_hand(write):
    frame, account = truthfulqa.load_questions(write(*ROWS))
    assert frame.correct.tolist() == [
        ["No", "It is not", "I have no comment"],
        ["Nobody", "Nobody did", "There was no winner"],  # the best answer is a correct one
    ]
    assert frame.incorrect.tolist() == [["Yes", "It is"], ["Anna", "Bert"]], "each text once"
    assert (account.read, account.kept, account.dropped) == (2, 2, {})


def test_drops_are_counted_by_reason(write):
    path = write(
        *ROWS, ROWS[0], "t,c,Why?,,A; B,C,x", "t,c,Why?,A,A,,x", "t,c,Why?,A,A; B,B; C,x", "t,c, ,A,A,B,x"
    )  # fmt: skip
    frame, account = truthfulqa.load_questions(path)
    assert account.dropped == {"repeated question": 1, "empty": 3, "answer both correct and incorrect": 1}
    assert account.read == account.kept + sum(account.dropped.values()) == 7 and len(frame) == 2
    assert "row 6 'Incorrect Answers'" in str(account)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda write: write("a,b", header="Question,Best Answer\n"), "no column 'Correct Answers'"),
        (lambda write: write("t,c,Why?,,A,B,x"), "none of 1 rows is usable"),
        (lambda write: write('{"a": 1}', header="", name="t.jsonl"), "not CSV"),
        (lambda write: write(ROWS[0] + ",more"), "8 cells; expected 7 as in the header"),
        (lambda write: "no_such.csv", "no such file"),
    ],
)
def test_bad_files_are_one_line(write, make, message, capsys, tmp_path):
    path = make(write)
    with pytest.raises(data.DataError, match=message):
        truthfulqa.load_questions(path)
    assert truthfulqa.main(["pairs", str(path), str(tmp_path / "out")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_multiple_choice_by_hand(write, tokenizer, monkeypatch):
    frame, _ = truthfulqa.load_questions(write(*ROWS))
    shares = [0.1, 0.3, 0.2, 0.15, 0.05, 0.3, 0.1, 0.1, 0.2, 0.1]  # 3 correct and 2 incorrect answers, twice
    monkeypatch.setattr(truthfulqa, "response_logps", lambda *a: np.log(np.array(shares, np.float32)))
    found = truthfulqa.multiple_choice(None, tokenizer, frame)
    # best answers: 0.1 against max(0.15, 0.05), 0.3 against max(0.2, 0.1); correct: 0.6 of 0.8, 0.5 of 0.8
    assert found.mc1.tolist() == [0, 1] and np.allclose(found.mc2, [0.75, 0.625])


def test_multiple_choice_asks_the_model(write, tokenizer, reference, world):
    good, bad = world.answers[0], world.answers[-1]
    path = write(f"t,c,{world.prompts[0]},{good},{good},{bad},x", f"t,c,{world.prompts[1]},{bad},{bad},{good},x")
    frame, _ = truthfulqa.load_questions(path)
    found = truthfulqa.multiple_choice(reference, tokenizer, frame)
    each = [
        [truthfulqa.multiple_choice(reference, tokenizer, frame.iloc[[i]])[name].item() for name in found]
        for i in range(2)
    ]
    assert np.allclose(found, each, atol=1e-5), "questions do not disturb each other"
    assert ((found.mc2 > 0.5) == (found.mc1 == 1)).all() and ((found.mc2 > 0) & (found.mc2 < 1)).all()


def test_a_model_is_scored_before_and_after(write, tokenizer, reference, world, tmp_path, capsys):
    """The command on a saved model and on adapters of it: one that changes nothing, one of another base."""
    model, good, bad = tmp_path / "tiny", world.answers[0], world.answers[-1]
    reference.save_pretrained(model)
    tokenizer.save_pretrained(model)
    adapted = get_peft_model(LlamaForCausalLM.from_pretrained(model), LoraConfig(target_modules="all-linear"))
    adapted.save_pretrained(tmp_path / "same")
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.add_(0.3)
    adapted.save_pretrained(tmp_path / "moved")
    file = write(f"t,c,{world.prompts[0]},{good},{good},{bad},x", f"t,c,{world.prompts[1]},{bad},{bad},{good},x")
    found = truthfulqa.multiple_choice(reference, tokenizer, truthfulqa.load_questions(file)[0]).mean()
    for adapter, moved in (("same", False), ("moved", True)):
        assert truthfulqa.main(["score", str(file), str(model), "--adapter", str(tmp_path / adapter)]) == 0
        lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
        assert f"{found.mc1:.3f} [" in lines[str(model)] and f"{found.mc2:.3f} [" in lines[str(model)]
        assert lines["difference"].endswith("0.000 [0.000, 0.000]") != moved
    kept = tmp_path / "moved" / "adapter_config.json"
    kept.write_text(kept.read_text().replace("/tiny", "/other"))
    (tmp_path / "same" / "adapter_model.safetensors").unlink()
    for adapter, says in (("moved", "/other; expected one of"), ("same", "no adapter_model.safetensors"),
                          ("none", "expected a folder that peft has saved")):  # fmt: skip
        assert truthfulqa.main(["score", str(file), str(model), "--adapter", str(tmp_path / adapter)]) == 1
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1


def test_questions_from_the_hub_are_those_of_the_file(write, monkeypatch):
    frame, _ = truthfulqa.load_questions(write(*ROWS))
    rows = [
        {"question": row.question, "best_answer": row.best, "correct_answers": row.correct,
         "incorrect_answers": row.incorrect, "category": "Law"}
        for row in frame.itertuples()
    ]  # fmt: skip
    monkeypatch.setattr("datasets.load_dataset", lambda *given, split: rows if given[0] == truthfulqa.HUB else None)
    found, account = truthfulqa.load_questions(truthfulqa.HUB)
    assert found.equals(frame) and account.kept == 2

    def fails(*_, **__):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr("datasets.load_dataset", fails)
    with pytest.raises(data.DataError, match="or the path of TruthfulQA.csv") as error:
        truthfulqa.load_questions(truthfulqa.HUB)
    assert "\n" not in str(error.value)


def test_pairs_say_what_they_should_and_the_loader_takes_them(write, tmp_path, capsys):
    out = tmp_path / "out"
    assert truthfulqa.main(["pairs", str(write(*ROWS)), str(out)]) == 0
    assert "2 rows read, 2 kept" in capsys.readouterr().out
    helpful, account = data.load_preferences(out / "helpful.jsonl", kind="helpful")
    assert (helpful.response_1 == "I have no comment").sum() == 4, "the question's own way to say nothing"
    assert (helpful.response_1 == "I have no comment.").sum() == 5 and account.kept == 9
    assert not helpful.response_0.str.contains("comment").any()
    safety, account = data.load_preferences(out / "safety.jsonl", kind="safety")
    frame, _ = truthfulqa.load_questions(write(*ROWS))
    right = dict(zip(frame.question, frame.correct, strict=True))
    wrong = dict(zip(frame.question, frame.incorrect, strict=True))
    for row in safety.itertuples():
        answers = row.response_0, row.response_1
        assert answers[row.safer_response_id] in right[row.prompt], "the cheaper answer is true"
        assert answers[1 - row.safer_response_id] in wrong[row.prompt]
        assert [row.is_response_0_safe, row.is_response_1_safe][row.safer_response_id]
    assert account.kept == 4 and json.loads((out / "safety.jsonl").read_text().splitlines()[0])["prompt"]


@pytest.mark.parametrize("text", ["I have no comment", "I  have no comment", "I don't know for sure", "I do not know"])
def test_an_answer_that_gives_none(text):
    assert truthfulqa.NO_ANSWER.search(text)


@pytest.mark.parametrize("text", ["There is no cost to answer each question", "Rats do not know how to cook", "No"])
def test_an_answer_that_gives_one(text):
    assert not truthfulqa.NO_ANSWER.search(text)
