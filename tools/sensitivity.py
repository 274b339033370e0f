"""The same as ``q3d sensitivity``."""

import sys

from q3d_plugin.commands import main

if __name__ == '__main__':
    sys.exit(main(['sensitivity', *sys.argv[1:]]))
