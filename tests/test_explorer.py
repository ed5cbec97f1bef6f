"""The explorer page, in a browser without window, against `exact`."""

import base64
import html
import itertools
import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest

from cdpo_utils import dual, evaluate, exact, explorer, labs

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium (Debian's package chromium) on the path")
POINTS = list(itertools.product((0.1, 0.25, 1.0, 3.0), (-1.0, 0.0, 3.0), (0.0, 0.7, 2.5)))


@pytest.fixture
def truth(world):
    """The tiny world's training prompts; the demonstrations stand in for a reference."""
    rows = world.train
    prompts = [world.prompts[i] for i in rows]
    ref_logps, reward, costs = world.demo[rows], world.reward[rows], world.costs[rows, :, :1]
    optimum = exact.solve(ref_logps, reward, costs, 0.0, 1.0)
    return evaluate.Truth(prompts, ref_logps, reward, costs, np.zeros(1), 1.0, optimum)


@pytest.fixture
def ask(truth, world, tmp_path):
    """The JSON value of a JavaScript expression that may await, in a page for `truth` or with other texts in it."""

    def ask(expression, prompts=None, answers=None):
        shown = evaluate.Truth(**(vars(truth) | {"prompts": prompts or truth.prompts}))
        probe = f"""<script>(async () => {{ const value = await (async () => {expression})();
            const pre = document.body.appendChild(document.createElement("pre"));
            pre.id = "result"; pre.textContent = JSON.stringify(value); }})()</script>"""
        path = tmp_path / "explorer.html"
        path.write_text(explorer.page(shown, answers or world.answers, 0) + probe, encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
        home = f"--user-data-dir={tmp_path / 'profile'}"
        done = subprocess.run([BROWSER, *options, home, path.as_uri()], capture_output=True, text=True, timeout=120)
        found = re.search(r'<pre id="result">(.*)</pre>', done.stdout)
        assert found, f"the page stopped before its end: {done.stderr[-2000:]}"
        return json.loads(html.unescape(found[1]))

    return ask


@needs_browser
@pytest.mark.slow
def test_the_page_computes_what_exact_does(truth, ask):
    points = [dict(zip(("beta", "budget", "lam"), point, strict=True)) for point in POINTS]
    states = ask(f"{json.dumps(points)}.map(point => explorer.state(point))")
    shown = ask(f"{json.dumps(points)}.map(({{beta, lam}}) => explorer.answers(beta, lam, 2))")
    for (beta, budget, lam), state, probabilities in zip(POINTS, states, shown, strict=True):
        optimum = exact.solve(truth.ref_logps, truth.reward, truth.costs, budget, beta)
        logps = exact.gibbs(truth.ref_logps, exact.lagrangian_score(truth.reward, truth.costs, lam), beta)
        judged = evaluate.Truth(**(vars(truth) | {"budget": np.array([budget]), "beta": beta, "optimum": optimum}))
        metrics = evaluate.metrics(logps, judged)
        expected = {name: metrics[name] for name in ("reward", "cost", "violation")} | {
            "dual": exact.dual(lam, truth.ref_logps, truth.reward, truth.costs, budget, beta)[0],
            "lamStar": optimum.lam[0],
            "dualStar": optimum.dual,
            "rewardStar": exact.expectation(optimum.logps, truth.reward),
            "costStar": optimum.cost[0],
        }
        assert state["feasible"]
        assert {name: state[name] for name in expected} == pytest.approx(expected, abs=1e-6, rel=0)
        assert state["gap"] == pytest.approx(metrics["gap"], abs=1e-6)
        assert probabilities == pytest.approx(np.exp(logps[2]), abs=1e-6)
    assert max(state["lamStar"] for state in states) > 0.5 and min(state["lamStar"] for state in states) == 0


@needs_browser
@pytest.mark.slow
def test_a_budget_that_nobody_meets_and_the_path(truth, ask):
    lowest = exact.minimal_cost(truth.costs, 0.0)[1][0]
    found = ask(f"""({{cheapest: explorer.cheapest, state: explorer.state({{beta: 1, budget: {lowest - 0.1}, lam: 1}}),
                      path: explorer.path(1, -0.5, 0.2, 6)}})""")
    assert found["cheapest"] == pytest.approx(lowest, abs=1e-12)
    assert not found["state"]["feasible"] and found["state"]["lamStar"] is None and found["state"]["gap"] is None
    lams = [0.0]
    for _ in range(6):
        gradient = exact.dual(lams[-1], truth.ref_logps, truth.reward, truth.costs, -0.5, 1.0)[1]
        lams.append(dual.dual_step(lams[-1], -gradient, 0.2)[0])
    assert found["path"] == pytest.approx(lams, abs=1e-9) and lams[-1] > 0.1


@needs_browser
@pytest.mark.slow
def test_the_drawings_follow_the_sliders(truth, world, ask):
    seen = ask(
        """{
        window.requestAnimationFrame = draw => setTimeout(draw, 0);  // without a window frames come when they like
        const look = () => [
            document.querySelector("#answers td").firstChild.textContent, summary.textContent,
            ...["plane", "dual", "path"].map(id => document.getElementById(id).getAttribute("aria-label"))];
        const before = look();
        controls.lam.value = 3; controls.lam.dispatchEvent(new Event("input"));
        await new Promise(resolve => setTimeout(resolve, 1));
        const after = look();
        follow.click();
        await new Promise(resolve => setTimeout(resolve, 1));
        return [before, after, look(), document.querySelectorAll("svg path.budget").length];
    }"""
    )
    for multiplier, look in ((0.0, seen[0]), (3.0, seen[1]), (truth.optimum.lam[0], seen[2])):
        logps = exact.gibbs(truth.ref_logps, exact.lagrangian_score(truth.reward, truth.costs, multiplier), 1.0)
        assert look[0] == world.answers[logps[0].argmax()]
        reward, cost = (exact.expectation(logps, values) for values in (truth.reward, truth.costs[..., 0]))
        shown = re.match(r"Reward (\S+), cost ([^\s:]+):", look[1].replace("−", "-"))
        assert [float(value) for value in shown.groups()] == pytest.approx([reward, cost], abs=0.00501)
    assert len({look[0] for look in seen[:3]}) > 1, "the answer changes with the multiplier"
    assert len({look[2] for look in seen[:3]}) == 3 and "just what the budget allows" in seen[2][1]
    assert seen[3] == 1


@needs_browser
@pytest.mark.slow
def test_texts_are_shown_never_run(truth, world, ask):
    hostile = "</script><script>window.ran = 1</script><img src=x onerror='window.ran = 1'>"
    prompts, answers = [hostile, *truth.prompts[1:]], [hostile + str(i) for i in range(len(world.answers))]
    shown = ask(
        "[window.ran === undefined, document.images.length, document.querySelector('option').textContent,"
        " document.querySelector('#answers td').firstChild.textContent]",
        prompts, answers,
    )  # fmt: skip
    assert shown[:3] == [True, 0, hostile] and shown[3] in answers


def test_the_page_takes_nothing_from_elsewhere():
    template = explorer.TEMPLATE.read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\"']*", template)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"\bsrc=|@import|fetch\(|innerHTML|eval\(", template)
    labelled = set(re.findall(r'<label for="(\w+)"', template)) | {"follow"}  # whose label is around it
    assert labelled == set(re.findall(r'<(?:input|select) id="(\w+)"', template))


