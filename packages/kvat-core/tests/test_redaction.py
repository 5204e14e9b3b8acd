"""What a worker said can be shown to others."""

from __future__ import annotations

import itertools
import json
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import pytest

from kvat_core import TuneRequest, tune
from kvat_core.engine import Probe
from kvat_core.errors import Paused
from kvat_core.fake import FakeEngine
from kvat_core.measure.redaction import WITHHELD, anonymous, published, without_prompt
from kvat_core.schema import PromptSource


@pytest.mark.parametrize(
    ("printed", "shown"),
    [
        ('File "/home/somebody/models/mine/config.json", line 3', 'File "…/config.json", line 3'),
        ("cannot open '/data/secret project/x'", "cannot open '…/x'"),
        ("C:\\\\Users\\\\somebody\\\\model.bin is bad", "…/model.bin is bad"),
        ("cannot open /data/secret project/old models/x.bin", "cannot open …/x.bin"),
        ("cannot open /data/a/x.bin or /data/b/y.bin", "cannot open …/x.bin or …/y.bin"),
        ("cannot open /data/a/x.bin, and 3/4 of it", "cannot open …/x.bin, and 3/4 of it"),
        ("cannot open /data/Kunde Meier und Soehne GmbH/x.bin", "cannot open …/x.bin"),
        ("g++ -I/data/a b/include -L/data/c/lib", "g++ -I…/include -L…/lib"),
        ("-I/data/a b/x.h", "-I…/x.h"),
        ("g++ -isystem/data/my dir/x.h", "g++ -isystem…/x.h"),
        ("cannot open /data/Kunde - Geheim/x.bin", "cannot open …/x.bin"),
        ("no file /data/x.bin while loading config/tokenizer", "no file …/x.bin while loading config/tokenizer"),
        ("cannot open models/secret/x.bin", "cannot open models…/x.bin"),
        ("rate 3/4 at 12:30", "rate 3/4 at 12:30"),
        (
            "3/4 vs 5/6, input/output and read/write, km/h or m/s",
            "3/4 vs 5/6, input/output and read/write, km/h or m/s",
        ),
    ],
)
def test_of_a_path_the_last_part_stays(printed: str, shown: str) -> None:
    assert anonymous(printed.replace("\\\\", "\\")) == shown


NAMED = "it's all: mine"
"""A directory that no pattern would find."""


