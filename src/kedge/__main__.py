"""``python -m kedge`` is the command ``kedge``."""

import sys

from kedge.cli import main

sys.exit(main())
