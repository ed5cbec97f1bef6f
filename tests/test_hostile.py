"""Files, names, texts, servers and environments that mean harm, or look like it."""

import ast
import gzip
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import tracemalloc
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import files_of_chance
import nbformat
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from nbformat import v4

from cdpo_utils import cache, data, fetch, guard, judges, plots, real, record, report, run, sweep

PACKAGE = sorted((record.repo_root() / "cdpo_utils").glob("*.py"))
SECRET = 'sk-"quoted\\and-long'  # which JSON writes differently
NASTY = "<script>alert(1)</script>'\"\x1b[31m\u202e"


@pytest.fixture
def secret(monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", SECRET)
    return SECRET


@pytest.fixture
def no_network(monkeypatch):
    """Whoever looks up or connects is caught, even where the error would be swallowed."""
    asked = []

    def refuse(*args, **kwargs):
        asked.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return asked


def hostile_notebook(folder, *cells, parameters="judge: str = ''  # URL"):
    kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
    tagged = v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    cells = [v4.new_markdown_cell(f"# {NASTY}"), tagged, *map(v4.new_code_cell, cells)]
    folder.mkdir(exist_ok=True)
    nbformat.write(v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / "01_tiny.ipynb")
    return folder


# --- code that files could bring along --------------------------------------------------------------------------------

RUNS_CODE = re.compile(
    r"pickle|joblib|\bdill\b|torch\.load|weights_only|allow_pickle|trust_remote_code(?!=False)|shell=True|os\.system"
    r"|yaml\.(?!safe_load|YAMLError)|(?<![\w.])(?:eval|exec)\(|!!python|import submitit"
)
BROUGHT = [path for folder in ("notebooks", "benchmarks", "data", "configs")
           for path in sorted((record.repo_root() / folder).rglob("*"))]  # fmt: skip
CODE = [*PACKAGE, *(path for path in BROUGHT if path.suffix in (".py", ".ipynb", ".yaml"))]
# The one exception: `sweep --slurm` hands its jobs to submitit, which keeps them as pickles in the sweep's folder, on
# the user's own disk, where a job reads what its own sweep has written.
EXCEPTIONS = {"sweep.py": ["import submitit"]}


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)
def test_nothing_that_is_read_can_run(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":  # what it says of pickles reads none, nor does asking whether submitit has left one
        text = text.replace(ast.get_docstring(ast.parse(text), clean=False) or "", "").replace(".result_pickle.", "")
    assert RUNS_CODE.findall(text) == EXCEPTIONS.get(path.name, [])


def test_no_file_that_is_brought_along_is_of_a_kind_that_can_run():
    kinds = {".pkl", ".pickle", ".joblib", ".pt", ".pth", ".ckpt", ".bin", ".npy", ".npz", ".h5"}
    assert len(CODE) > len(PACKAGE) + 10 and not [path for path in BROUGHT if path.suffix in kinds]


def test_the_search_finds_what_it_looks_for():
    for line in ("import pickle", "torch.load(f)", "trust_remote_code=True", "yaml.load(x)", "run(c, shell=True)",
                 "np.load(f, allow_pickle=True)", "x = eval(y)", "a: !!python/name:os.system"):  # fmt: skip
        assert RUNS_CODE.search(line), line
    assert not RUNS_CODE.search("yaml.safe_load(x); model.eval(); ast.literal_eval(x); f(trust_remote_code=False)")


@pytest.mark.parametrize("load", [real.load_model, real.beaver.load])
def test_a_model_that_brings_code_is_refused_without_asking(tmp_path, monkeypatch, load):
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question to the user"))
    with pytest.raises(data.DataError):
        load(str(tmp_path))
    assert not (tmp_path / "ran").exists()


SPEAKS = re.compile("TELEMETRY|OFFLINE|USAGE_STATS|DO_NOT_TRACK")
# As vLLM reads its own, when it begins: https://docs.vllm.ai/en/latest/usage/usage_stats/
TOLD = """\
import os, sys
import cdpo_utils  # vllm is imported by functions of it
import huggingface_hub.constants as c
print(c.HF_HUB_DISABLE_TELEMETRY, os.environ["VLLM_NO_USAGE_STATS"], os.environ["DO_NOT_TRACK"], "vllm" in sys.modules)
"""


@pytest.mark.parametrize(("said", "seen"), [({}, "True 1 1 False"), ({"VLLM_NO_USAGE_STATS": "0"}, "True 0 1 False")])
def test_telemetry_is_off_in_a_bare_environment(said, seen):
    bare = {name: value for name, value in os.environ.items() if not SPEAKS.search(name)}
    command = [sys.executable, "-c", TOLD]
    done = subprocess.run(command, env=bare | said, cwd=record.repo_root(), capture_output=True, text=True)
    assert done.stdout == f"{seen}\n", done.stderr


@pytest.mark.parametrize(
    "source", ["gone.jsonl", "./gone", "/gone/at/all", "a/b/c", "owner/name.csv", "x\0y/z", "..", ""]
)
def test_only_a_hub_name_asks_the_network(no_network, tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(data.DataError):
        data.load_preferences(source)
    if source.startswith((".", "/")):
        with pytest.raises(data.DataError):
            real.load_model(source)
    assert not no_network


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../x", "..", ".", "", "/tmp/x", "a/b", "a\\b", "C:x", "x\0", "x\n", "\u202ex", None, 3]
)
def test_names_stay_in_their_folder(tmp_path, name):
    with pytest.raises(ValueError, match="is not the name of a file; expected one without folders") as caught:
        guard.inside(tmp_path, name)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "a/b", "x\0y"])
