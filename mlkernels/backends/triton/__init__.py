"""The family on any device that Triton serves: rows.py (the N x C kernels), finish.py (scalar mathematics), launch.py."""
