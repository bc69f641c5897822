"""`python -m router` is `embedyard`."""

from router.cli.main import main

if __name__ == "__main__":
    main()
