"""The same as ``q3d train``."""

import sys

from q3d_plugin.commands import main

if __name__ == '__main__':
    sys.exit(main(['train', *sys.argv[1:]]))