def test_records_and_cache_stay_in_their_folder(tmp_path, monkeypatch, name):
    monkeypatch.setenv("CDPO_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("CDPO_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="is not the name of a file"):
        record.save_record(name, {}, [])
    with pytest.raises(ValueError, match="is not the name of a file"):
        cache.cached_json(name, {}, lambda: pytest.fail("made for a name that is refused"))
    assert not list(tmp_path.rglob("*"))


def test_a_figure_without_a_name_stays_among_the_figures(tmp_path, monkeypatch):
    monkeypatch.setenv("CDPO_RUN_DIR", str(tmp_path))
    for alt in ("../../etc/passwd of \0", "…"):
        plots.show(plots.plt.figure(), alt)
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    assert names == ["records/figures/etc-passwd-of.png", "records/figures/figure.png"]


def test_a_setting_is_a_name_and_a_sweep_has_a_folder_of_its_own(tmp_path, capsys):
    folder = hostile_notebook(tmp_path / "notebooks")
    (tmp_path / "outside.yaml").write_text("judge: x\n")
    (folder / "params").mkdir()
    for setting in ("../../outside", str(tmp_path / "outside"), "x\0"):
        assert run.main(["--setting", setting], folder) == 2
        assert "no such setting" in capsys.readouterr().err
    for name in ("..yaml", "...yaml"):
        (tmp_path / name).write_text("grid: {judge: [a]}\n")
        assert sweep.main([str(tmp_path / name), "--dry-run"], folder) == 2
        assert "expected another name, or --out DIR" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"[" * 5000, b"a: !!python/object/apply:os.system [x]", b"\0", b"- 1"]
)
def test_parameter_files_that_are_none_are_refused_in_one_line(tmp_path, content):
    (tmp_path / "values.yaml").write_bytes(content)
    with pytest.raises(run.NotUnderstood) as caught:
        run.read_yaml(tmp_path / "values.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [("plan.json", "[]"), ("plan.json", '{"parameters": {"x.ipynb": 5}}'), ("plan.json", '{"parameters": {}}'),
     ("plan.json", '{"parameters": {"../x.ipynb": {}}, "code": ""}'), ("plan.json", "[" * 10**5), ("done.json", "5"),
     ("plan.json", '{"parameters": {"/tmp/x.ipynb": {}}, "code": ""}'), ("done.json", '{"01_tiny": [0]}')],
)  # fmt: skip
def test_a_run_that_is_resumed_names_its_own_notebooks_only(tmp_path, capsys, name, content):
    folder = hostile_notebook(tmp_path / "notebooks")
    (tmp_path / "run").mkdir()
    plan = {"parameters": {"01_tiny.ipynb": {}}, "code": run.code_digest(folder)}
    (tmp_path / "run" / "plan.json").write_text(json.dumps(plan))
    (tmp_path / "run" / name).write_text(content)
    assert run.main(["--resume", str(tmp_path / "run")], folder) == 2
    err = capsys.readouterr().err
    assert err.endswith("; expected the folder of a run\n") and err.count("\n") == 1


def test_a_number_out_of_all_proportion_is_refused():
    with pytest.raises(ValueError, match="is not a number"):
        run.coerce(10**400, 0.5, "float")


# --- what people read -------------------------------------------------------------------------------------------------


