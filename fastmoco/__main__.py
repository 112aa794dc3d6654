"""python -m fastmoco"""

import sys

from fastmoco.cli import main

sys.exit(main())
