# SPDX-License-Identifier: MPL-2.0
"""A few rounds of tests/bench/crash.py: kill -9 at a random instant loses, repeats and overlaps nothing."""

import os
import pathlib
import subprocess
import sys

import pytest

BENCH = pathlib.Path(__file__).parent / "bench" / "crash.py"


@pytest.mark.parametrize("seed", ["11", "12"])
def test_kill_9_at_any_instant_loses_repeats_and_overlaps_nothing(seed):
    done = subprocess.run([sys.executable, str(BENCH)], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "BENCH_ROUNDS": "8", "BENCH_SEED": seed})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "integrity_check ok" in done.stdout
