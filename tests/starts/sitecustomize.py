"""On PYTHONPATH of what tests start: two fifths of it are collections of garbage that find none.

An import makes hundreds of thousands of objects, which stay, and an end looks through all of them.
So objects in cycles are not finalized at an end, which Python does not promise either.
"""

import atexit
import gc

gc.set_threshold(50_000, 20, 100)
atexit.register(gc.freeze)
