"""Attention programs: attention formulas over Q, K and V as data (the search space of AttnZero, ECCV 2024)."""
