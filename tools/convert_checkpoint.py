"""`megadsl checkpoint export` under the name that Megatron users look for: checkpoint -> Hugging Face folder."""

import sys

from megadsl.cli.main import run

if __name__ == "__main__":
    sys.argv[1:1] = ["checkpoint", "export"]
    run()
