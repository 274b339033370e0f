"""The same as ``q3d infos mmdet3d``."""

import sys

from q3d_plugin.commands import main

if __name__ == '__main__':
    sys.exit(main(['infos', 'mmdet3d', *sys.argv[1:]]))
