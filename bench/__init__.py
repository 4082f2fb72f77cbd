"""The microbenchmark: ``python -m bench`` times whole training steps of each loss against its peers and the floors."""
