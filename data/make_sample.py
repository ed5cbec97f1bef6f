"""Write bench_sample.jsonl and SHA256SUMS beside this file; `--check` compares byte for byte and writes nothing."""

import argparse
import hashlib
import json
import sys
from pathlib import Path

from cdpo_utils import bench

ROWS, SEED = 400, 0
FOLDER = Path(__file__).resolve().parent
SAMPLE = "bench_sample.jsonl"


def sample():
    """The sample's bytes: one JSON object per line, UTF-8, LF, in the order in which the pairs were drawn."""
    frame = bench.sample_preferences(bench.make_world(SEED), ROWS, SEED)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in frame.to_dict("records")).encode()


def files():
    """{file name: bytes} of all that is generated here."""
    content = sample()
    sums = f"{hashlib.sha256(content).hexdigest()}  {SAMPLE}\n"  # what `sha256sum -c` reads
    return {SAMPLE: content, "SHA256SUMS": sums.encode()}


def main(argv=None):
    """0, or 1 where `--check` finds a file that is absent or differs."""
    parser = argparse.ArgumentParser(description="Generate the sample of preference pairs.")
    parser.add_argument("--check", action="store_true", help="compare with the files that are there")
    check, status = parser.parse_args(argv).check, 0
    for name, content in files().items():
        path = FOLDER / name
        if not check:
            path.write_bytes(content)
            print(f"{name}: {len(content)} bytes written")
        elif path.is_file() and path.read_bytes() == content:
            print(f"{name}: as generated")
        else:
            print(f"{name}: {'differs from what is generated' if path.exists() else 'is not there'}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
