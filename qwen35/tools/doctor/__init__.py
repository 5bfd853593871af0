"""Checks that this machine has what a run needs: `make doctor`.

Only the standard library is imported until a check needs more, so that it runs before installation.
"""
