"""The same as ``q3d toy-data --infos none``: the data set alone, without info files."""

import sys

from q3d_plugin.commands import main

if __name__ == '__main__':
    sys.exit(main(['toy-data', '--infos', 'none', *sys.argv[1:]]))
