"""The same as ``q3d benchmark``."""

import sys

from q3d_plugin.commands import main

if __name__ == '__main__':
    sys.exit(main(['benchmark', *sys.argv[1:]]))
