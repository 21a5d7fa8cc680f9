"""`megadsl data preprocess` under the name that Megatron users look for: text or a corpus folder -> Megatron's mmap files (mpirun -n N too)."""

import sys

from megadsl.cli.main import run

if __name__ == "__main__":
    sys.argv[1:1] = ["data", "preprocess"]
    run()
