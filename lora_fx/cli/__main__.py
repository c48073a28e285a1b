import sys

from lora_fx.cli import main

sys.exit(main())
