"""What takes long and says of one more case what another test says: run only where SECATEUR_LONG_TESTS is set."""

from __future__ import annotations

import os

import pytest

VARIABLE = "SECATEUR_LONG_TESTS"
ARE_RUN = bool(os.environ.get(VARIABLE))
long = pytest.mark.skipif(not ARE_RUN, reason=f"takes long; {VARIABLE}=1 runs it")
