"""`python -m minivit`."""

import sys

from .cli.main import main

sys.exit(main())
