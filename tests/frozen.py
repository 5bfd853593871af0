"""Imported last by the server of forked.py: its forks need not look for garbage in what they share,
which would copy it.
"""

import gc

gc.collect()
gc.freeze()
