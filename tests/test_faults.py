"""A sample of what the benchmarks do in full: damage journals, and kill commands and their workers."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("words", [("journal_faults.py", "--every", "149"), ("kill_nine.py", "--kills", "6")])
def test_no_fault_of_a_sample_breaks_a_promise(words: tuple[str, ...]) -> None:
    script, *options = words
    done = subprocess.run([sys.executable, BENCHMARKS / script, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
