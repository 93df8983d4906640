"""Pre-trains on storage that takes two seconds to flush a checkpoint; started by torchrun: RECIPE OVERRIDES…"""

import sys
import time

from mobillama.cli import main
from mobillama.train import saver

flush = saver.fsync_tree
saver.fsync_tree = lambda path: (time.sleep(2), flush(path))
sys.exit(main(["pretrain", *sys.argv[1:]]))
