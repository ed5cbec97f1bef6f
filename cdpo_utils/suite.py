"""Every method of the series on the bench, as notebooks 02 to 06 run it; for the comparison of notebook 07.

A run that a notebook has recorded with the same parameters is read from its record; what is missing is trained here.
"""

import ast
import functools
import json
from pathlib import Path

import pandas as pd

from cdpo_utils import algorithms, data, evaluate, labs, policies, record, scoring, workers

HARD_LABEL_STEPS = {"06_two_stage_primal_dual": 1.2}  # hard labels are noisier than soft ones: more steps
RUNS = (  # (method, feedback), in the order of cost, dearest first
    ("pd_dpo", "learned"), ("dual_descent", "oracle"), ("c_dpo", "learned"), ("dual_descent", "learned"),
    ("dpo_helpful", "learned"), ("dpo_harmless", "learned"), ("one_shot", "oracle"),
)  # fmt: skip
LAB = ("seed", "n_pairs", "n_objects", "n_tools")  # what `labs.open_lab` needs
JUDGE = ("judge", "judge_name")  # of notebook 06: asks for more about the same policies
NOTEBOOKS = {
    "dpo_helpful": "02_reference_and_dpo", "dpo_harmless": "02_reference_and_dpo", "c_dpo": "04_c_dpo",
    "one_shot": "05_dual_descent", "dual_descent": "05_dual_descent", "pd_dpo": "06_two_stage_primal_dual",
}  # fmt: skip


def recorded(settings, folder=None):
    """{(method, feedback): (rows, rounds)} of the records whose parameters and package source agree with `settings`."""
    found = {}
    for entry in _records(settings, folder, HARD_LABEL_STEPS):
        for row in entry["methods"]:
            key = row["method"], row["feedback"]
            if key in RUNS and NOTEBOOKS[row["method"]] == entry["notebook"]:
                extra = entry["extra"] or {}
                rounds = extra.get("histories", {}).get("/".join(key), {}).get("rounds", extra.get("rounds", []))
                found.setdefault(key, ([], rounds))[0].append(row)
    return found


def _records(settings, folder, more_steps):
    """Records of notebooks 02 to 06 that were made by this source with `settings`, and with the notebook's own value of
    every other parameter. more_steps: {notebook: factor} where a notebook trains longer than `settings` say."""
    for path in sorted(Path(folder or record.records_dir()).glob("0[2-6]_*.json")):
        entry = json.loads(path.read_text(encoding="utf-8"))
        if entry.get("source") != record.source_hash():  # other code may have had other parameters
            continue
        given = entry["parameters"]
        asked = {**settings, "steps": settings["steps"] * more_steps.get(entry["notebook"], 1)}
        expected = _defaults(entry["notebook"]) | {"content": ""} | asked
        if all(given[name] == expected[name] for name in given if name not in JUDGE):
            yield entry


def _defaults(notebook):
    """A notebook's own parameters: a record made with others is not what `train` would make."""
    path = record.repo_root() / "notebooks" / f"{notebook}.ipynb"  # read as JSON: papermill takes 3 s to import
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    source = "".join(next(c["source"] for c in cells if "parameters" in c["metadata"].get("tags", [])))
    return {line.target.id: ast.literal_eval(line.value) for line in ast.parse(source).body}


@functools.lru_cache(maxsize=1)
def _opened(beta, budget, budget_from, **lab):
    """The bench and its truths, once in a process: its methods share what the lab remembers of the reference."""
    made = labs.open_lab(**lab)
    budget = labs.budget_as_cost(made, budget, budget_from)
    return made, {split: made.truth(split, beta, budget) for split in ("train", "test")}


def opened(settings):
    """The bench and its truths that `settings` ask for."""
    return _opened(**{name: settings[name] for name in ("beta", "budget", "budget_from", *LAB)})


