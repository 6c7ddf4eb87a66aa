"""Puts this folder on the path, so that tests can import the builders they share."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
