"""Ranks other than 0 keep quiet, so that one report is printed."""

from __future__ import annotations

import os
import sys

from distinf import comm

if (comm.launched_rank() or 0) != 0:
    sys.stdout.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
