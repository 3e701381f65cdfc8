"""``make bench``: speed and memory of our forms against plain ones in the official order of operations, as ratios in one run.

One file per family defines ``CASES`` (name -> function that prepares one side and returns its step), ``ALONE`` (the same for
sizes where the plain side would take too long or not fit: ours by itself) and, where numbers of another kind are wanted,
``MEASURES`` (name -> function that returns one or a dict of them).
"""
