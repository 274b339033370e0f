"""The same as ``q3d spoil-checkpoint``."""

import sys

from q3d_plugin.commands import main

if __name__ == '__main__':
    sys.exit(main(['spoil-checkpoint', *sys.argv[1:]]))
