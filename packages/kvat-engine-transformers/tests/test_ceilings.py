"""Ceilings as a run asks for them: in a worker of their own."""

from __future__ import annotations

from kvat_core.measure.deadlines import Limits
from kvat_core.measure.supervisor import WorkerProcess
from kvat_core.schema import Ceilings

LIMITS = Limits(300.0)


def test_a_machine_tells_what_it_can_do_at_most() -> None:
    asked = {"device": "cpu", "threads": 1, "dtypes": ["float32", "bfloat16"]}
    with WorkerProcess({"OMP_NUM_THREADS": "1"}) as worker:
        worker.call("start", {"engine": "transformers", "scratch": None}, "start", LIMITS)
        found = Ceilings.model_validate(worker.call("ceilings", asked, "ceilings", LIMITS))

    assert found.threads == 1
    assert found.gemm_flop_per_s.keys() == {"float32", "bfloat16"}
    rates = (found.read_bytes_per_s, found.copy_bytes_per_s, *found.gemm_flop_per_s.values())
    assert all(rate.best >= rate.median for rate in rates)
    assert found.launch_floor_s.best <= found.launch_floor_s.median
    assert found.to_device_bytes_per_s is None
    # Library code alone: the model of the first call is smaller than any library.
    assert found.first_call_bytes is not None
    assert found.first_call_bytes > 2**20