def test_control_characters_are_made_visible():
    assert guard.visible(NASTY) == "<script>alert(1)</script>'\"\\x1b[31m\\u202e"
    assert guard.visible("a\nb\r\u2028", keep="\n") == "a\nb\\r\\u2028"
    assert guard.one_line(ValueError("first\x07\nsecond")) == "first\\x07" and guard.one_line(OSError()) == "OSError"


def test_pages_and_tables_hold_text_and_nothing_that_runs(tmp_path):
    row = dict.fromkeys(record.METHOD_FIELDS) | dict(notebook=NASTY, method=NASTY, feedback="x", split="y")
    table = report.html_table([NASTY], [[NASTY]], 1)
    assert report.text_table([row]).replace("\n", "").isprintable()
    hostile_notebook(tmp_path)
    notebook = nbformat.read(tmp_path / "01_tiny.ipynb", as_version=4)
    notebook.cells = notebook.cells[:2]
    frame = pd.DataFrame({NASTY: [NASTY]})
    notebook.cells[1].outputs = [
        v4.new_output("stream", text=NASTY),
        v4.new_output("execute_result", {"text/plain": repr(frame), "text/html": frame._repr_html_()}),
        v4.new_output("error", ename="ValueError", evalue=NASTY, traceback=[NASTY]),
    ]
    name = "01_a'b\"c#d&e"
    notebook.cells[0].source = "# A title"  # Markdown is the author's, and may hold HTML
    nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    index = report.write_html(tmp_path, {name: 1.0}, [row], {NASTY: NASTY})
    page = tmp_path / f"{name}.html"
    for text in (table, index.read_text("utf-8"), page.read_text("utf-8")):
        assert "<script>alert" not in text and "&lt;script&gt;alert" in text
        assert "\x1b" not in text and "\u202e" not in text and "\\u202e" in text
    assert 'href="01_a%27b%22c%23d%26e.html"' in index.read_text("utf-8")


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\tx", "\rx", "=cmd|' /C calc'!A0"])
def test_text_that_is_a_formula_is_quoted_in_csv_and_numbers_are_not(tmp_path, text):
    frame = pd.DataFrame({text: [text, "plain = 1"], "mixed": [-1.5, text], "number": [-1.5, np.nan], "n": [-2, 3]})
    guard.write_csv(frame, tmp_path / "x.csv")
    back = pd.read_csv(tmp_path / "x.csv", dtype=str, lineterminator="\n")
    assert back.columns[0] == "'" + text and back.iloc[0, 0] == "'" + text and back.iloc[1, 0] == "plain = 1"
    assert back.mixed.tolist() == ["-1.5", "'" + text]
    assert back.number[0] == "-1.5" and pd.isna(back.number[1]) and back.n.tolist() == ["-2", "3"]


def test_every_csv_goes_through_the_guard(tmp_path):
    writers = [path.name for path in PACKAGE if ".to_csv(" in path.read_text(encoding="utf-8")]
    assert writers == ["guard.py"]
    fig, ax = plots.plt.subplots()
    ax.plot([0, 1], [-1, 2], label="=HYPERLINK()")
    ax.set_xlabel("@x")
    plots.save(fig, tmp_path / "f")
    table = pd.read_csv(tmp_path / "f.csv")
    assert set(table.label) == {"'=HYPERLINK()"} and set(table.x_axis) == {"'@x"} and table.y.tolist() == [-1, 2]


# --- secrets ----------------------------------------------------------------------------------------------------------


