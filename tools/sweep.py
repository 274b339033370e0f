"""The same as ``q3d sweep``."""

import sys

from q3d_plugin.commands import main

if __name__ == '__main__':
    sys.exit(main(['sweep', *sys.argv[1:]]))
