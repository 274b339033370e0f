"""The same as ``q3d zoo``."""

import sys

from q3d_plugin.commands import main

if __name__ == '__main__':
    sys.exit(main(['zoo', *sys.argv[1:]]))