@pytest.mark.parametrize("variable", ["HOME", "TMPDIR"])
def test_where_the_user_is_at_home_is_known_whatever_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    (tmp_path / NAMED / "here").mkdir(parents=True)
    monkeypatch.setenv(variable, str(tmp_path / NAMED / "here"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert anonymous(f"no file {tmp_path}/{NAMED}/here/x.bin") == "no file …/x.bin"
    assert anonymous(f"no file {tmp_path}/{NAMED}/y.bin") == "no file …/y.bin"
    assert anonymous(f"g++ -I{tmp_path}/{NAMED}/here/x.h") == "g++ -I…/x.h"
    assert anonymous(f"file://{tmp_path}/{NAMED}/here/x.json is bad") == "file://…/x.json is bad"


def test_a_known_path_that_is_part_of_another_hides_none_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert anonymous("no file /mnt/My Disk/home/old/x.bin") == "no file …/x.bin"
    assert anonymous("no file '/mnt/My Disk/home/old/x.bin'") == "no file '…/x.bin'"


@pytest.mark.parametrize(
    "below", ["Kunde Meier und Soehne GmbH", "Smith, John", "a: b", "My Very Own Secret Project of 2026 and more of it"]
)
def test_in_quotation_marks_whatever_is_below_goes_as_well(below: str) -> None:
    assert anonymous(f"cannot open '{Path.home()}/{below}/x.bin'") == "cannot open '…/x.bin'"
    assert anonymous(f'File "{Path.cwd()}/{below}/x.py", line 3') == 'File "…/x.py", line 3'
    assert anonymous(f'File "/elsewhere/{below}/x.py", line 3') == 'File "…/x.py", line 3'


def test_where_there_is_neither_a_current_directory_nor_a_temporary_one_the_rest_is_taken_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gone() -> NoReturn:
        raise FileNotFoundError

    monkeypatch.setattr(tempfile, "gettempdir", gone)
    monkeypatch.setattr(Path, "cwd", gone)
    assert anonymous(f"no file {Path.home()}/x.bin") == "no file …/x.bin"


@pytest.mark.parametrize("told", ["{}", "./{}", "{here}/{}"])
def test_paths_that_are_named_are_taken_out_as_given_and_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    text = told.format(f"{NAMED}/llama/config.json", here=tmp_path)
    assert anonymous(f"no {text} is there", [f"{NAMED}/llama"]) == "no …/config.json is there"


def test_host_and_home_are_taken_out() -> None:
    text = anonymous(f"{socket.gethostname()} says that {Path.home()} is full")
    assert socket.gethostname() not in text
    assert Path.home().name not in text


OWN = PromptSource(kind="text", value="Dear Dr Ågren,\nplease keep this letter\tto yourself: nobody else's 'business'.")


@pytest.mark.parametrize(
    "text",
    [
        "cannot decode Dear Dr Ågren,\nplease keep this",
        "cannot decode 'please keep this letter to yourself'",
        f"cannot decode {OWN.value!r}",
        f"cannot decode {OWN.value!a}",
        f"cannot decode {json.dumps({'prompt': OWN.value})}",
        "…letter to yourself: n…",
    ],
)
def test_a_text_that_repeats_the_users_prompt_is_withheld(text: str) -> None:
    assert without_prompt(text, OWN) == WITHHELD


@pytest.mark.parametrize(
    "value",
    [
        "この手紙はどうか誰にも見せないでください",
        "àéîõü âêîôû ãñõ äëïöü åæœø",
        "one short\nline after\nanother, to be\nsure",
    ],
    ids=["code points", "bytes", "lines"],
)
def test_a_text_that_repeats_it_in_escapes_is_withheld(value: str) -> None:
    own = PromptSource(kind="text", value=value)
    assert without_prompt(f"cannot decode {value!a}", own) == WITHHELD
    assert without_prompt(f"cannot decode {json.dumps(value)}", own) == WITHHELD


@pytest.mark.parametrize("text", ["", "out of memory", "keep this letter to, and no more"])
def test_what_has_less_in_common_is_kept(text: str) -> None:
    assert without_prompt(text, OWN) == text


def test_a_short_prompt_is_found_where_it_fills_a_long_one() -> None:
    own = PromptSource(kind="file", value="hush hush\n")
    assert without_prompt("cannot decode hush hush hush hush hush", own) == WITHHELD
    assert without_prompt("cannot decode hush hush", own) == "cannot decode hush hush"


def test_what_a_canary_says_backwards_is_withheld_as_well() -> None:
    assert OWN.value is not None
    assert without_prompt(f"cannot decode {OWN.value[::-1][:40]}", OWN) == WITHHELD


def test_a_sample_text_of_ours_may_be_repeated() -> None:
    assert (
        without_prompt("Dear Dr Ågren, please keep this letter", OWN.model_copy(update={"kind": "preset"})) != WITHHELD
    )


def test_values_that_differ_in_what_was_taken_out_still_differ() -> None:
    one, other = (published(f"cache in /data/{name}/cache.bin", OWN) for name in ("one", "other"))
    assert str(one).startswith("cache in …/cache.bin ")
    assert one != other
    assert one == published("cache in /data/one/cache.bin", OWN)


def test_equal_values_stay_equal_where_no_key_can_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    assert published("cache in /data/one/cache.bin", OWN) == published("cache in /data/one/cache.bin", OWN)


@pytest.mark.parametrize("key", [True, False])
def test_values_that_repeat_the_prompt_are_withheld_and_still_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: bool
) -> None:
    config = tmp_path / "config"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(config))
    if not key:
        config.write_text("in the way")
    one, other = "please keep this letter", "to yourself: nobody else"
    values = published({"seen": [one, {"slots": 4, other: None}], "cache": "static", one: True}, OWN)
    assert "letter" not in (told := json.dumps(values))
    assert "yourself" not in told
    assert isinstance(values, dict)
    (first, second), *_ = values.values()
    assert first.startswith(WITHHELD)
    assert second["slots"] == 4
    assert first not in second
    assert values["cache"] == "static"
    assert first in values


def test_a_check_of_the_device_names_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process_worker: type
) -> None:
    asked = itertools.count()
    probe = FakeEngine.probe

    def broken_later(self: FakeEngine, device: str | None, options: Mapping[str, str]) -> Probe:
        if next(asked):
            raise OSError("/home/somebody/driver/libdevice.so: no such file")
        return probe(self, device, options)

    monkeypatch.setattr(FakeEngine, "probe", broken_later)
    request = TuneRequest(out=tmp_path / "out", model="fake:all-fail", profile="ci-micro", space="full")
    with pytest.raises(Paused):
        tune(request, open_worker=in_process_worker)
    journal = (tmp_path / "out" / "journal.jsonl").read_text()
    assert "libdevice.so" in journal
    assert "somebody" not in journal


def test_the_users_names_are_taken_out_wherever_they_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "sparrow")
    monkeypatch.setenv("USER", "wren")
    monkeypatch.setattr(socket, "gethostname", lambda: "nest.example.org")
    assert anonymous("sparrow, wren and wrench of nest at nest.example.org") == "…, … and wrench of … at …"
