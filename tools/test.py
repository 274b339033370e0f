"""The same as ``q3d test``."""

import sys

from q3d_plugin.commands import main

if __name__ == '__main__':
    sys.exit(main(['test', *sys.argv[1:]]))
