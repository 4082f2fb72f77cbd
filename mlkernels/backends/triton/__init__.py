"""The family on any device that Triton serves: kernels in rows.py and sums.py, operators in launch.py."""
