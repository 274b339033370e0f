"""Makes the toys of this folder importable, here and for the tests of the commands."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
