"""The subcommands of `embedyard`, one module each, with the click command in `command`.

`router/cli/main.py` imports them one at a time; nothing here imports another.
"""
