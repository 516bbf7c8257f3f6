"""The public names of the runtime are there, and importing the package alone does not import torch."""

import subprocess
import sys

import meshwright.runtime


def test_every_public_name_can_be_imported():
    for name in meshwright.runtime.__all__:
        assert getattr(meshwright.runtime, name).__name__ == name


def test_importing_the_package_alone_imports_no_torch():
    code = "import sys, meshwright.runtime; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
