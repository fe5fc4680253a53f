"""`python -m llm_env`: the commands of `agents.command_line`."""

import sys

from agents.command_line import main

if __name__ == "__main__":
    sys.exit(main())