def train(method, feedback, settings, watch=None):
    """Train one method: its `record.method_row`s on both splits and its dual rounds. `settings` are the parameters of
    notebook 07; watch(policy, rounds) is called after each round of dual descent."""
    beta, steps = settings["beta"], settings["steps"]
    made, truths = opened(settings)
    budget = float(truths["train"].budget[0])
    report_to = settings.get("report_to", "none")
    schedule = algorithms.Schedule(steps=steps, round_steps=steps // 2, seed=made.seed, report_to=report_to)
    tolerance = 0.01 * float(evaluate.spread(truths["train"])[0])
    who = labs.oracle_feedback(made) if feedback == "oracle" else None
    if method in ("c_dpo", "dual_descent") and feedback == "learned":
        who = made.learned_feedback(*made.scorers())
    started, descent = record.clock(), None
    if method == "dpo_helpful":
        policy, _ = algorithms.dpo(made.lab, made.helpful, beta, schedule)
    elif method == "dpo_harmless":
        policy, _ = algorithms.dpo(made.lab, made.safety, beta, schedule)
    elif method == "c_dpo":
        pairs = data.unlabelled_pairs(made.frame.head(20_000))
        policy, descent = algorithms.c_dpo(
            made.lab, pairs, who, budget, beta, schedule, samples=64, lam=1.0, max_rounds=5, tolerance=5 * tolerance
        )
    elif method == "one_shot":
        drawn = made.lab.sample_reference(64, made.seed)
        policy, descent, _ = algorithms.one_shot(made.lab, drawn, who, budget, beta, schedule)
    elif method == "dual_descent":
        drawn = made.lab.sample_reference(64, made.seed)
        rounds, samples = (4, 128) if feedback == "oracle" else (3, 64)
        policy, descent = algorithms.dual_descent(
            made.lab, drawn, who, budget, beta, schedule, samples=samples, dual_lr=0.5, max_rounds=rounds,
            lam=algorithms.starting_lam(who.on(drawn), beta, budget), tolerance=tolerance, watch=watch,
        )  # fmt: skip
    elif method == "pd_dpo":
        policy, descent = train_pd_dpo(made, beta, budget, steps, report_to=report_to)
    else:
        raise ValueError(f"train: method={method!r}; expected one of {sorted(NOTEBOOKS)}")
    rows = labs.rows(made, truths, policy, method, NOTEBOOKS[method], feedback, record.clock() - started, descent)
    return rows, [] if descent is None else descent.rounds


def recorded_pretrained(settings, folder=None):
    """{method: {"row", "intervals", "test", "rounds"}} of a pretrained model, the reference among them, from records
    that agree with `settings`, the parameters of notebook 07 by name."""
    found = {}
    for entry in _records(settings, folder, {}):
        extra = entry["extra"]
        for row in entry["methods"]:
            method = row["method"]
            history = extra.get("histories", {}).get(
                f"{method}/learned", extra if method in ("c_dpo", "pd_dpo") else {}
            )
            if method == "reference" or NOTEBOOKS[method] == entry["notebook"]:
                found[method] = {
                    "row": row, "rounds": history.get("rounds", []),
                    "intervals": [line for line in extra["intervals"] if line["method"] == method],
                    "test": next(line for line in extra["tests"] if line["method"] == method),
                }  # fmt: skip
    return found


def complete_pretrained(made, settings, schedule, folder=None):
    """All methods on a `real.Real`: ({method: as in `recorded_pretrained`}, methods that were trained here).

    What notebooks 02 to 06 have recorded with these `settings` is read, the rest is trained, and judged as they do.
    """
    runs = recorded_pretrained(settings | {"content": made.content}, folder)
    missing = [method for method in NOTEBOOKS if method not in runs]
    if missing:
        feedback = made.learned_feedback(*made.scorers())
        budget = labs.budget_as_cost(made, settings["budget"], settings["budget_from"])
        samples = settings["samples"]
        done = train_pretrained(
            made, feedback, budget, settings["beta"], schedule, settings["reference_samples"], samples,
            settings["max_rounds"], settings["lam_init"], missing,
        )  # fmt: skip
        weights = {"reference": None} | {method: trained for method, (trained, _, _) in done.items()}
        descents = {method: descent for method, (_, descent, _) in done.items() if descent}
        seconds = {method: spent for method, (_, _, spent) in done.items()}
        rows, intervals, tests = made.judge(weights, feedback, budget, "07_comparison", samples, seconds, descents)
        for row in rows:
            method = row["method"]
            runs[method] = {
                "row": row, "rounds": descents[method].rounds if method in descents else [],
                "intervals": intervals[intervals.method == method].to_dict("records"),
                "test": {"method": method, **tests.loc[method].to_dict()},
            }  # fmt: skip
    return {method: runs[method] for method in ("reference", *NOTEBOOKS)}, missing


def train_pretrained(
    made, feedback, budget, beta, schedule, reference_samples, samples, max_rounds, lam_init=1.0,
    methods=tuple(NOTEBOOKS),
):  # fmt: skip
    """`methods` on a `real.Real`, one after the other on its one adapter: {method: (weights, Descent or None, s)}.

    Weights are `policies.snapshot`s. Scores come from `feedback`, for the dual steps too, since nobody votes. What two
    methods share is trained once: plain DPO on helpfulness is stage 1 of two-stage primal-dual DPO, and one-shot is the
    first round of dual descent. `lam_init` is what C-DPO and PD-DPO start from; dual descent starts from one-shot's.
    """
    lab, trained, started = made.lab, {}, record.clock()
    looked_at = schedule.steps * schedule.batch_size  # pairs of the first round; scores and references take seconds

    def keep(method, descent=None, since=0.0):
        trained[method] = policies.snapshot(lab.model), descent, record.clock() - started + since
        print(f"{method}: {trained[method][2]:.0f} s", flush=True)
        return record.clock()

    loop = dict(samples=samples, max_rounds=max_rounds, tolerance=0.02)
    if {"dpo_helpful", "pd_dpo"} & set(methods):
        algorithms.dpo(lab, made.helpful, beta, schedule)
        started = keep("dpo_helpful")
    if "pd_dpo" in methods:
        safety = made.safety.head(looked_at)
        _, descent = algorithms.pd_dpo(lab, lab.model, safety, feedback, budget, beta, schedule, lam=lam_init, **loop)
        started = keep("pd_dpo", descent, trained["dpo_helpful"][2])
    if "dpo_harmless" in methods:
        algorithms.dpo(lab, made.safety, beta, schedule)
        started = keep("dpo_harmless")
    if "c_dpo" in methods:
        pairs = data.unlabelled_pairs(made.frame.head(looked_at))
        _, descent = algorithms.c_dpo(lab, pairs, feedback, budget, beta, schedule, lam=lam_init, **loop)
        started = keep("c_dpo", descent)
    if {"one_shot", "dual_descent"} & set(methods):
        drawn = made.reference_answers(reference_samples)
        loop |= dict(lam=algorithms.starting_lam(feedback.on(drawn), beta, budget), dual_lr=0.5)
        loop |= dict(watch=algorithms.first_round(lambda policy, descent: keep("one_shot", descent)))
        if "dual_descent" not in methods:
            loop["max_rounds"] = 1
        _, descent = algorithms.dual_descent(lab, drawn, feedback, budget, beta, schedule, **loop)
        keep("dual_descent", descent)
    return {method: result for method, result in trained.items() if method in methods}


def interval_frames(runs):
    """Intervals and constraint tests of `recorded_pretrained`'s runs as two DataFrames, in the order of `runs`."""
    intervals = pd.DataFrame([line for run in runs.values() for line in run["intervals"]])
    return intervals, pd.DataFrame([run["test"] for run in runs.values()]).set_index("method")


def train_pd_dpo(made, beta, budget, steps, labels=16, report_to="none"):
    """Two-stage primal-dual DPO as in notebook 06: hard labels, so more steps, and votes for the dual step."""
    steps = int(HARD_LABEL_STEPS[NOTEBOOKS["pd_dpo"]] * steps)
    own = made.optimiser | {"report_to": report_to}
    schedule = algorithms.Schedule(steps=steps, round_steps=steps // 2, seed=made.seed, **own)
    reward_policy, _ = algorithms.dpo(made.lab, made.helpful, beta, schedule)
    voters = algorithms.votes(labs.oracle_feedback(made), labels, made.seed)
    return algorithms.pd_dpo(
        made.lab, reward_policy, made.safety.head(60_000), voters, budget, beta, schedule, labels=labels,
        max_rounds=4, tolerance=0.02,
    )  # fmt: skip


def _job(name, feedback, settings):
    """[method, feedback, rows, rounds] of each run that the job makes."""
    if name == "reference":  # into the cache, as scorers
        scoring.require_feasible(opened(settings)[1])
        return []
    if name in labs.SCORERS:
        sizes = {field: settings[field] for field in ("n_objects", "n_tools")}
        labs.fill_cache(name, settings["seed"], settings["n_pairs"], sizes)
        return []
    if (name, feedback) != ("dual_descent", "oracle"):
        return [[name, feedback, *train(name, feedback, settings)]]
    made, truths = opened(settings)
    started, first = record.clock(), []

    def one_shot(policy, descent):
        seconds = record.clock() - started
        first.extend(labs.rows(made, truths, policy, "one_shot", NOTEBOOKS[name], feedback, seconds, descent))

    rows, rounds = train(name, feedback, settings, algorithms.first_round(one_shot))
    return [[name, feedback, rows, rounds], ["one_shot", feedback, first, rounds[:1]]]


def complete(settings, folder=None):
    """All RUNS: recorded ones from their records, the missing ones trained; ({key: (rows, rounds)}, trained keys).

    Two processes share the work and begin with the reference model and the scorers. Raises RuntimeError, in one line,
    where one of them fails: where no policy meets the budget, as soon as the reference is there to tell.
    """
    runs = recorded(settings, folder)
    missing = [key for key in RUNS if key not in runs]
    if missing:
        scored = {("c_dpo", "learned"), ("dual_descent", "learned")}
        first = [("reference", "")] + [(kind, "") for kind in labs.SCORERS if scored & set(missing)]
        then = list(dict.fromkeys(("dual_descent", "oracle") if key[0] == "one_shot" else key for key in missing))
        together = [first + then]
        if then[0] in scored:  # nothing can be done while scorers are trained
            together = [first, then]
        for jobs in together:
            for done in workers.side_by_side(_job, [(*job, settings) for job in jobs]):
                for method, feedback, rows, rounds in done:
                    runs.setdefault((method, feedback), (rows, rounds))
    return {key: runs[key] for key in RUNS}, missing
