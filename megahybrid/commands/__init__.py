"""The commands that a user types, a file for each, which combine what lies below."""
