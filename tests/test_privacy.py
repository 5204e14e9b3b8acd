"""What a user wrote, and their names, are in nothing that a run writes: canaries, and a search of each byte."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import pytest

from kvat_core import Objective, Profile, PromptSource, Scenario

WORDS = ("zyzzogeton", "quixolite", "brumblefax", "vorpaline", "snickerdrum", "tulgeywood", "frabjousness", "mimsical")
TEXT = " ".join(WORDS)
"""A prompt; each of its words betrays it."""
NAMES = {
    "HOME": "it's: homesparrow",
    "TMPDIR": "it's: tempsparrow",
    "LOGNAME": "logsparrow",
    "USER": "usersparrow",
    "profile": "profilesparrow",
    "prompt": "promptsparrow",
    "model": "it's: modelsparrow",
    "out": "outsparrow",
}
"""Parts of paths, some hard to tell from the text around them, and names of the user; the last word betrays each."""

ECHO = '''
"""An engine that tells what it should keep to itself; the model's name says where."""

import os, socket, sys
from kvat_core.engine import EngineError
from kvat_core.errors import UsageError
from kvat_core.fake import FakeEngine
from kvat_core.schema import Applied, ModelRef, Resources, Timeline

class Telling(Timeline):
    text: str

class EchoAdapter(type(FakeEngine().adapter(None))):
    def load_model(self, model_id, **more):
        self.where = model_id.partition(":")[2]
        super().load_model(model_id="fake:tiny", **more)

    def prepare_cache(self, strategy):
        super().prepare_cache(strategy)
        self.tells = (strategy.setup["kernel"], strategy.arguments["cache"]) == ("eager", "static")

    def run_decode(self, prompt, max_new_tokens):
        timeline, self.text = super().run_decode(prompt, max_new_tokens), prompt.texts[0]
        paths = [os.getcwd() + "/x", os.environ["HOME"] + "/y", os.environ["TMPDIR"] + "/z"]
        names = " ".join([*paths, *map(os.environ.get, ("HOME", "LOGNAME", "USER")), socket.gethostname()])
        if self.tells:
            match self.where:
                case "stdout":
                    os.write(1, self.text.encode())
                    raise EngineError("error", "printed it")
                case "stderr":
                    print(self.text, file=sys.stderr)
                    raise EngineError("error", "printed it")
                case "reason":
                    raise EngineError("error", f"cannot decode {self.text}")
                case "quoted reason":
                    raise EngineError("error", f"cannot decode {self.text.replace(' ', chr(10))!r}")
                case "usage error":
                    raise UsageError(f"cannot decode {self.text}")
                case "exception":
                    raise RuntimeError(self.text)
                case "timeline":
                    return Telling(**timeline.model_dump(), text=self.text)
                case "names":
                    print(names, file=sys.stderr)
                    raise EngineError("error", f"nobody knows {names}")
        return timeline

    def applied(self, prompt):
        applied, text = super().applied(prompt), prompt.texts[0]
        match self.where:
            case "mismatch" if self.tells:
                return Applied(values=applied.values, mismatches=(f"ran {text}",))
            case "values":
                return Applied(values={**applied.values, "seen": [{text: text}]})
        return applied

    def measure_resources(self):
        return Resources(processes=(self.text if self.where == "processes" else "worker",))

class EchoEngine(FakeEngine):
    name = "echo"
    own_models = ("echo:",)

    def describe(self, model, device, options):
        return FakeEngine().describe(ModelRef(id="fake:tiny"), device, options)

    def adapter(self, scratch):
        return EchoAdapter()
