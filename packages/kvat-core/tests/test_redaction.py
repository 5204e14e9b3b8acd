"""What a worker printed can be shown to others."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from kvat_core.measure.redaction import anonymous


@pytest.mark.parametrize(
    ("printed", "shown"),
    [
        ('File "/home/somebody/models/mine/config.json", line 3', 'File "…/config.json", line 3'),
        ("cannot open '/data/secret project/x'", "cannot open '…/x'"),
        ("C:\\\\Users\\\\somebody\\\\model.bin is bad", "…/model.bin is bad"),
        ("rate 3/4 at 12:30", "rate 3/4 at 12:30"),
    ],
)
def test_of_a_path_the_last_part_stays(printed: str, shown: str) -> None:
    assert anonymous(printed.replace("\\\\", "\\")) == shown


def test_host_and_home_are_taken_out() -> None:
    text = anonymous(f"{socket.gethostname()} says that {Path.home()} is full")
    assert socket.gethostname() not in text
    assert Path.home().name not in text
