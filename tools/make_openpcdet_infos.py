"""The same as ``q3d infos openpcdet``."""

import sys

from q3d_plugin.commands import main

if __name__ == '__main__':
    sys.exit(main(['infos', 'openpcdet', *sys.argv[1:]]))
