"""Loads torch and MONAI in two thirds of their time. Imported before anything of MONAI's.

`import monai` loads all of MONAI, and that loads every optional package it finds. Two of them take
a second together, for plots in notebooks and for ultrasound, which nothing here uses: MONAI is
told that they are not installed. They are there again for whoever imports them afterwards.
"""

from __future__ import annotations

import gc
import sys
from typing import Final

_UNUSED: Final = ("matplotlib", "scipy.signal")

_hidden = [name for name in _UNUSED if name not in sys.modules]
for _name in _hidden:
    sys.modules[_name] = None  # type: ignore[assignment]
# What is imported stays: looking through it again and again for garbage takes half a second more,
# and in a forked process copies all the memory that it shares.
gc.disable()
try:
    import monai.networks.nets  # noqa: F401  torch with it
finally:
    gc.enable()
    for _name in _hidden:
        del sys.modules[_name]
gc.freeze()
