"""Many pieces of work, each done, failed and resumed alone: what a comparison, a benchmark or the demo runs.

A cell has a key, which is the name of its folder or its row in a file of results, and a record, which is written
when the cell ends. The record holds a digest of the settings that its numbers depend on. A cell that is done is
never run again; one that failed is. A cell that was stopped resumes by itself, from what is in its folder.
"""
