"""A dry run of a real model looks at its metadata, and loads no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvat_core import TuneRequest, dry_run
from kvat_core.measure.supervisor import WorkerProcess


def test_the_built_in_model_is_foretold_without_its_weights(tmp_path: Path) -> None:
    asked: list[str] = []

    class Recording(WorkerProcess):
        def call(self, operation: Any, *arguments: Any) -> Any:
            asked.append(operation)
            return super().call(operation, *arguments)

    request = TuneRequest(out=tmp_path / "out", model="builtin:llama", space="default")
    found = dry_run(request, open_worker=Recording)

    assert asked == ["start", "probe", "describe"]
    assert not (tmp_path / "out").exists()
    by_label = {candidate.label: candidate for candidate in found.candidates}
    smaller, larger = (by_label[label].predicted_peak_bytes for label in ("default", "cache=static"))
    assert smaller is not None
    assert larger is not None
    assert 0 < smaller < larger
    assert by_label["default"].loads == by_label["cache=static"].loads
    reasons = {label: group.reason for group in found.excluded for label in group.labels}
    assert "for cuda only" in reasons["attention=sdpa_cudnn"]
