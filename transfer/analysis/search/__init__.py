"""The page of a search: its front, its lineage, its formulas, and what was refused."""
