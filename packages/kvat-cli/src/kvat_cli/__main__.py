"""`python -m kvat_cli` is `kvat`."""

import sys

from kvat_cli.boundary import main

sys.exit(main())