def test_the_page_is_written_where_asked(truth, world, tmp_path, monkeypatch, capsys):
    def opened(seed, n_pairs):
        assert seed == 3
        return SimpleNamespace(world=world, truth=lambda split, beta, budget: truth)

    monkeypatch.setattr(labs, "open_lab", opened)
    out = tmp_path / "new" / "page.html"
    assert explorer.main(["--out", str(out), "--seed", "3"]) == 0 and capsys.readouterr().out.strip() == str(out)
    data = json.loads(re.search(r'type="application/json" id="data">(.*?)</script>', out.read_text(), re.S)[1])
    assert data["prompts"] == truth.prompts and data["answers"] == world.answers and data["seed"] == 3
    for name, table in {"ref_logps": truth.ref_logps, "reward": truth.reward, "cost": truth.costs[..., 0]}.items():
        held = np.frombuffer(base64.b64decode(data[name]), "<f8").reshape(table.shape)
        np.testing.assert_array_equal(held, table)  # to the last bit: nothing is rounded on the way


def test_bad_requests_get_one_line(truth, world, tmp_path, capsys):
    for arguments, said in (["--out", str(tmp_path)], "a folder"), (["--seed", "-1"], "seed=-1"):
        assert explorer.main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    two = evaluate.Truth(**(vars(truth) | {"costs": np.repeat(truth.costs, 2, -1)}))
    with pytest.raises(ValueError, match="2 constraints"):
        explorer.page(two, world.answers, 0)
