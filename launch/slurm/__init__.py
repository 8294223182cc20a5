"""Runs on a cluster: submitting, surviving what happens to a job, and seeing how it is."""
