"""The family on any device that Triton serves: kernels in rows.py, sums.py, pieces.py, operators in launch.py."""
