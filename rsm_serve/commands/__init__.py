"""The command lines rsm-serve and rsm-client, and the processes that they run.

Imports everything below; imported by nothing.
Used by the console scripts.
"""
