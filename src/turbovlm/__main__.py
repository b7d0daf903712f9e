"""`python -m turbovlm` is the command `turbovlm`."""

import sys

from turbovlm.cli import main

sys.exit(main())
