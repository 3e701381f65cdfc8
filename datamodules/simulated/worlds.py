"""What all simulated worlds share."""

# First index of each split: splits stay apart whatever their sizes.
SPLIT_STARTS = {"train": 0, "val": 10**9, "test": 2 * 10**9}
