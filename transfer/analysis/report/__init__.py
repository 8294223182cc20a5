"""How results are shown: one style of plots, one set of tables, one page."""
