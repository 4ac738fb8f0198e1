"""A whole run, or one that goes on from where another ended, on a mesh; then answers on the same mesh.

python -m tests.multi_device.whole_run MODEL ROWS DIRECTORY STATUS [--config.key=value ...]
"""

import sys
from pathlib import Path

from difflm_jax.train import command
from tests.tiny_run import train_arguments


def main(model: str, rows: str, directory: str, status: int, *more: str) -> None:
    found = command(train_arguments(Path(model), Path(rows), Path(directory), *more))
    assert found == status, found


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]), *sys.argv[5:])
