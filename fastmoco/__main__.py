"""python -m fastmoco"""

import os
import sys

# `-m` looks for modules in the current folder first, which may hold a package of the user's named `pipelines`.
if sys.path and os.path.realpath(sys.path[0]) == os.path.realpath(os.getcwd()):
    sys.path.append(sys.path.pop(0))

from fastmoco.cli import main

sys.exit(main())
