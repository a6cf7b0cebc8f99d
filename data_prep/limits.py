"""How large a value that a data command is given may be, and why. Imports nothing."""

LARGEST_VOCABULARY = 2**31  # ids are int32
LARGEST_MIB = 2**30
LONGEST_ROW = 2**24  # pack holds some tens of bytes for each possible length of a document
MOST_WORKERS = 1024
