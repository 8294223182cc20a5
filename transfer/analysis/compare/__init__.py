"""One teacher, many attention operators, the same budget: what each costs and what it gives."""
