"""The subcommands of `embedyard`, one module each, with the click command in `command`.

`router/cli/main.py` imports each on use; subcommands do not import each other.
"""
