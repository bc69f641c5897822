"""Embeds whole files: readers, writers, and a job that a kill at any moment does not harm.

`job` joins them; `local` and `remote` compute. Nothing here imports the server.
"""
