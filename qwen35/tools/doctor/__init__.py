"""What a run needs of this machine, looked at before it starts: `make doctor`.

Nothing here is imported beyond the standard library until a check needs it: it also runs where nothing is installed yet.
"""
