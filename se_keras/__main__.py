"""`python -m se_keras`: the command se-keras. That starts faster, because here Python imports se_keras first."""

import sys

from se_keras_cli import main

if __name__ == "__main__":
    sys.exit(main())
