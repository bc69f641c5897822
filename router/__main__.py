"""`python -m router` is `embedyard`."""

from router.cli import main

if __name__ == "__main__":
    main()