def test_secrets_are_blotted_out(secret, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert guard.without_secrets({"a": [f"x {secret} y", 1, None], "b": ("false",)}) == {
        "a": ["x *** y", 1, None],
        "b": ("false",),
    }
    assert guard.without_secrets(json.dumps(f"x {secret} y")) == '"x *** y"'
    for url in ("https://me:pass@host:8/v1?q=a@b", "https://me@host:8/v1?q=a@b", "https://me:p@ss@host:8/v1?q=a@b"):
        assert guard.without_secrets(f"at {url}, or a@b.c") == "at https://***@host:8/v1?q=a@b, or a@b.c"
    assert guard.without_secrets("https://host/@me and me@host") == "https://host/@me and me@host"


def test_a_record_keeps_no_secret(secret, tmp_path, monkeypatch):
    monkeypatch.setenv("CDPO_RUN_DIR", str(tmp_path))
    path = record.save_record("01", {"judge": "http://me:pass@host", "key": secret}, [], {"log": [f"sent {secret}"]})
    saved = json.loads(path.read_text())
    assert saved["parameters"] == {"judge": "http://***@host", "key": "***"} and saved["extra"] == {"log": ["sent ***"]}


@pytest.mark.parametrize("value", ["http://me:pass@host", SECRET])
def test_a_parameter_that_is_a_secret_is_refused_before_anything_is_written(secret, tmp_path, capsys, value):
    folder = hostile_notebook(tmp_path / "notebooks")
    assert run.main(["-p", "judge", value, "--out", str(tmp_path / "runs")], folder) == 2
    (tmp_path / "grid.yaml").write_text(json.dumps({"grid": {"judge": [value]}}))
    assert sweep.main([str(tmp_path / "grid.yaml"), "--out", str(tmp_path / "sweep")], folder) == 2
    err = capsys.readouterr().err
    assert err.count("parameter judge: holds a password or key") == 2 and "pass@" not in err and SECRET not in err
    assert not (tmp_path / "runs").exists() and not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_what_a_notebook_says_of_secrets_is_kept_nowhere(secret, tmp_path, capsys):
    tell = "import os\nprint('printed', os.environ['JUDGE_API_KEY'])"
    fail = "raise OSError(f'http://me:pass@host {os.environ[\"JUDGE_API_KEY\"]} \\x1b[2J')"
    folder = hostile_notebook(tmp_path / "notebooks", tell, fail)
    (tmp_path / "grid.yaml").write_text("grid: {judge: [a]}")
    assert sweep.main([str(tmp_path / "grid.yaml"), "--out", str(tmp_path / "out")], folder) == 1
    seen = capsys.readouterr()
    texts = [path.read_text("utf-8") for path in (tmp_path / "out").rglob("*") if path.is_file()] + [seen.out, seen.err]
    assert any("printed ***" in text for text in texts) and any("http://***@host ***" in text for text in texts)
    for text in texts:
        assert secret not in text and json.dumps(secret)[1:-1] not in text and "me:pass" not in text
    assert "\x1b" not in seen.err + (tmp_path / "out" / "manifest.jsonl").read_text()


@pytest.mark.slow
def test_a_killed_run_leaves_no_secret(secret, tmp_path):
    tell = "import os\nprint('printed', os.environ['JUDGE_API_KEY'], 'http://me:pass@host')"
    folder = hostile_notebook(tmp_path / "notebooks", tell, "import signal\nos.kill(os.getppid(), signal.SIGKILL)")
    code = "import sys, pathlib; from cdpo_utils import run; run.main(sys.argv[2:], pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(folder), "--out", str(tmp_path / "runs")]
    assert subprocess.run(command, capture_output=True, timeout=300).returncode == -9
    (half,) = (tmp_path / "runs").glob("*/01_tiny.ipynb")
    text = half.read_text("utf-8")
    assert "printed *** http://***@host" in text and json.dumps(secret)[1:-1] not in text


def test_pip_may_know_a_password_of_its_index(monkeypatch):
    class Done:
        returncode, stderr = 1, "ERROR: no such thing at https://me:pass@index/simple\x1b[0m\n"

    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: Done)
    with pytest.raises(fetch.FetchError) as caught:
        fetch.download("x==1", ".")
    assert str(caught.value).endswith("no such thing at https://***@index/simple\\x1b[0m")


def test_a_wheel_cannot_leave_its_folder(tmp_path):
    import hashlib
    import zipfile

    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("../../outside", "x")
    with pytest.raises(fetch.FetchError, match="nothing was kept"):
        fetch.extract(wheel, "0" * 64, "../../outside", tmp_path / "in" / "side")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    kept = fetch.extract(wheel, digest, "../../outside", tmp_path / "in" / "side")
    assert kept.is_relative_to(tmp_path / "in" / "side") and not (tmp_path / "outside").exists()


# --- servers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def server():
    """Says what `answers` holds, (status, headers, body), and remembers the headers that it was sent."""
    answers, seen = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            seen.append(dict(self.headers))
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, headers, body = answers[min(len(seen), len(answers)) - 1]
            if status is None:
                return self.wfile.write(body)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST

        def log_message(self, *args):
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", answers, seen
    httpd.shutdown()
    httpd.server_close()


def says(content):
    return 200, {}, json.dumps({"choices": [{"message": {"content": content}}]}).encode()


