"""Transformers with a planted fault in its static cache, one per engine: what has to catch it is kvat."""

from __future__ import annotations

from pathlib import Path

from kvat_core.engine import EngineAdapter
from kvat_engine_transformers import TransformersEngine


class SecretlyDynamicEngine(TransformersEngine):
    """A static cache that is none."""

    name = "secretly-dynamic"

    def adapter(self, scratch: Path) -> EngineAdapter:
        super().adapter(scratch)
        from kvat_faulty_adapters import SecretlyDynamic

        return SecretlyDynamic()


class ForgetfulEngine(TransformersEngine):
    """A static cache that drops the oldest tenth of what it holds."""

    name = "forgetful"

    def adapter(self, scratch: Path) -> EngineAdapter:
        super().adapter(scratch)
        from kvat_faulty_adapters import Forgetful

        return Forgetful()


class SharingEngine(TransformersEngine):
    """A static cache that begins as that of the request before."""

    name = "sharing"

    def adapter(self, scratch: Path) -> EngineAdapter:
        super().adapter(scratch)
        from kvat_faulty_adapters import Sharing

        return Sharing()
