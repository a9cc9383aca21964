"""`python -m qwen_fused` is `qwen-fused`."""

import sys

from qwen_fused.cli.main import main

sys.exit(main())
