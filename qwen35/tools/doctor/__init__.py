"""Checks that this machine has what a run needs: `make doctor`."""
