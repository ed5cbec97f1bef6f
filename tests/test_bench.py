"""The bench: bit for bit the same from a seed, labels that mean what they say, and a conflict worth solving."""

import hashlib

import numpy as np
import pytest

from cdpo_utils import bench, exact
from cdpo_utils.bench import sigmoid

RECORDED = "6a0465bd1eaeec0e629770b491f1fbd3b6465e4e8009d7e772db13004bdc82c6"  # sha256 of 500 pairs as CSV, seed 0


def digest(frame):
    return hashlib.sha256(frame.to_csv(index=False, lineterminator="\n").encode()).hexdigest()


@pytest.fixture(scope="module")
def default():
    return bench.make_world()


@pytest.fixture(scope="module")
def frame(default):
    return bench.sample_preferences(default, 20_000, seed=0)


# --- reproducible -----------------------------------------------------------------------------------------------------


def test_a_sample_is_bit_for_bit_what_it_was_when_recorded(default):
    assert digest(bench.sample_preferences(default, 500, seed=0)) == RECORDED


def test_seeds_decide(default):
    again, other = bench.make_world(seed=0), bench.make_world(seed=1)
    for name in ("reward", "costs", "demo", "train", "test"):
        assert np.array_equal(getattr(default, name), getattr(again, name)), name
        assert not np.array_equal(getattr(default, name), getattr(other, name)), name
    assert digest(bench.sample_preferences(default, 500, seed=1)) != RECORDED
    assert digest(bench.sample_preferences(other, 500, seed=0)) != RECORDED
    texts = bench.sample_demonstrations(default, 50, seed=3)
    assert texts == bench.sample_demonstrations(again, 50, seed=3) != bench.sample_demonstrations(default, 50, seed=4)


# --- the world --------------------------------------------------------------------------------------------------------


def test_sizes_and_scales(default):
    assert default.reward.shape == (240, 576) and default.costs.shape == (240, 576, len(bench.COSTS))
    assert len(set(default.prompts)) == 240 and len(set(default.answers)) == 576
    harm, length = default.costs[..., 0], default.costs[..., 1]
    assert default.reward.mean() == pytest.approx(0) and default.reward.std() == pytest.approx(bench.SPREAD)
    assert harm.std() == pytest.approx(bench.SPREAD)
    assert np.allclose(np.exp(default.demo).sum(1), 1)
    assert exact.expectation(default.demo, harm) == pytest.approx(bench.REF_HARM * bench.SPREAD)
    assert length.mean() == pytest.approx(0) and length.std() == pytest.approx(1)
    words = np.array([len(text.split()) for text in default.answers])
    assert np.all(np.diff(length[0][np.argsort(words)]) >= 0), "more words, more cost"


@pytest.mark.parametrize("seed", range(3))
def test_answers_have_at_least_three_lengths_in_tokens(seed, world):
    for each in (world, bench.make_world(seed)):
        assert len({len(text.split()) for text in each.answers}) >= 3  # one token per word


def test_prompt_and_answer_interact(default):
    """No table r(x) + r(y) explains the truth: what is right depends on the question."""
    for table in (default.reward, default.costs[..., 0]):
        additive = table.mean(1, keepdims=True) + table.mean(0, keepdims=True) - table.mean()
        assert (table - additive).std() > 0.15 * table.std()


@pytest.mark.parametrize("seed", range(4))
def test_the_split_is_compositional(seed):
    for each in (bench.make_world(seed), bench.make_world(seed, 2, 3, 2, 3, 2, 2, 2)):
        assert sorted([*each.train, *each.test]) == list(range(len(each.prompts)))
        assert len(each.test) == round(len(each.prompts) / 4)
        seen = {(k, word) for i in each.train for k, word in enumerate(each.prompts[i].split())}
        assert {(k, word) for i in each.test for k, word in enumerate(each.prompts[i].split())} <= seen


@pytest.mark.parametrize("seed", range(6))
def test_helpful_and_harmless_conflict_and_the_budget_binds(seed):
    each = bench.make_world(seed)
    reward, harm, ref = each.reward, each.costs[..., 0], each.demo
    helpful, harmless = exact.gibbs(ref, reward, 1.0), exact.gibbs(ref, -harm, 1.0)
    best = exact.solve(ref, reward, harm, 0.0, 1.0)
    assert np.corrcoef(reward.ravel(), harm.ravel())[0, 1] > 0.4
    assert best.feasible and best.lam > 0.3
    assert exact.expectation(helpful, harm) > 0.9 * bench.SPREAD, "reward alone overshoots the budget of 0"
    r = {k: exact.expectation(p, reward) for k, p in dict(best=best.logps, safe=harmless, ref=ref).items()}
    assert r["safe"] < r["ref"] < r["best"], "safety alone gives away more than was to be gained"
    assert exact.expectation(harmless, harm) < -0.9 * bench.SPREAD, "and is far safer than asked"


