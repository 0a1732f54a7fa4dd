"""``python -m ecospa_fx``: the command line."""

import sys

from ecospa_fx.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
