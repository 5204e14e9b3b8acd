"""A double of xFormers for machines without its kernels: see `ops`."""
