"""What the tests stand on: the recorder of calls that guards a restructuring (record.py), and its calls (recorded/).

Not here: tests of the library.
"""
