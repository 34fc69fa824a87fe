"""Shares for ranks of unequal speed: solve.py has the arithmetic, profile.py the measurements, tune.py the choice."""
