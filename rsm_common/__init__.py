"""What every package stands on: errors, the Policy contract, seeds, command lines, atomic files, provenance.

Imports numpy and click at most, and none of our other packages. Used by all of them.
"""
