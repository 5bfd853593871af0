"""`python -m qwen35.launch [options] CONFIG [a.b=c …]`."""

import sys

from qwen35.console import outlive_readers
from qwen35.launch.launcher import main

if __name__ == "__main__":
    outlive_readers()
    sys.exit(main())
