"""`python -m qwen_fused` is `qwen-fused`."""

import sys

from qwen_fused.cli import main

sys.exit(main())
