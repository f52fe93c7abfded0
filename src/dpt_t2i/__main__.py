"""`python -m dpt_t2i` is `dpt`."""

import sys

from dpt_t2i.cli import main

sys.exit(main())
