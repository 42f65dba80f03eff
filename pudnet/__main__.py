"""``python -m pudnet``: the same as the command ``pudnet``."""

from pudnet.cli import main

if __name__ == "__main__":
    main()
