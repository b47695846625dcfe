"""The commands: each module parses arguments and calls one function.

The scripts in tools/ and the installed commands (`mabn-train`, ...) run their `main`.
"""