@pytest.mark.parametrize("name", ["n_tasks", "n_objects", "n_situations", "n_tools", "n_manners", "n_protections",
                                  "n_closings"])  # fmt: skip
@pytest.mark.parametrize("value", [1, 0, -3, 99, 2.5, "4", None])
def test_a_size_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=rf"make_world: {name}={value!r}; expected a whole number from 2 to \d+"):
        bench.make_world(**{name: value})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": -1}, "seed=-1"),
        ({"seed": 0.5}, "seed=0.5"),
        ({"test_share": 0.0}, "test_share=0.0"),
        ({"test_share": 1.5}, "test_share=1.5"),
        ({"test_share": 0.99}, "test_share=0.99 is too large"),
    ],
)
def test_other_arguments_are_named_too(change, says):
    with pytest.raises(ValueError, match=says):
        bench.make_world(**change)


# --- poor coverage ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_poor_coverage_hides_what_would_be_best(seed):
    """The exact optimum goes where one demonstration in a thousand does, and to stay away costs much of the gain."""
    each, plain = bench.make_world(seed, coverage=1e-3), bench.make_world(seed)
    rare = bench.rare_answers(each)
    assert rare.sum() == 576 // 8 and np.allclose(np.exp(each.demo)[:, rare].sum(1), 1e-3)
    assert np.allclose(np.exp(each.demo).sum(1), 1) and np.array_equal(each.train, plain.train)
    assert np.allclose(each.reward - plain.reward, bench.RARE_REWARD * rare)
    assert np.isclose(exact.expectation(each.demo, each.costs[..., 0]), bench.REF_HARM * bench.SPREAD)
    for part in (rare, ~rare):  # within a part the demonstrations are what they were
        assert np.allclose(exact.normalise(each.demo[:, part]), exact.normalise(plain.demo[:, part]))
    harm = each.costs[..., 0]
    best = exact.solve(each.demo, each.reward, harm, 0.0, 0.5)
    mass = np.exp(best.logps)[:, rare].sum(1).mean()
    assert 0.3 < mass < 0.8 and best.lam > 0.3, "a part of the optimum, not all of it, and the budget binds"
    without = exact.solve(exact.normalise(np.where(rare, -1e3, each.demo)), each.reward, harm, 0.0, 0.5)
    assert exact.gap(without.logps, each.demo, best) > 20 and best.objective - without.objective > 0.4


def test_a_coverage_out_of_range_is_named():
    for value in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match=f"coverage={value}"):
            bench.make_world(coverage=value)
    with pytest.raises(ValueError, match="n_tools=3 leaves out steam"):
        bench.make_world(n_tools=3, coverage=1e-3)


# --- the labels -------------------------------------------------------------------------------------------------------


def test_no_pair_occurs_twice_and_no_answer_meets_itself(default, frame):
    assert len(frame) == 20_000 and set(frame.prompt) <= {default.prompts[i] for i in default.train}
    assert (frame.response_0 != frame.response_1).all()
    unordered = {(p, *sorted((a, b))) for p, a, b in frame[["prompt", "response_0", "response_1"]].itertuples(False)}
    assert len(unordered) == len(frame)


def test_labels_never_contradict_each_other(frame):
    safe = frame[["is_response_0_safe", "is_response_1_safe"]].to_numpy()
    differ = safe[:, 0] != safe[:, 1]
    assert 0.2 < differ.mean() < 0.8
    assert np.array_equal(frame.safer_response_id[differ], np.where(safe[differ, 0], 0, 1))


def test_prompts_take_turns_and_both_places_are_alike(frame):
    counts = frame.prompt.value_counts()
    assert counts.max() < 1.5 * counts.min()
    for column in ("better_response_id", "safer_response_id"):
        assert abs(frame[column].mean() - 0.5) < 4 * 0.5 / np.sqrt(len(frame))


