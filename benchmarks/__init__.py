"""Speed and memory of the transfer step, against its bound and against the dense form: `python -m benchmarks`."""
