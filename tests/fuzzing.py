"""How long the long random walks are: `make fuzz` makes them many times as long, and every time others."""

from __future__ import annotations

import os

FUZZ = int(os.environ.get("TESSERA_FUZZ", "1"))
