"""`python -m meshwright`: the same as the `meshwright` command."""

from __future__ import annotations

import sys

from meshwright.cli import main

sys.exit(main())