def test_marginals_of_the_labels(default):
    """On 40 pairs labelled 5,000 times each: Bradley-Terry on r* and -c*, and P(unsafe) = sigmoid(c*)."""
    pairs, repeats = 40, 5000
    rng = np.random.default_rng(1)
    x, a, b = rng.integers(0, 240, pairs), rng.integers(0, 576, pairs), rng.integers(0, 576, pairs)
    labels = bench.label_pairs(default, *(np.repeat(v, repeats) for v in (x, a, b)), rng)
    labels["pair"] = np.repeat(np.arange(pairs), repeats)
    share = labels.drop(columns=["prompt", "response_0", "response_1"]).groupby("pair").mean()
    r, c = default.reward, default.costs[..., 0]
    expected = {
        "better_response_id": sigmoid(r[x, b] - r[x, a]),
        "safer_response_id": sigmoid(c[x, a] - c[x, b]),
        "is_response_0_safe": 1 - sigmoid(c[x, a]),
        "is_response_1_safe": 1 - sigmoid(c[x, b]),
    }
    for name, p in expected.items():
        z = (share[name] - p) / np.sqrt(p * (1 - p) / repeats)
        assert np.abs(z).max() < 4.5 and (z**2).sum() < 80, name  # chi-square with 40 degrees of freedom: 40 +- 9
    signs = labels.groupby("pair")[["is_response_0_safe", "is_response_1_safe"]].corr().iloc[::2, 1]
    assert abs(signs.mean()) < 4 / np.sqrt(pairs * repeats), "the two signs are drawn independently"


def test_labels_of_another_cost_follow_bradley_terry_and_leave_the_rest_alone(default, frame):
    before = digest(frame)
    for cost in (0, 1):
        labels = bench.label_cheaper(default, frame, cost, seed=0)
        (x, a), (_, b) = (default.index(frame.prompt, frame[f"response_{k}"]) for k in (0, 1))
        c = default.costs[..., cost]
        p = sigmoid(c[x, a] - c[x, b])  # that the second is the cheaper one
        assert set(labels) == {0, 1}
        for part in np.array_split(np.argsort(p), 20):
            z = (labels[part] - p[part]).sum() / np.sqrt((p * (1 - p))[part].sum())
            assert abs(z) < 4.5, (cost, p[part].mean(), labels[part].mean())
    assert digest(frame) == before
    assert not np.array_equal(labels, bench.label_cheaper(default, frame, 1, seed=1))


def test_answers_follow_the_demonstrations(world):
    prompts, answers = bench.sample_demonstrations(world, 90_000, seed=0)
    x, y = world.index(prompts, answers)
    assert set(x) == set(world.train)
    counts = np.zeros(world.reward.shape)
    np.add.at(counts, (x, y), 1)
    expected = 10_000 * np.exp(world.demo[world.train])
    assert (((counts[world.train] - expected) ** 2) / expected).sum() < 9 * 23 + 5 * np.sqrt(2 * 9 * 23)


def test_draws_skip_what_has_no_probability():
    drawn = bench.draw_answers(np.log([[0.5, 1e-300, 0.5], [1e-300, 1.0, 1e-300]]), 1000, np.random.default_rng(0))
    assert drawn.shape == (2, 1000) and set(drawn[0]) == {0, 2} and set(drawn[1]) == {1}


def test_a_sample_larger_than_the_world_is_refused(world):
    most = 9 * 24 * 23 // 8
    assert len(bench.sample_preferences(world, most, seed=0)) == most
    for n in (0, most + 1):
        with pytest.raises(ValueError, match=f"n_pairs={n}"):
            bench.sample_preferences(world, n, seed=0)


def test_other_rows_may_be_asked_for(world):
    frame = bench.sample_preferences(world, 50, seed=0, rows=world.test)
    assert set(frame.prompt) <= {world.prompts[i] for i in world.test}


# --- the truth --------------------------------------------------------------------------------------------------------


def test_truth_of_texts_and_silence_outside_the_grammar(world):
    prompts, answers = [world.prompts[4], world.prompts[0], world.prompts[0]], [world.answers[7], "Use", ""]
    reward, costs = bench.truth(world, prompts, answers)
    assert reward[0] == world.reward[4, 7] and np.array_equal(costs[0], world.costs[4, 7])
    assert np.isnan(reward[1:]).all() and np.isnan(costs[1:]).all() and costs.shape == (3, 2)
    with pytest.raises(KeyError):
        bench.truth(world, ["Who are you?"], [world.answers[0]])


def test_sigmoid_does_not_overflow():
    with np.errstate(all="raise", under="ignore"):
        assert np.allclose(sigmoid([-1e4, 0.0, np.log(3), 1e4]), [0, 0.5, 0.75, 1])
