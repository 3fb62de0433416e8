"""`python -m torchlin` is the command `torchlin`."""

import sys

from torchlin.cli import main

sys.exit(main())
