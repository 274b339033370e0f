"""``python -m q3d_plugin`` is the command ``q3d``."""

import sys

from q3d_plugin.commands import main

if __name__ == '__main__':
    sys.exit(main())
