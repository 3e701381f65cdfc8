"""``make bench``: speed and memory of our forms against plain ones in the official order of operations, as ratios in one run.

One file per family defines ``CASES`` (name -> function that prepares one side and returns its step) and, where a single
number is wanted, ``MEASURES`` (name -> function that returns it).
"""
