"""On PYTHONPATH of what tests start: a sixth of a start is collections of garbage that find none.

An import makes hundreds of thousands of objects, which stay.
"""

import gc

gc.set_threshold(50_000, 20, 100)
