"""Tuning a local model opens no internet socket: the kernel kills whoever tries."""

import os
import shutil
import signal
import subprocess
import sys
from importlib.resources import as_file, files
from pathlib import Path

import pytest

from kvat_core import Objective, Profile, Scenario, read_plan

GUARD = Path(__file__).with_name("without_internet.py")
UNSUPPORTED = 77
QUICK = Profile(
    name="quick",
    scenarios=(Scenario(prompt_tokens=16, output_tokens=4),),
    objective=Objective(decode=1),
    launches=1,
    samples=1,
)
# With these a library asks nobody of its own accord, and nothing would be proven.
OFFLINE = {"HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"}


def guarded(*command: object, home: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A command that is killed for an internet socket, as everything is that it starts."""
    environment = {name: value for name, value in os.environ.items() if name not in OFFLINE}
    if home is not None:
        environment["HF_HOME"] = str(home)
    words = [sys.executable, GUARD, *map(str, command)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module", autouse=True)
def guard() -> None:
    if guarded(sys.executable, "-c", "").returncode == UNSUPPORTED:
        pytest.skip("this platform has no seccomp filters to forbid sockets with")


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6"])
def test_the_guard_bites(family: str) -> None:
    code = f"import socket; socket.socket(socket.{family})"
    assert guarded(sys.executable, "-c", code).returncode == -signal.SIGSYS


def test_the_guard_bites_a_child_too() -> None:
    code = (
        "import socket, subprocess as s, sys; print(s.call([sys.executable, '-c', 'import socket; socket.socket()']))"
    )
    assert guarded(sys.executable, "-c", code).stdout == f"{-signal.SIGSYS}\n"


def test_the_guard_lets_other_sockets_be() -> None:
    code = "import socket as s; s.socketpair(); s.socket(s.AF_UNIX); s.socket(s.AF_NETLINK, s.SOCK_RAW)"
    done = guarded(sys.executable, "-c", code)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("kind", ["builtin", "directory"])
def test_a_tune_of_a_local_model_opens_no_internet_socket(tmp_path: Path, kind: str) -> None:
    model = "builtin:llama"
    if kind == "directory":
        model = str(tmp_path / "model")
        with as_file(files("kvat_engine_transformers.model") / "builtin" / "llama") as folder:
            shutil.copytree(folder, model)
    profile = tmp_path / "quick.json"
    profile.write_text(QUICK.model_dump_json())
    words = ("tune", "--engine", "transformers", "--model", model, "--profile", profile, "--out", tmp_path / "out")
    done = guarded(sys.executable, "-m", "kvat_cli", *words, "--set", "attention=sdpa", home=tmp_path / "hub")
    assert done.returncode == 0, done.stderr
    # A worker that is killed is only a failed candidate.
    plan = read_plan(tmp_path / "out" / "best_plan.json")
    assert {candidate.state for candidate in plan.candidates} <= {"ok", "excluded"}, done.stdout
    assert any(candidate.state == "ok" for candidate in plan.candidates)


def test_a_model_of_the_hub_is_asked_for_only_with_allow_download(tmp_path: Path) -> None:
    words = ("tune", "--engine", "transformers", "--model", "no-such-owner/no-such-model", "--out", tmp_path / "out")
    refused = guarded(sys.executable, "-m", "kvat_cli", *words, home=tmp_path / "hub")
    assert refused.returncode == 2
    assert "--allow-download" in refused.stderr
    asked = guarded(sys.executable, "-m", "kvat_cli", *words, "--allow-download", home=tmp_path / "hub")
    assert "SIGSYS" in asked.stderr
