"""The command `hosfl`, also as `python -m hosfl`: Ctrl-C is one line from the first import on.

Nothing is imported above `main` but what Python has already, for there no interrupt can be caught.
"""

import sys


def main() -> int:
    """Run the command line; the exit status."""
    try:
        from hosfl.interrupts import uninterrupted

        with uninterrupted():  # an import that is broken off leaves half a module behind
            from hosfl.cli import main as run
        return run()
    except KeyboardInterrupt:
        print("hosfl: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
