"""The same as ``q3d report``."""

import sys

from q3d_plugin.commands import main

if __name__ == '__main__':
    sys.exit(main(['report', *sys.argv[1:]]))
