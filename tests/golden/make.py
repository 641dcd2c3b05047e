"""Make the golden numbers anew, on purpose: OMP_NUM_THREADS=1 python -m tests.golden.make "why they change"."""

from __future__ import annotations

import json
import subprocess
import sys

import torch

from tests.golden.cases import all_tensors, digest, environment, fingerprint
from tests.golden.test_golden import FILE


def main() -> None:
    if len(sys.argv) != 2 or not sys.argv[1].strip():
        sys.exit('usage: python -m tests.golden.make "why they change"')
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True).stdout
    found = {
        name: {"digest": digest(tensor), "shape": list(tensor.shape), "fingerprint": fingerprint(tensor)}
        for name, tensor in all_tensors()
    }
    old = json.loads(FILE.read_text())["tensors"] if FILE.exists() else {}
    for name in sorted(found.keys() | old.keys()):
        if found.get(name, {}).get("digest") != old.get(name, {}).get("digest"):
            print("changed:", name)
    told = {"after commit": commit.strip(), "why": sys.argv[1], "environment": environment(), "tensors": found}
    FILE.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
