"""The family on any device that Triton serves: kernels in rows.py and finish.py, their launches in launch.py."""