@pytest.mark.parametrize("content", [None, 5, ["A"], {"A": 1}, "<script>", "\x1b[2JA"])
def test_a_reply_that_is_no_letter_is_a_tie(server, content):
    url, answers, _ = server
    answers.append(says(content))
    assert judges.http_judge(url, "tiny", "safe", tries=1)(["p"], ["a"], ["b"]).tolist() == [0.5]


@pytest.mark.parametrize(
    "answer",
    [(None, {}, b"nonsense\r\n\r\n"), (None, {}, b""), (200, {"Content-Length": "99"}, b"{"), (200, {}, b"[" * 10**5),
     (200, {}, b"\xff"), (200, {}, b"[]"), (200, {}, b" " * (judges.LONGEST_REPLY + 1)), (500, {}, b"\x1b[2J"),
     (302, {"Location": "file:///etc/passwd"}, b"")],
)  # fmt: skip
def test_a_server_that_talks_nonsense_is_named_in_one_line(server, answer):
    url, answers, _ = server
    answers.append(answer)
    with pytest.raises(ConnectionError, match="judge t.x1b at http://127.0.0.1") as caught:
        judges.http_judge(url, "t\x1b", "safe", tries=1)(["p"], ["a"], ["b"])
    assert str(caught.value).isprintable()


def test_a_key_goes_to_the_server_that_was_named_and_no_further(server, monkeypatch, secret):
    url, answers, seen = server
    monkeypatch.setenv("OPENAI_API_KEY", "sk-something-long")
    answers += [(302, {"Location": f"{url}/elsewhere"}, b""), says("A")]
    judges.http_judge(url, "tiny", "safe", tries=1)(["p"], ["a"], ["b"])
    assert [headers.get("Authorization") for headers in seen] == ["Bearer sk-something-long", None]
    with pytest.raises(ConnectionError) as caught:
        judges.http_judge("http://127.0.0.1:9/sk-something-long", "tiny", "safe", tries=1)(["p"], ["a"], ["b"])
    assert "sk-something" not in str(caught.value)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host", "http://me:pass@host", "localhost:8000"])
def test_a_judge_is_at_a_web_address_without_a_password(url):
    with pytest.raises(ValueError, match="expected http:// or https:// without user and password") as caught:
        judges.http_judge(url, "tiny", "safe")
    assert "pass@" not in str(caught.value)


# --- files of preference pairs ----------------------------------------------------------------------------------------


def read_or_refused(folder, count, seed):
    """Load `count` files of chance: how many could be read. Anything but DataError, in one line, fails."""
    rng, read = random.Random(seed), 0
    for _ in range(count):
        suffix, content = files_of_chance.one(rng)
        path = folder / f"x{suffix}"
        path.write_bytes(content)
        try:
            frame, account = data.load_preferences(path, kind=rng.choice([None, "helpful", "safety"]))
        except data.DataError as error:
            assert str(error).isprintable(), "one line, and nothing that a terminal obeys"
        else:
            read += 1
            assert account.read == account.kept + sum(account.dropped.values()) and account.kept == len(frame) > 0
            assert not frame.isna().any().any() and str(account).replace("\n", "").isprintable()
    return read


def test_files_of_chance_are_read_or_refused(tmp_path):
    assert 30 < read_or_refused(tmp_path, 300, seed=0) < 270


@pytest.mark.slow
def test_ten_thousand_files_of_chance_in_bounded_memory(tmp_path):
    read_or_refused(tmp_path, 100, seed=2)  # parquet's library, pandas' buffers
    before = record.peak_mib()
    assert 1000 < read_or_refused(tmp_path, 10_000, seed=1) < 9000
    assert record.peak_mib() - before < 100, "MiB, for files of at most 4"


