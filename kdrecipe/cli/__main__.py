"""``python -m kdrecipe.cli``: the command ``kdrecipe`` of this very Python."""

import sys

from kdrecipe.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
