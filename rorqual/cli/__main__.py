"""`python -m rorqual.cli` is `rorqual`."""

import sys

from rorqual.cli.main import main

sys.exit(main())
