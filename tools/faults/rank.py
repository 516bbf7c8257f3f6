"""One rank of torchrun's with a planted fault:
python -m tools.faults.rank KIND RANK STEP RUN_DIR ARGUMENTS-OF-MESHWRIGHT...
"""

from __future__ import annotations

import sys
from pathlib import Path

from tools.faults.plant import Fault, planted

from meshwright.cli import main

if __name__ == "__main__":
    kind, rank, step, folder, *arguments = sys.argv[1:]
    with planted(Fault(kind, int(rank), int(step)), Path(folder)):
        sys.exit(main(arguments))
