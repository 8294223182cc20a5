"""Run on a Slurm cluster: submit jobs, survive restarts, and show the state of runs."""
