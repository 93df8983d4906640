"""``python -m mobillama``: the same as the ``mobillama`` command."""

import sys

from mobillama.cli import main

if __name__ == "__main__":
    sys.exit(main())
