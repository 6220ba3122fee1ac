"""Where the repository is, for the tests of its build and structure."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# At the end, so that a flash_attn that is installed isn't hidden by the source tree.
sys.path.append(str(ROOT))