'''


def betrayer(name: str) -> str:
    return name.split()[-1]


@dataclass(frozen=True)
class World:
    """Folders of a user whose names are canaries, and what was written into them or shown."""

    root: Path

    @property
    def out(self) -> Path:
        return self.root / NAMES["out"] / "run"

    @property
    def config(self) -> Path:
        return self.root / "config"

    @property
    def environment(self) -> dict[str, str]:
        folders = {name: str(self.root / NAMES[name]) for name in ("HOME", "TMPDIR")}
        names = {name: NAMES[name] for name in ("LOGNAME", "USER")}
        path = os.pathsep.join([str(self.root / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
        return {**os.environ, **folders, **names, "XDG_CONFIG_HOME": str(self.config), "PYTHONPATH": path}

    def profile(self, prompt: PromptSource) -> Path:
        """A profile file; quick, because what it says of speed does not matter here."""
        profile = Profile(
            name="own",
            scenarios=(Scenario(prompt_tokens=32, output_tokens=4),),
            objective=Objective(decode=1),
            launches=1,
            samples=1,
            prompt=prompt,
        )
        path = self.root / NAMES["profile"] / f"{NAMES['profile']}.json"
        path.write_text(profile.model_dump_json())
        return path

    def start(self, *words: object) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "kvat_cli", "tune", *map(str, words), "--out", str(self.out)]
        return subprocess.Popen(
            command, env=self.environment, cwd=self.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def tune(self, *words: object) -> Outcome:
        with self.start(*words) as process:
            out, err = process.communicate()
        return Outcome(process.returncode, out, err)

    def written(self) -> Iterator[tuple[str, bytes]]:
        """Name and bytes of every file that a run has left anywhere it may write."""
        for folder in (self.out, self.config, self.root / NAMES["HOME"], self.root / NAMES["TMPDIR"]):
            for path in folder.rglob("*"):
                if path.is_file():
                    yield str(path.relative_to(folder)), path.read_bytes()

    def record(self, kind: str) -> dict[str, Any]:
        """Payload of the first record of a type."""
        records = map(json.loads, (self.out / "journal.jsonl").read_text().splitlines())
        return next(record["payload"] for record in records if record["type"] == kind)

    def betrayed(self, *shown: bytes) -> set[str]:
        """Canaries in what was written or shown."""
        everything = [*shown, *(name.encode() + b"\n" + data for name, data in self.written())]
        private = [*WORDS, *map(betrayer, NAMES.values()), hashlib.sha256(TEXT.encode()).hexdigest()]
        found = {word for word in private if any(word in text.decode("latin-1").lower() for text in everything)}
        host = re.compile(rb"\b" + re.escape(socket.gethostname()).encode() + rb"\b")
        return found | {"the host's name" for text in everything if host.search(text)}


@dataclass(frozen=True)
class Outcome:
    code: int
    out: bytes
    err: bytes


@pytest.fixture
def world(tmp_path: Path) -> World:
    for name in ("HOME", "TMPDIR", "profile", "prompt", "model", "out"):
        (tmp_path / NAMES[name]).mkdir()
    info = tmp_path / "site" / "kvat_engine_echo-1.0.dist-info"
    info.mkdir(parents=True)
    (tmp_path / "site" / "kvat_engine_echo.py").write_text(ECHO)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvat-engine-echo\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kvat.engines]\necho = kvat_engine_echo:EchoEngine\n")
    return World(tmp_path)


@pytest.fixture(params=["text", "file"])
def profile(world: World, request: pytest.FixtureRequest) -> Path:
    """A profile with a prompt of the user's own."""
    file = world.root / NAMES["prompt"] / f"{NAMES['prompt']}.txt"
    file.write_text(TEXT)
    return world.profile(PromptSource(kind=request.param, value=TEXT if request.param == "text" else str(file)))


def test_the_search_finds_what_it_is_for(world: World) -> None:
    world.out.mkdir()
    (world.out / "report.md").write_text(f"{WORDS[0].upper()} on {socket.gethostname()}")
    (world.root / NAMES["TMPDIR"] / NAMES["model"]).write_bytes(b"")
    found = {WORDS[0], betrayer(NAMES["model"]), betrayer(NAMES["USER"]), "the host's name"}
    assert world.betrayed(b"", NAMES["USER"].encode()) == found


@pytest.mark.parametrize("model", ["fake:tiny", "fake:secret"])
def test_a_run_writes_and_shows_nothing_of_a_users_prompt_and_names(world: World, profile: Path, model: str) -> None:
    outcome = world.tune("--model", model, "--profile", profile, "--json")
    assert (outcome.code, outcome.err) == (0, b"")
    assert world.betrayed(outcome.out) == set()


@pytest.mark.parametrize("profile", ["text"], indirect=True)
def test_of_the_prompt_there_is_a_digest_that_only_its_machine_can_make(world: World, profile: Path) -> None:
    world.tune("--model", "fake:tiny", "--profile", profile)
    digest = world.record("header")["prompt_digest"]
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert digest != hashlib.sha256(TEXT.encode()).hexdigest()
    (key,) = (path for path in world.config.rglob("*") if path.is_file())
    assert key.stat().st_mode & 0o777 == 0o600
    assert not any(key.read_bytes().hex().encode() in data for _, data in world.written())


@pytest.mark.parametrize("profile", ["text"], indirect=True)
@pytest.mark.parametrize(
    ("where", "kind", "trace"),
    [
        ("stdout", "failed", "(withheld: the prompts are the user's own)"),
        ("stderr", "failed", "(withheld: the prompts are the user's own)"),
        ("reason", "failed", "(withheld: it repeats the prompt)"),
        ("quoted reason", "failed", "(withheld: it repeats the prompt)"),
        ("usage error", "failed", "(withheld: it repeats the prompt)"),
        ("exception", "failed", "builtins.RuntimeError at kvat_engine_echo.py"),
        ("timeline", "failed", "the adapter's answer is no Timeline"),
        ("mismatch", "failed", "(withheld: it repeats the prompt)"),
        ("values", "proof", "(withheld: it repeats the prompt)"),
        ("processes", "measured", "(withheld: it repeats the prompt)"),
    ],
)
def test_an_engine_that_tells_the_prompt_is_not_quoted(
    world: World, profile: Path, where: str, kind: str, trace: str
) -> None:
    outcome = world.tune("--model", f"echo:{where}", "--profile", profile)
    assert outcome.code == 0
    assert trace in json.dumps(world.record(kind))
    shown = outcome.out.replace(str(world.out).encode(), b"")
    assert world.betrayed(shown, outcome.err) == set()


def test_an_engine_that_tells_names_is_quoted_without_them(world: World) -> None:
    sample = world.profile(PromptSource(kind="preset", value="chat"))
    outcome = world.tune("--model", "echo:names", "--profile", sample, "--json")
    assert (outcome.code, outcome.err) == (0, b"")
    failure = world.record("failed")["failure"]
    assert failure["reason"] == "nobody knows …/x …/y …/z …/… … … …"
    assert failure["stderr_tail"] == "…/x …/y …/z …/… … … …\n"
    assert world.betrayed(outcome.out) == set()


@pytest.mark.parametrize("profile", ["text"], indirect=True)
def test_a_run_that_is_killed_leaves_nothing_either(world: World, profile: Path) -> None:
    with world.start("--model", "fake:hang", "--profile", profile) as process:
        while not (world.out / "journal.jsonl").exists() or "measured" not in (world.out / "journal.jsonl").read_text():
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        out, err = process.communicate()
    assert {path.name for path in world.out.iterdir()} == {"journal.jsonl", "journal.lock"}
    assert world.betrayed(out, err) == set()


@pytest.fixture
def model(world: World) -> Path:
    """A real model whose parent folders are nobody's business."""
    with as_file(files("kvat_engine_transformers.model") / "builtin" / "llama") as folder:
        return Path(shutil.copytree(folder, world.root / NAMES["model"] / "mine"))


TRANSFORMERS = ("--engine", "transformers", "--set", "attention=sdpa", "--threads", 1)


@pytest.mark.parametrize("also", ["", "sub/.."])
def test_of_a_models_directory_the_last_part_is_known(world: World, model: Path, also: str) -> None:
    (model / "sub").mkdir()
    sample = world.profile(PromptSource(kind="preset", value="chat"))
    outcome = world.tune(*TRANSFORMERS, "--model", model / also, "--profile", sample, "--json")
    assert (outcome.code, outcome.err) == (0, b"")
    assert world.record("header")["target"]["model"]["id"] == "./mine"
    assert world.betrayed(outcome.out) == set()


def test_a_library_that_names_a_damaged_file_is_quoted_without_its_directory(world: World, model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    sample = world.profile(PromptSource(kind="preset", value="chat"))
    outcome = world.tune(*TRANSFORMERS, "--model", model, "--profile", sample)
    assert outcome.code == 5
    assert world.betrayed(outcome.out, outcome.err.replace(str(world.out).encode(), b"")) == set()
