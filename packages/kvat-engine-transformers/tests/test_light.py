"""What the command line imports of this package must stay light."""

from __future__ import annotations

import subprocess
import sys


def test_the_light_half_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, kvat_engine_transformers as package; package.TransformersEngine();"
        "from kvat_engine_transformers.outputs import generation_config, snippet;"
        "from kvat_engine_transformers.settings import reading;"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'transformers', 'scipy', 'numpy'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
