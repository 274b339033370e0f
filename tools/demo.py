"""The same as ``q3d demo``."""

import sys

from q3d_plugin.commands import main

if __name__ == '__main__':
    sys.exit(main(['demo', *sys.argv[1:]]))