LONG = "x" * 200_000
TEXTS = ["prompt", "response_0", "response_1"]
MESSAGE = [{"role": "user", "content": LONG}]
# Small files that hold far more than a MiB: {name: columns, or text}. One text is there once in a parquet file.
PARQUET_BOMBS = {
    "nulls": lambda: dict.fromkeys(TEXTS, pa.nulls(500_000, pa.string())),
    "unknown": lambda: {"z": pa.nulls(500_000, pa.string())},
    "repeated": lambda: dict.fromkeys(TEXTS, pa.array(["x" * 1000] * 5000).dictionary_encode()),
    "long": lambda: dict.fromkeys(TEXTS, pa.array([LONG] * 300)),
    "bytes": lambda: {"prompt": pa.array([LONG.encode()] * 300)},
    "fixed": lambda: {"prompt": pa.array([LONG.encode()] * 300, pa.binary(len(LONG)))},
    "messages": lambda: {"prompt": [MESSAGE] * 300},
    "at-last": lambda: {"prompt": [[]] * 300 + [MESSAGE] * 300},
    "one-row": lambda: {"prompt": [MESSAGE * 300]},
    "map": lambda: {"prompt": pa.array([[("a", LONG)]] * 300, pa.map_(pa.string(), pa.string()))},
    "json": lambda: {"prompt": pa.ExtensionArray.from_storage(pa.json_(), pa.array([f'"{LONG}"'] * 300))},
    "plain": lambda: {"prompt": pa.array([f"{LONG}{i}" for i in range(300)])},
    "delta": lambda: {"prompt": pa.array([f"{LONG}{i}" for i in range(300)])},
}
WRITTEN = {
    "plain": dict(use_dictionary=False, compression="zstd"),
    "delta": dict(use_dictionary=False, column_encoding={"prompt": "DELTA_BYTE_ARRAY"}),
}
TEXT_BOMBS = {
    "none.jsonl": "{}\n" * 340_000,
    "tiny.jsonl": '{"prompt":"ab"}\n' * 60_000,
    "known.jsonl": '{"prompt":[' + "[]," * 340_000 + "0]}",
    "lists.jsonl": '{"z":[' + "[]," * 340_000 + "0]}",
    "objects.jsonl": '{"z":[' + "{}," * 340_000 + "0]}",
    "numbers.jsonl": '{"z":[' + "1e3," * 250_000 + "0]}",
    "brackets.jsonl": "[" * 1_000_000,
    "keys.jsonl": "{" + ",".join(f'"{i}":0' for i in range(100_000)) + "}",
    "names.jsonl": "".join(f'{{"{i}":0}}\n' for i in range(80_000)),
    "none.json": "[" + "{}," * 340_000 + "{}]",
    "lists.json": "[" + "[]," * 340_000 + "0]",
    "keys.json": "[{" + ",".join(f'"{i}":0' for i in range(100_000)) + "}]",
    "large.csv": "x" * 2**21,
    "rows.csv": "a\n" + "b\n" * 500_000,
    "cells.csv": "ab," * 340_000,
    "quoted.csv": '"\n",ab,' * 120_000,
}
BOMBS = ["packed.jsonl.gz", *(f"{name}.parquet" for name in PARQUET_BOMBS), *TEXT_BOMBS]
POOLS = []  # which Arrow does not keep, though what it has made is given back to them


def bomb(path):
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(b"0" * 2**22))
    elif path.name in TEXT_BOMBS:
        path.write_text(TEXT_BOMBS[path.name])
    else:
        pq.write_table(pa.table(PARQUET_BOMBS[path.stem]()), path, **WRITTEN.get(path.stem, {}))
    return path


def peak(function):
    """MiB of Python and of Arrow that a call has at once, at most."""
    POOLS.append(pa.proxy_memory_pool(usual := pa.default_memory_pool()))
    pa.set_memory_pool(POOLS[-1])
    tracemalloc.start()
    try:
        function()
        return (tracemalloc.get_traced_memory()[1] + POOLS[-1].max_memory()) / 2**20
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(usual)


@pytest.mark.parametrize("name", BOMBS)
def test_what_a_file_unpacks_to_is_bounded(tmp_path, monkeypatch, name):
    path = bomb(tmp_path / name)
    assert path.stat().st_size < 2**20 or name == "large.csv"
    monkeypatch.setattr(data, "LARGEST", 2**20)
    found = "more than 0.000976562 GiB once unpacked; expected less"
    if name not in ("packed.jsonl.gz", "large.csv"):
        found = "rows that take more than 0.000976562 GiB of memory; expected fewer or shorter ones"

    def load():
        with pytest.raises(data.DataError, match=found):
            data.load_preferences(path, kind="helpful")

    load()  # libraries take some when they are first used
    assert peak(load) < 8, "MiB, where 1 is allowed for"


def test_texts_of_every_kind_come_through_unchanged(tmp_path):
    texts = [NASTY, "=1+1", "a\r\nb", "\u2028\ufeff", "\x00", "👩‍🚒", "'); DROP TABLE x; --"]
    rows = [{"prompt": f"{text} {i}", "response_0": text, "response_1": "no", "better_response_id": 0}
            for i, text in enumerate(texts)]  # fmt: skip
    path = Path(tmp_path / "x.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    frame, account = data.load_preferences(path)
    assert frame.response_0.tolist() == texts and account.kept == len(texts)
